"""The load's own process: the warm server that forks it, its session, and the measurement of one load."""
