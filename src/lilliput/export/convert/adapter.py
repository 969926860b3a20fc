"""A quantized base and a LoRA adapter: what linears of codes and factors of low rank become for vLLM and peft.

OUT/base is a folder of compressed-tensors with the codes alone; OUT/adapter is what peft reads: adapter_config.json,
and adapter_model.safetensors with `lora_A` [rank, in] and `lora_B` [out, rank] of each linear, so that an engine
computes base(x) + lora_B lora_A x. The alpha of each linear is its rank, which makes the scaling 1.

Paper of the layout: Hu et al. 2021, arXiv 2106.09685 (LoRA).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import module_name, skeleton, text_prefix
from lilliput.export.convert import Converted, Wanted, compressed_tensors, folder
from lilliput.export.convert.coded import first_form, plain
from lilliput.export.convert.folder import Item
from lilliput.export.outcome import Outcome
from lilliput.parts.dense import DenseSpec
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import PartSpec, below
from lilliput.parts.scheme import Scheme, prefix
from lilliput.source.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class AdapterConverter:
    """Writes a base with a LoRA adapter."""

    name = ADAPTER

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        for x in outcomes:
            reason = _unfit(x)
            if reason is not None:
                return reason
        if not any(_factors(x) for x in outcomes):
            return (
                "none of its linears has a part of low rank, so there is nothing for an adapter. Nearest: "
                "compressed-tensors, or a recipe with eora, lorc or loftq"
            )
        return compressed_tensors.LAYOUT.refuse(_base(outcomes), config)

    def convert(self, source_folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name)
        source, found = folder.admitted(source_folder, out, self)
        adapted = {name: x for name, x in zip(_modules(found, source.config), found, strict=True) if _factors(x)}
        with folder.staged(out) as place:
            (place / BASE).mkdir()
            (place / ADAPTER).mkdir()
            types, notes = compressed_tensors.write(place / BASE, source, _base(found))
            items = [Item(_layout(name, x), lambda n=name, x=x: _tensors(source, n, x)) for name, x in adapted.items()]  # type: ignore[misc]
            rows = folder.write_weights(place / ADAPTER / "adapter_model.safetensors", items, {"format": "pt"})
            _write_json(place / ADAPTER / "adapter_config.json", _config(adapted))
            (place / "README.md").write_text(_README, encoding="utf-8")
        for row in rows:
            types[row.dtype] += folder.nbytes(row)
        return folder.converted(out, self.name, types, notes)


_README = f"""# A quantized base and a LoRA adapter

`{BASE}` holds integer codes (compressed-tensors), `{ADAPTER}` the parts of low rank that go with them: the model is
both together, and the base alone is less exact.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{BASE}"), "{ADAPTER}")
```

```
vllm serve {BASE} --enable-lora --max-lora-rank RANK --lora-modules model={ADAPTER}
```

RANK: the largest of `r` and `rank_pattern` in `{ADAPTER}/adapter_config.json`, or the next that vLLM knows.
"""


def _unfit(x: Outcome) -> str | None:
    """Why a linear is no codes with an adapter."""
    if plain(x.scheme):
        return None
    apart = bool(x.scheme.inputs or x.scheme.outputs or x.scheme.activation is not None)
    if apart or first_form(x.scheme) is None or len(_factors(x)) != len(x.scheme.parts) - 1:
        return (
            f"'{x.name}' is {x.scheme.describe()}, and an adapter goes with integers and parts of low rank alone. "
            "Nearest: gptq, then eora, lorc or loftq, with format int; export 'lilliput' holds what it is"
        )
    if _factors(x) and (x.table or x.embedding or x.expert or x.transposed):
        return (
            f"'{x.name}' is an embedding, a head, an expert or stored as [in, out], and has a part of low rank: "
            "adapters are written for the linears of blocks alone. Nearest: leave it out of that step"
        )
    return None


def _factors(x: Outcome) -> tuple[LowRankSpec, ...]:
    """The parts of low rank after the codes."""
    return tuple(part for part in x.scheme.parts[1:] if isinstance(part, LowRankSpec))


def _base(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The same linears with their codes alone."""
    found = compressed_tensors.values(outcomes)
    return tuple(replace(x, scheme=Scheme(x.scheme.parts[:1])) for x in found)


def _modules(outcomes: Sequence[Outcome], config: PretrainedConfig) -> list[str]:
    """Where each linear sits in the engine's model."""
    model = skeleton(config)
    modules, inner = dict(model.named_modules()), text_prefix(model, config)
    return [module_name(x.name, modules, inner) for x in outcomes]


def _rank(x: Outcome) -> int:
    return sum(part.rank for part in _factors(x))


def _kind(spec: PartSpec) -> torch.dtype:
    """The type that holds a factor as it is."""
    return spec.dtype if isinstance(spec, DenseSpec) else torch.float32


def _dtype(x: Outcome) -> torch.dtype:
    """The type that holds all factors of a linear as they are."""
    kinds = {_kind(side) for part in _factors(x) for side in (part.left, part.right)}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _layout(name: str, x: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    kind, rank = _dtype(x), _rank(x)
    return {
        f"base_model.model.{name}.lora_A.weight": (kind, (rank, x.in_features)),
        f"base_model.model.{name}.lora_B.weight": (kind, (x.out_features, rank)),
    }


def _tensors(source: Source, name: str, x: Outcome) -> Iterator[tuple[str, Tensor]]:
    left, right = [], []
    for i, part in enumerate(x.scheme.parts):
        if isinstance(part, LowRankSpec):
            get = below(source.part, f"{x.stored}.weight{prefix(i)}")
            a, b = part.factors(get, x.out_features, x.in_features, torch.empty(0))
            left.append(a)
            right.append(b)
    yield f"base_model.model.{name}.lora_A.weight", torch.cat(right).to(_dtype(x))
    yield f"base_model.model.{name}.lora_B.weight", torch.cat(left, 1).to(_dtype(x))


def _config(adapted: Mapping[str, Outcome]) -> dict[str, Any]:
    """adapter_config.json. Linears are named in full: no other one of the same last name is adapted."""
    ranks = {name: _rank(x) for name, x in adapted.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CONVERTER = AdapterConverter()
