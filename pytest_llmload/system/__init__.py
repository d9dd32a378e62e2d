"""Plumbing between the processes and the operating system; imports no torch and no pytest."""
