"""Checks that tests make of a load: baselines, limits, requirements."""
