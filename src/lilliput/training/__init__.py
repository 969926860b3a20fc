"""Optimizer loops."""
