"""What was lost, and where: the original streamed beside the compressed model."""

from lilliput.attribution.attribute import Attribution, attribute

__all__ = ["Attribution", "attribute"]
