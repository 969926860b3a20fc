"""Prompt tuning: embeddings of n virtual tokens in front of the text are trained, and nothing else.

Paper: Lester et al. 2021, arXiv 2104.08691. Made with peft. Cost: n hidden numbers; n more positions for every text.
Limits: text in one piece, no compressed cache; the model does not begin at what it was, unlike LoRA, and small models
gain little.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.target import Target
from lilliput.training import borrowed
from lilliput.training.prompted import Prompted
from lilliput.verbs.adapt import Adapt, Adapter, AdapterOptions, AdaptIO


class Options(AdapterOptions):
    """See the module's docstring."""

    length: int = Field(16, ge=1, description="n, virtual tokens in front of the text")
    start: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="embeddings of tokens drawn from the vocabulary, or random numbers"
    )


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Embeddings that are drawn."""
    library = borrowed.peft()
    config = library.PromptTuningConfig(
        num_virtual_tokens=o.length,
        prompt_tuning_init="SAMPLE_VOCAB" if o.start == "vocabulary" else "RANDOM",
        task_type="CAUSAL_LM",
    )
    return Prompted(borrowed.wrapped(io.skeleton.model, config))


def fixed(hidden: int, blocks: int, o: Options) -> int:
    """The embeddings."""
    return o.length * hidden


METHOD = Adapt(
    paper="Lester et al. 2021, arXiv 2104.08691",
    options=Options,
    covers={"prompt-tuning": [{"method": "prompt-tuning"}]},
    attach=attach,
    fixed=fixed,
    adds=lambda o: o.length,
    covering=False,
)
