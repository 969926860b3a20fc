"""Recipes: what the user wants, as YAML that a person can read or as Python objects."""

from lilliput.recipe.load import described, load, named, parse, to_yaml, with_settings
from lilliput.recipe.schema import Recipe, Step, Where

__all__ = ["Recipe", "Step", "Where", "described", "load", "named", "parse", "to_yaml", "with_settings"]
