"""One file per quantisation method."""
