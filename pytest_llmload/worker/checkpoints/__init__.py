"""Checkpoints: finding, building and identifying the files of a model."""
