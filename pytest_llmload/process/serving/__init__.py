"""Loads that are a server's: its process, what it answers, and what can be seen of it from outside."""
