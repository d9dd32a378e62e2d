"""What tests assert about a load: baselines, limits, requirements."""
