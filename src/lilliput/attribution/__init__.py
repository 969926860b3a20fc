"""What was lost, and where: the original streamed beside the compressed model."""

from lilliput.attribution.attribute import Attribution, attribute, suspects

__all__ = ["Attribution", "attribute", "suspects"]
