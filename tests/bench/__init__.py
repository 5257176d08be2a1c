"""Measurements; no test depends on their figures, a smoke test keeps them running."""
