"""Markers of tests, and the load specs that they stand for."""
