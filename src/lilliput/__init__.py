"""Lilliput compresses Hugging Face causal language models, block by block, and proves what it cost."""

from lilliput.errors import LilliputError

__version__ = "0.1.0"
__all__ = ["LilliputError", "__version__"]
