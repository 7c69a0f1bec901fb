"""Activation Beacon: the past of a text compressed into a few activations, and searched."""
