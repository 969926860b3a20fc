"""Figures about a model with their uncertainty: one metric a file, `evaluate` for all of them together."""
