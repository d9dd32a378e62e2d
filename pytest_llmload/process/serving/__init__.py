"""Loads by a model server: the server's process, its answers, and measurements from outside."""
