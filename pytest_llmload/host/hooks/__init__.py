"""The bodies of the plugin's hooks and fixtures."""
