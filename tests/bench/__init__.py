"""Measurements, no tests: nothing here passes or fails."""
