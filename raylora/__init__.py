"""raylora: ensembles of low-rank adapters over one frozen, quantised base, on Ray."""

__version__ = "0.1.0"
