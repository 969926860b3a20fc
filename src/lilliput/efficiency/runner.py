"""A model in memory that runs a prompt and goes on from it: what speed and peak memory are measured of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lilliput.efficiency.devices import synchronize
from lilliput.runtime.cache import CachedModel
from lilliput.runtime.load import load


class Runner:
    """A model in memory with one prompt int64 [batch, prompt]; `decode` goes on for `new` tokens from the last
    prefill."""

    def __init__(
        self,
        folder: str | Path,
        *,
        prompt: int,
        new: int,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.new = new
        self.model: Any = load(folder, dtype=dtype).to(device)
        self.dtype: torch.dtype = self.model.dtype
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (batch, prompt + new), generator=generator).to(device)
        self.prompt = prompt
        last_only = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
        self._reader = CachedModel(self.model)

    def prefill(self) -> None:
        """Run the prompt and keep its cache; returns when the device has finished."""
        with torch.inference_mode():
            self._reader.start(self.ids[:, : self.prompt], **self._options)
        synchronize(self.device)

    def decode(self, lap: Callable[[], None] = lambda: None) -> None:
        """Run the next `new` tokens one by one; `lap` is called when the device has finished one."""
        with torch.inference_mode():
            for i in range(self.prompt, self.prompt + self.new):
                self._reader.step(self.ids[:, i : i + 1], **self._options)
                synchronize(self.device)
                lap()
