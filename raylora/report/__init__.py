"""A finished run for human eyes: one self-contained HTML page, its plots, and a table for the terminal."""

from raylora.report.page import write_report
from raylora.report.table import console_table

__all__ = ["console_table", "write_report"]
