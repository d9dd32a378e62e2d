"""Integrate with other plugins; each module is imported only if its plugin is present."""
