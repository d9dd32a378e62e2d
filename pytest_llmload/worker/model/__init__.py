"""The loaded model: its tensors, and how it is run."""
