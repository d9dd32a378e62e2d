"""The pytest side: options, markers, processes, gates. Never imports torch."""
