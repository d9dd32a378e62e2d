"""Plumbing between the processes and the operating system; it imports neither torch nor pytest."""
