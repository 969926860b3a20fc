"""One class over the readers: what a checkpoint holds, as plain weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lilliput.anatomy.token_ids import named_ids
from lilliput.errors import SourceError
from lilliput.parts.linear import LinearSpec
from lilliput.progress import Progress
from lilliput.runtime import caches as caching
from lilliput.runtime.inputs import Rounding
from lilliput.source import scan as scanning
from lilliput.source.gguf_metadata import lean
from lilliput.source.native import Native
from lilliput.source.packed import Packed
from lilliput.source.quantized import LEFT_OVER
from lilliput.source.reader import Entry, Reader
from lilliput.source.vocabulary import BytePairs, byte_pairs, rewritten

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SIDE = (
    "tokenizer*.json", "tokenizer*.model", "tokenizer.model.*", "tiktoken.model", "*.tiktoken", "tekken.json",
    "vocab*.json", "vocab.txt", "vocab.bpe", "merges.txt", "spiece.model", "spm*.model", "sentencepiece*.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
    "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def own_name(name: str) -> str:
    """What to call a model or a text beyond this machine: a file or folder by its own name, an id as it is.

    The folder of a model in the hub's cache is called by its id.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = Path(os.path.abspath(path))
    kind, *words = path.parent.parent.name.split("--")
    if kind == "models" and words and path.parent.name == "snapshots":
        return "/".join(words)
    return path.name or name


@dataclass(frozen=True)
class Stored:
    """One tensor of the files, as a plain weight: shape and dtype as `Source.read` returns it.

    nbytes: what it occupies in the file, scales and other parts included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Source:
    """A checkpoint that is read tensor by tensor. Made by `open_source`.

    model: what the user wrote; folder: where config and tokenizer lie; config: without a quantization_config, since
    weights are read as plain; text_config: the language model's own; raw: config.json as it lies in the folder, empty
    for GGUF; stored: every tensor by its name in the files (for GGUF by its name in transformers), without what
    wrappers put in; notes: what a user should know about this checkpoint; inputs: how linears, by their name in the
    files, round what enters them; caches: how keys and values are stored, as `runtime.caches` has it.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        config: PretrainedConfig,
        reader: Reader,
        packed: Mapping[str, Packed],
        *,
        raw: Mapping[str, Any] | None = None,
        gguf: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        notes: tuple[str, ...] = (),
        inputs: Mapping[str, Rounding] | None = None,
        caches: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.model = model
        self.folder = folder
        self.config = config
        self.text_config: PretrainedConfig = config.get_text_config(decoder=True)
        self.raw: Mapping[str, Any] = raw or {}
        self.quantization = quantization
        self.notes = notes
        self.inputs: Mapping[str, Rounding] = inputs or {}
        self.caches = tuple(dict(x) for x in caches)
        self._reader = reader
        self._packed = packed
        self._gguf = gguf
        self._trust = trust_remote_code
        self._contents: str | None = None
        self._written: Path | None = None
        self._trimmed: _Trimmed | None = None
        used = {part for x in packed.values() for part in x.parts}
        running = {name for entry in self.caches for name in caching.stored([entry])}
        stored = {name: _packed(name, x, reader) for name, x in packed.items()}
        for name, entry in reader.entries.items():
            if name not in used and (name in running or quantization is None or not name.endswith(LEFT_OVER)):
                stored[name] = Stored(name, entry.shape, entry.dtype, entry.nbytes)
        self.stored: Mapping[str, Stored] = stored

    @property
    def name(self) -> str:
        """What the model is called beyond this machine: its hub id, or the own name of its folder or file."""
        return own_name(self.model)

    @property
    def from_gguf(self) -> bool:
        """Whether the weights come from a GGUF file, where types are the file's own and say nothing of the model's."""
        return self._gguf is not None

    def read(self, stored_name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor by its stored name, or its rows [start, stop); contiguous, on the CPU, in `stored[name].dtype`."""
        if stored_name not in self.stored:
            raise SourceError(f"{self.model} has no tensor named {stored_name}.")
        packed = self._packed.get(stored_name)
        if packed is None:
            return self._reader.read(stored_name, rows)
        return packed.decode(self._reader, rows)

    def parts(self, stored_name: str) -> tuple[str, ...]:
        """Names in the files of what a tensor is stored as: its codes first, then scales and the like."""
        packed = self._packed.get(stored_name)
        return (stored_name,) if packed is None else tuple(packed.parts)

    def linear(self, stored_name: str) -> LinearSpec | None:
        """What a tensor of the native layout is packed as; None for other tensors."""
        packed = self._packed.get(stored_name)
        return packed.spec if isinstance(packed, Native) else None

    def packing(self, stored_name: str) -> Packed | None:
        """How a tensor is packed; None for one that is stored as its values."""
        return self._packed.get(stored_name)

    def entry(self, name: str) -> Entry:
        """Shape and dtype of a tensor of the files, by its name of `parts`."""
        return self._reader.entries[name]

    def part(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor of the files as it lies there, by its name of `parts`, or its rows [start, stop)."""
        return self._reader.read(name, rows)

    def part_bytes(self, name: str) -> int:
        """Bytes of a tensor of the files."""
        return self._reader.entries[name].nbytes

    def files(self) -> tuple[Path, ...]:
        """The files that hold weights."""
        return tuple(sorted({x.file for x in self._reader.entries.values()}))

    def file_of(self, stored_name: str) -> Path:
        """The file that holds a tensor."""
        packed = self._packed.get(stored_name)
        return self._reader.entries[stored_name if packed is None else packed.parts[0]].file

    def scan(self, finite: bool = True, progress: Progress | None = None) -> None:
        """Read every byte once, about 16 MB at a time. SourceError names tensor, file and remedy: cut, NaN, inf."""
        self._contents = scanning.scan(self._reader, finite, progress)

    def fingerprint(self) -> str:
        """sha256 (hex) over names, shapes, dtypes, file sizes and contents.

        After `scan` every byte of every weight counts; before it only the first and last rows of each tensor do, so
        that it takes no time. The two are different values: compare fingerprints that were both taken after a scan, or
        both without one.
        """
        contents = self._contents
        head = {
            "tensors": [[n, list(x.shape), str(x.dtype), x.nbytes] for n, x in sorted(self.stored.items())],
            "files": [[x.name, x.stat().st_size] for x in self.files()],
            "contents": ["all", contents]
            if contents
            else ["ends", scanning.sample(self._reader, self._reader.entries)],
        }
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer. Raises SourceError when there is none."""
        try:
            if self._trimmed is not None:
                return AutoTokenizer.from_pretrained(str(self._trimmed.folder))
            if self._gguf is not None:
                with lean():
                    return AutoTokenizer.from_pretrained(str(self.folder), gguf_file=self._gguf)
            return AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=self._trust)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, json.JSONDecodeError) as error:
            text = str(error).strip().splitlines()
            raise SourceError(
                f"{self.model} has no tokenizer that transformers can read ({text[0] if text else type(error).__name__}"
                f"). Copy tokenizer.json and tokenizer_config.json of the original model into {self.folder}."
            ) from error

    def byte_pairs(self) -> BytePairs:
        """The tokenizer's tokens and merges. Raises PlanError for one that is no BPE over bytes."""
        return byte_pairs(self.side_files(), self.model)

    def named_ids(self) -> set[int]:
        """The ids of single tokens that the configs name."""
        generation = self.side_files().get("generation_config.json")
        entries = {} if generation is None else json.loads(generation.read_text(encoding="utf-8"))
        return named_ids(self.text_config.to_dict()) | named_ids(entries)

    def trimmed(self, kept: Sequence[int]) -> Source:
        """The same checkpoint with a tokenizer of which only these token ids stay (ascending), numbered from 0 on; its
        weights are read as before. Raises PlanError for a tokenizer that is no BPE over bytes."""
        other = copy.copy(self)
        other._trimmed = _Trimmed(self, kept)
        return other

    def adapters(self) -> list[str]:
        """The subfolders that hold an adapter for this checkpoint, by their names."""
        return sorted(x.parent.name for x in self.folder.glob("*/adapter_config.json"))

    def side_files(self) -> dict[str, Path]:
        """Name in the folder -> file to carry over: tokenizer, chat templates, generation config, licence. No weights,
        no code.

        A GGUF file holds its tokenizer inside: it is written to a folder that lasts as long as this object. Raises
        SourceError where there is none.
        """
        if self._trimmed is not None:
            return dict(self._trimmed.files)
        if self._gguf is not None:
            if self._written is None:
                folder = Path(tempfile.mkdtemp(prefix="lilliput-tokenizer-"))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self.tokenizer().save_pretrained(folder)
                self._written = folder
            files = {x for x in self._written.rglob("*") if x.is_file()}
            return {x.relative_to(self._written).as_posix(): x for x in sorted(files)}
        files = {x for pattern in SIDE for x in self.folder.glob(pattern) if x.is_file() and x.suffix != ".py"}
        return {x.relative_to(self.folder).as_posix(): x for x in sorted(files)}


class _Trimmed:
    """A folder with the files of a tokenizer that has lost tokens; it lasts as long as this object."""

    def __init__(self, source: Source, kept: Sequence[int]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lilliput-tokenizer-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        before = source.side_files()
        texts = rewritten(before, kept, int(source.text_config.vocab_size), source.model)
        self.files = {name: path for name, path in before.items() if texts.get(name, "") is not None}
        for name, path in self.files.items():
            place = self.folder / name
            place.parent.mkdir(exist_ok=True)
            if (text := texts.get(name)) is not None:
                place.write_text(text, encoding="utf-8")
                self.files[name] = place
            else:
                shutil.copyfile(path, place)
        if (source.folder / "config.json").is_file():  # which tells transformers the class where nothing else does
            shutil.copyfile(source.folder / "config.json", self.folder / "config.json")


def _packed(name: str, packed: Packed, reader: Reader) -> Stored:
    extra = f"{name.removesuffix('.weight')}.weight_shape"
    parts = {*packed.parts, *([extra] if extra in reader.entries else [])}
    return Stored(name, packed.shape, packed.dtype, sum(reader.entries[x].nbytes for x in parts))
