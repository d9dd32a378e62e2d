"""Loads as the pytest process sees them: processes, GPUs, and the shared `llm`."""
