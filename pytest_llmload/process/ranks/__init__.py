"""Loads that several processes make together: the load's process starts them, and each holds one rank's shard."""
