"""Find causes that stop a load before it starts: the checks of ``llmload doctor`` and of the plugin's pre-flight."""
