"""The load's own process: the warm server it is forked from, its session, and the measurement of one load."""
