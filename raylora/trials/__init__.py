"""What Ray Tune's trials are to raylora: which numbers they report, and how several share a forward."""
