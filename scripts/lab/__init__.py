"""Sweeps, claims, the benchmark and planning: what `scripts/` and sweep files share."""
