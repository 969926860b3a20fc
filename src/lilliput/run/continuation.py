"""A model's greedy continuation of a prompt, as transformers' `generate` gives it for the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.data.rows import chat
from lilliput.data.tokens import check_ids
from lilliput.errors import DataError, SourceError
from lilliput.model.stored import Model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SETTINGS = "generation_config.json"
# What a folder may ask for and greedy decoding has no use of: to say so keeps transformers from warning about it.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
_UNUSED = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping",
    "length_penalty", "num_beam_groups", "diversity_penalty", "penalty_alpha", "max_length",
)  # fmt: skip


def _ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the prompt is not Unicode text: give it in UTF-8") from None
    if not prompt.strip():
        raise DataError("the prompt is empty: give the model something to continue")
    text = prompt
    if tokenizer.chat_template:
        text = chat([{"role": "user", "content": prompt}], tokenizer, "the prompt", answer=True)
    # The template writes all special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"]
    if not ids:
        raise DataError("the tokenizer finds no token in the prompt: give the model something to continue")
    return ids


def settings(folder: Path, own: GenerationConfig) -> GenerationConfig:
    """How transformers would generate with the model in `folder`: its generation_config.json, else `own`, that of the
    model's config. Raises SourceError for a file that cannot be read."""
    from transformers import GenerationConfig

    if not (folder / SETTINGS).is_file():
        return own
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{folder / SETTINGS} cannot be read ({first}): correct it, or move it away") from None
    return config


@torch.no_grad()
def continuation(model: Model, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt by at most `new_tokens` tokens, through the chat template where there is one.

    Everything in generation_config.json that a greedy choice depends on counts: where to stop, penalties, tokens that
    are forced, banned or suppressed. The whole model is loaded. Raises DataError for a prompt that is empty, holds a
    token beyond the embedding, or leaves no room for the answer.
    """
    tokenizer = model.source.tokenizer()
    ids = _ids(prompt, tokenizer)
    check_ids(ids, tokenizer, model.vocabulary, "the prompt")
    if model.positions is not None and len(ids) + new_tokens > model.positions:
        room = model.positions - len(ids)
        remedy = f"ask for at most {room} new ones, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise DataError(
            f"a prompt of {len(ids)} tokens and {new_tokens} new ones are more than the model's "
            f"{model.positions} positions: {remedy}"
        )
    whole: Any = model.skeleton.model
    config: Any = settings(model.source.folder, whole.generation_config)
    for name in _UNUSED:
        if hasattr(config, name):
            setattr(config, name, None)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops: dict[str, Any] = {"tokenizer": tokenizer} if config.stop_strings else {}
    model.load(model.skeleton.shapes)
    try:
        whole.generation_config = config
        inputs = torch.tensor([ids], device=model.skeleton.device)
        out = whole.eval().generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, **_GREEDY, **stops
        )
    finally:
        model.unload(model.skeleton.shapes)
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text.strip()
