"""Lilliput compresses Hugging Face causal language models, block by block, and proves what it cost."""

__version__ = "0.1.0"

from lilliput.api import compress, evaluate, generate, inspect, load, plan, verify
from lilliput.compression import Compression
from lilliput.errors import LilliputError
from lilliput.memory import set_base
from lilliput.recipe import Recipe, Step, Target, Where
from lilliput.runtime import register

__all__ = [
    "Compression",
    "LilliputError",
    "Recipe",
    "Step",
    "Target",
    "Where",
    "__version__",
    "compress",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "plan",
    "verify",
]

register()
set_base()
