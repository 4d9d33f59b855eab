"""Sweeps: many runs planned, carried out, compared."""
