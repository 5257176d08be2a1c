"""Measurements; of their figures nothing passes or fails, a smoke test keeps them running."""
