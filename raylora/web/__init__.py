"""A live page about runs: read from their directories only, shown by the standard library's HTTP server."""
