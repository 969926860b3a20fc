"""A tokenizer of byte pairs (BPE over bytes) with fewer tokens: what a token is merged from, and its files.

A token is made from its bytes by merges, the earliest in the list first. Where every token that such a merge sequence
passes is there, it is taken from a shorter list of merges as well: the first merge that applies in the long list is
in the short one, and none that is in the short one comes before it. So a tokenizer with the tokens that a text uses,
those on the way to them and the merges between these cuts the text as before. Bytes are tokens of their own, so that
any other text has tokens too, only more of them, and is read back as by the longer list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from lilliput.anatomy.token_ids import numbering, renumbered
from lilliput.errors import PlanError

_FILE = "tokenizer.json"
# The same tokenizer in forms that transformers does not read where there is a tokenizer.json.
_OTHER_FORMS = (
    "tokenizer*.model", "tokenizer.model.*", "tiktoken.model", "*.tiktoken", "tekken.json", "vocab.txt", "vocab.bpe",
    "spiece.model", "spm*.model", "sentencepiece*.model",
)  # fmt: skip
_ABSENT = {chr(x) for x in (0xC0, 0xC1, *range(0xF5, 0x100))}  # bytes that no UTF-8 has; they stand for themselves
_SPECIAL_NAMES = ("TemplateProcessing", "RobertaProcessing", "BertProcessing")


@dataclass(frozen=True)
class BytePairs:
    """A tokenizer.json whose model is BPE over bytes. whole: its entries; tokens: ids by token; merges: their order;
    added: ids by token that the text is searched for before it is cut."""

    whole: Mapping[str, Any]
    tokens: Mapping[str, int]
    merges: Mapping[tuple[str, str], int]
    added: Mapping[str, int]

    @property
    def bases(self) -> frozenset[int]:
        """The tokens that always stay: those of single bytes, and the added ones."""
        return frozenset(self.tokens[x] for x in ByteLevel.alphabet() if x in self.tokens) | frozenset(
            self.added.values()
        )

    def ids(self) -> set[int]:
        """All ids that have a token."""
        return {*self.tokens.values(), *self.added.values()}

    def needed(self, used: Iterable[int]) -> set[int]:
        """The ids that the tokenizer needs to give those of `used`: themselves and all on the way to them."""
        words = {number: token for token, number in self.tokens.items()}
        found = set(self.bases)
        for number in sorted(set(used) - found):
            found.add(number)
            if number in words:
                found |= {self.tokens[x] for x in self._passed(words[number])}
        return found

    def filled(self, kept: Iterable[int], count: int) -> set[int]:
        """`kept` with the tokens of the earliest merges added until there are `count`, or no more tokens."""
        found = set(kept)
        order = [self.tokens[a + b] for a, b in sorted(self.merges, key=lambda x: self.merges[x])]
        for number in (*order, *sorted(self.tokens.values())):
            if len(found) >= count:
                break
            found.add(number)
        return found

    def _passed(self, token: str) -> set[str]:
        """What is merged on the way from the bytes of a token to it; nothing where merges do not lead there."""
        parts, passed = list(token), set[str]()
        while len(parts) > 1:
            ranks = [self.merges.get(pair, len(self.merges)) for pair in pairwise(parts)]
            first = min(ranks)
            if first == len(self.merges):
                return set()  # a token that the tokenizer takes whole or never
            place = ranks.index(first)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            passed.add(parts[place])
        return passed


def byte_pairs(side_files: Mapping[str, Path], model: str) -> BytePairs:
    """The tokenizer among a model's files. Raises PlanError, which names the model, unless it is BPE over bytes."""
    if _FILE not in side_files:
        raise PlanError(
            f"{model} has no {_FILE}, and tokens leave only a tokenizer that is written there: save it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or leave the step out"
        )
    whole = _json(side_files[_FILE])
    inner = whole.get("model") or {}
    why = _unlike(whole, inner)
    if why is not None:
        raise PlanError(
            f"the tokenizer of {model} is no BPE over bytes ({why}): without some of its tokens it could not write "
            "all text. Leave the step out"
        )
    pairs = [(a, b) for a, b in (x.split(" ") if isinstance(x, str) else x for x in inner["merges"])]
    merges = {pair: number for number, pair in enumerate(pairs)}
    added = {x["content"]: int(x["id"]) for x in whole.get("added_tokens") or ()}
    return BytePairs(whole, inner["vocab"], merges, added)


def _unlike(whole: Mapping[str, Any], inner: Mapping[str, Any]) -> str | None:
    """Why a tokenizer is not BPE over bytes; None where it is."""
    if inner.get("type") != "BPE":
        return f"its model is {inner.get('type')}"
    if inner.get("byte_fallback"):
        return "it is made of characters and falls back to bytes"
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if inner.get(key):
            return f"it has {key}"
    kinds = [{x.get("type") for x in _parts(whole.get(key))} for key in ("pre_tokenizer", "decoder")]
    if not all("ByteLevel" in x for x in kinds):
        return "bytes are not what it cuts"
    # Rare bytes may have no token, and text with them is lost before as after, unless words are tokens without merges.
    missing = {x for x in ByteLevel.alphabet() if x not in inner["vocab"]} - _ABSENT
    if any(x.isascii() for x in missing) or (missing and inner.get("ignore_merges")):
        return f"it has no token for {len(missing)} of the bytes"
    for part in _parts(whole.get("post_processor")):
        if part.get("type") not in (*_SPECIAL_NAMES, "ByteLevel", "Sequence"):
            return f"{part.get('type')} follows it"
    return None


def _parts(entry: Any) -> Iterator[dict[str, Any]]:
    """An entry of a tokenizer, and those of which it is a sequence."""
    if isinstance(entry, dict):
        yield entry
        for key in ("pretokenizers", "processors", "decoders"):
            for part in entry.get(key) or ():
                yield from _parts(part)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rewritten(side_files: Mapping[str, Path], kept: Sequence[int], rows: int, model: str) -> dict[str, str | None]:
    """By name, the text of the files that change where only the tokens `kept` stay, in new order from 0 on; None for a
    file that is to be left out. rows: of the embedding before."""
    pairs, number = byte_pairs(side_files, model), numbering(kept)
    whole = _tokenizer(pairs, number)
    texts: dict[str, str | None] = {_FILE: _text(whole)}
    for name, path in side_files.items():
        if any(fnmatch(name, x) for x in _OTHER_FORMS):
            texts[name] = None
        elif name == "vocab.json":
            texts[name] = _text(whole["model"]["vocab"])
        elif name == "merges.txt":
            texts[name] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in _merges(pairs, number))
        elif name == "added_tokens.json":
            texts[name] = _text({token: number[old] for token, old in _json(path).items()})
        elif name == "tokenizer_config.json":
            config = _json(path)
            if decoder := config.get("added_tokens_decoder"):
                config["added_tokens_decoder"] = {str(number[int(old)]): x for old, x in decoder.items()}
            texts[name] = _text(config)
        elif name == "generation_config.json":
            config = _json(path)
            texts[name] = _text(config | renumbered(config, number, rows, f"{name} of {model}"))
    return texts


def _tokenizer(pairs: BytePairs, number: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens that stay."""
    whole: dict[str, Any] = json.loads(json.dumps(pairs.whole))
    inner = whole["model"]
    joined = not inner["merges"] or isinstance(inner["merges"][0], str)
    inner["merges"] = [f"{a} {b}" if joined else [a, b] for a, b in _merges(pairs, number)]
    kept = [(token, number[old]) for token, old in pairs.tokens.items() if old in number]
    inner["vocab"] = dict(sorted(kept, key=lambda x: x[1]))
    if inner.get("unk_token") is not None and inner["unk_token"] not in inner["vocab"]:
        inner["unk_token"] = None  # every byte has a token, so it is never given
    for token in whole.get("added_tokens") or ():
        token["id"] = number[token["id"]]
    if isinstance(whole.get("padding"), dict):
        whole["padding"]["pad_id"] = number[whole["padding"]["pad_id"]]
    for part in _parts(whole.get("post_processor")):
        for special in (part.get("special_tokens") or {}).values():
            special["ids"] = [number[x] for x in special["ids"]]
        for key in ("sep", "cls"):
            if key in part:
                part[key] = [part[key][0], number[part[key][1]]]
    return whole


def _merges(pairs: BytePairs, number: Mapping[int, int]) -> list[tuple[str, str]]:
    """The merges between tokens that stay, in order."""

    def stays(token: str) -> bool:
        return pairs.tokens.get(token) in number

    order = sorted(pairs.merges, key=lambda x: pairs.merges[x])
    return [(a, b) for a, b in order if stays(a) and stays(b) and stays(a + b)]


def _text(entries: Any) -> str:
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
