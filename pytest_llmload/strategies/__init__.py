"""One file per way of loading."""
