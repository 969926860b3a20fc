"""A model that reads its input piece by piece: what it keeps of the tokens before is called differently by releases of
transformers and by architectures, and is found here once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lilliput.anatomy.cached import NAMES, argument
from lilliput.errors import SourceError


class CachedModel:
    """A causal language model with what it keeps of the tokens that it has read (keys and values, states).

    model: called with `input_ids` and `use_cache`; its class says under which name it takes a cache, its outputs say
    under which one they give it. Raises SourceError for a model that takes none.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._argument = argument(model.forward)
        self.cache: Any = None
        if self._argument is None:
            raise self._refusal()

    def start(self, ids: Tensor, **options: Any) -> Any:
        """Output of transformers for the first tokens, int64 [batch, tokens]; what was kept of others is dropped.

        options: passed on. Raises SourceError for a model whose output has no cache.
        """
        self.cache = None
        return self._keep(self.model(input_ids=ids, use_cache=True, **options))

    def step(self, ids: Tensor, **options: Any) -> Any:
        """Output for the tokens that come next, int64 [batch, tokens], after `start`."""
        return self._keep(self.model(input_ids=ids, use_cache=True, **{str(self._argument): self.cache}, **options))

    def _keep(self, out: Any) -> Any:
        # By its keys: asking an output of transformers 5.24 for an old name warns even where it has none.
        keys = set(out.keys())
        self.cache = next((out[name] for name in NAMES if name in keys), None)
        if self.cache is None:
            raise self._refusal()
        return out

    def _refusal(self) -> SourceError:
        return SourceError(
            f"{type(self.model).__name__} cannot go on from tokens that it has read, so it cannot write text token by "
            "token: take a decoder for speeds, and text of your own (--data) for calibration."
        )
