"""Folds: changes of weights after which the model computes the same function."""
