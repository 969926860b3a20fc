"""The version of the package, which plans and reports name."""

__version__ = "0.1.0"
