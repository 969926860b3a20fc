"""Checkpoints: safetensors folders, hub ids and GGUF files, read one tensor at a time.

Nothing is unpickled, no code of the model's folder runs unless the user says so, and no file stays mapped.
"""

from __future__ import annotations

from lilliput.source.open import open_source
from lilliput.source.source import Source, Stored

__all__ = ["Source", "Stored", "open_source"]
