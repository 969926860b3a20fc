"""The tokenizer in a GGUF file's metadata: tokens, their types, merges or scores, special ids, the chat template.

llama.cpp has two kinds: "gpt2", byte-level BPE by merges behind a splitting rule that it knows by name, and "llama",
SentencePiece's merging by scores. The rule's name follows from what tokenizer.json says of the splitting itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, GGUFWriter, LlamaFileType, TokenType

from lilliput.errors import PlanError, SourceError
from lilliput.export.convert import gguf_model
from lilliput.source.gguf_metadata import Field, Metadata, Strings
from lilliput.source.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WRITTEN = ("general.file_type", "general.quantization_version", "general.architecture")
_PHI = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))  # which llama.cpp looks for in models of that name
_SPECIAL = ("bos", "eos", "unk", "pad", "sep", "mask")


def described(source: Source, name: str, like: Path | None, file_type: LlamaFileType) -> GGUFWriter:
    """A writer that has all metadata of the model `name`: those of `source`, or of the file `like` as they are."""
    config = source.text_config
    writer = GGUFWriter(None, gguf_model.KNOWN[config.model_type].name)
    if like is None:
        writer.add_name(general_name(name, source.tokenizer()))
        gguf_model.add_hyperparameters(writer, config)
        add(writer, source)
    else:
        carry_over(writer, like, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    return writer


def add(writer: GGUFWriter, source: Source) -> None:
    """Write the tokenizer of a folder. Raises PlanError for one that llama.cpp has no kind or no splitting rule for,
    SourceError where there is none."""
    tokenizer = source.tokenizer()
    plain = _plain(source)
    model = plain["model"]
    if model["type"] != "BPE":
        raise PlanError(f"a tokenizer of type {model['type']} is not carried over: {_REMEDY}")
    pieces = bool(model.get("byte_fallback"))
    vocabulary: dict[int, str] = {i: word for word, i in model["vocab"].items()}
    added = {x["id"]: x for x in plain.get("added_tokens", [])}
    vocabulary |= {i: x["content"] for i, x in added.items()}
    count = max(source.text_config.vocab_size, max(vocabulary) + 1)
    if count > source.text_config.vocab_size:
        raise PlanError(f"the tokenizer has {count} tokens and the model {source.text_config.vocab_size}: {_REMEDY}")
    merges = [x.split(" ", 1) if isinstance(x, str) else x for x in model["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _rule(plain.get("pre_tokenizer")))
    writer.add_token_list([vocabulary.get(i, f"[PAD{i}]") for i in range(count)])
    writer.add_token_types([_type(i, vocabulary, added, model.get("unk_token"), pieces) for i in range(count)])
    if pieces:
        rank: dict[str, int] = {}
        for i, pair in enumerate(merges):
            rank.setdefault("".join(pair), i)
        writer.add_token_scores([-float(rank.get(vocabulary.get(i, ""), len(merges))) for i in range(count)])
        writer.add_add_space_prefix(_prefixed(plain))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, tokenizer)


def general_name(name: str, tokenizer: Any) -> str:
    """The model's name in the file, which llama.cpp reads meaning into: where phi-3 is a part of it, spaces after a
    marker are dropped, as tokenizers of Phi-3 do, and four tokens of theirs must be there."""
    strips = any(x.rstrip for x in tokenizer.added_tokens_decoder.values())
    known = tokenizer.get_vocab().keys() >= _PHI
    if re.search("phi-?3", name, re.IGNORECASE):
        return name if strips and known else re.sub("(?i)(phi-?)3", r"\1 3", name)
    return f"{name} (phi-3)" if strips and known else name


_REMEDY = "leave the model as a folder, or give a GGUF file of it with --like"


def _plain(source: Source) -> dict[str, Any]:
    """tokenizer.json, as it lies in the folder or as transformers writes it."""
    tokenizer = source.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(f"the tokenizer of {source.model} has no tokenizer.json: {_REMEDY}")
    plain: dict[str, Any] = json.loads(backend.to_str())
    return plain


def _type(
    i: int, vocabulary: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], unknown: str | None, pieces: bool
) -> TokenType:
    if i not in vocabulary:
        return TokenType.UNUSED
    word = vocabulary[i]
    if pieces and word == unknown:
        return TokenType.UNKNOWN
    if i in added:
        return TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
    if pieces and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _rule(said: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of a splitting rule of byte-level BPE. Raises PlanError for one that has none here."""
    steps: Sequence[Mapping[str, Any]] = [] if said is None else said.get("pretokenizers", [said])
    kinds = [x["type"] for x in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex", "")
        if r"\p{Lu}" in pattern:
            return "tekken" if r"\p{N}|" in pattern else "gpt-4o"
        if r"\p{N}{1,3}" in pattern:
            return "llama-bpe"
        if r"|\p{N}|" in pattern:
            return "qwen35" if r"\p{M}" in pattern else "qwen2"
    raise PlanError(f"its tokenizer splits text by {' and '.join(kinds) or 'nothing'}, no rule with a name: {_REMEDY}")


def _prefixed(plain: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    text = json.dumps([plain.get("normalizer"), plain.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for name in _SPECIAL:
        value = getattr(tokenizer, f"{name}_token_id", None)
        if value is not None:
            writer.add_uint32(f"tokenizer.ggml.{_LONG.get(name, name)}_token_id", int(value))
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if template:
        writer.add_chat_template(
            template if isinstance(template, str) else [{"name": k, "template": v} for k, v in template.items()]
        )


_LONG = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # as llama.cpp spells them


def carry_over(writer: GGUFWriter, like: Path, config: PretrainedConfig) -> None:
    """Write the metadata of another GGUF file of the same model, tokenizer and all, as they are.

    Raises PlanError where the file is of another kind of model, or of one with another width, depth or vocabulary.
    """
    if not like.is_file():
        raise SourceError(f"there is no file {like}: check the path")
    fields = Metadata(like).fields
    values = {key: _value(x) for key, x in fields.items()}
    name = values.get("general.architecture")
    if name != writer.arch:
        raise PlanError(f"{like} is of a {name} model and the folder of a {writer.arch} one: give a file of the same")
    wanted = {"block_count": config.num_hidden_layers, "embedding_length": config.hidden_size}
    for key, value in wanted.items():
        if values.get(f"{name}.{key}") != value:
            raise PlanError(
                f"{like} has {key} {values.get(f'{name}.{key}')} and the folder {value}: give the same model"
            )
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > config.vocab_size:
        raise PlanError(f"{like} has {len(tokens)} tokens and the folder {config.vocab_size}: give the same model")
    for key, x in fields.items():
        if key in _WRITTEN or key.startswith(("split.", "GGUF.")):
            continue
        kind = GGUFValueType(x.types[0])
        inner = GGUFValueType(x.types[1]) if kind is GGUFValueType.ARRAY else None
        if inner is not None and not values[key]:
            continue  # the writer has no empty arrays
        writer.add_key_value(key, values[key], kind, sub_type=inner)


def _value(x: Field) -> Any:
    """The plain value of a field."""
    if isinstance(x.parts, Strings):
        items: list[Any] = [str(part, "utf-8", errors="replace") for part in x.parts]
    else:
        items = x.parts.reshape(-1).tolist()
    return items if x.types[0] == GGUFValueType.ARRAY else items[0]
