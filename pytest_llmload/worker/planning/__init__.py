"""Predict what a load will hold on which device, before any weight is read."""
