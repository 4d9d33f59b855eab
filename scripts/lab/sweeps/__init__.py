"""Sweeps: planning and running variants of a config, and comparing their results."""

from lab.sweeps.sweep import PaperRow, Sweep, combined, grid, zipped

__all__ = ["PaperRow", "Sweep", "combined", "grid", "zipped"]
