"""Loads in several processes: the load's process starts them, and each holds one rank's shard."""
