"""Checkpoints: find, build and identify the files of a model."""
