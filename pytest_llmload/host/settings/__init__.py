"""The run's settings: command-line options, ini values, models and adapters."""
