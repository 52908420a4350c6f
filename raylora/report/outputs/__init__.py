"""What a report shows of each output: one file per output, registered under the seam ``report``; see :mod:`.base`."""
