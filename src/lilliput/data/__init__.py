"""Calibration and evaluation text as token windows: local files, hub data sets, Python's own docs, the model itself."""

from lilliput.data.generate import generate_tokens
from lilliput.data.load import load_tokens
from lilliput.data.overlap import overlap
from lilliput.data.tokens import Tokens

__all__ = ["Tokens", "generate_tokens", "load_tokens", "overlap"]
