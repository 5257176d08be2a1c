"""Tests of what follows a migration stream."""
