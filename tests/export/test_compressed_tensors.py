"""The compressed-tensors layout: exact description, what is refused and why, and which linears the config names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import Gemma3Config, GPT2Config, LlamaConfig

from lilliput import export
from lilliput.errors import PlanError
from lilliput.export import Exporter
from lilliput.export.compressed_tensors import CompressedTensors, exact_targets
from lilliput.export.outcome import Outcome, largest_group
from lilliput.formats.bits import unpack_words
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"


def outcome(name: str = UP, fmt: IntegerFormat | None = None, **more: object) -> Outcome:
    shape = {UP: (96, 64), DOWN: (64, 96), HEAD: (32, 64)}.get(name, (96, 64))
    plain: dict[str, object] = {"name": name, "stored": name, "dtype": torch.float32} | more
    return Outcome(out_features=shape[0], in_features=shape[1], scheme=quantized(fmt), **plain)  # type: ignore[arg-type]


def int4(group: int = 32, symmetric: bool = True, **more: object) -> IntegerFormat:
    return IntegerFormat(4, symmetric, group, **more)  # type: ignore[arg-type]


def layer_of(x: Outcome) -> Layer:
    weight = torch.randn(x.out_features, x.in_features, generator=torch.Generator().manual_seed(3))
    layer = Layer(x.name, weight)
    if x.format is None:
        return layer
    grid = x.format.fit(weight)
    return layer.with_part(QuantizedPart(x.format, x.format.encode(weight, grid), grid))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1, 0])
def test_packs_what_it_describes(bits: int, symmetric: bool, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.export.integers.CHUNK", 700)  # several pieces
    x = outcome(fmt=IntegerFormat(bits, symmetric, group, torch.bfloat16))
    layer = layer_of(x)
    tensors = CompressedTensors().pack(x, layer)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == CompressedTensors().describe(x)
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    codes = unpack_words(tensors[f"{UP}.weight_packed"], bits, 64)
    assert torch.equal(codes, part.codes)
    if not symmetric:
        scale = tensors[f"{UP}.weight_scale"]
        zero = unpack_words(tensors[f"{UP}.weight_zero_point"].T, bits, len(scale)).T
        assert part.grid.zero is not None
        assert torch.equal(zero, part.grid.zero.expand(scale.shape))


def test_dense_outcomes_keep_their_tensor() -> None:
    x = outcome(transposed=True, dtype=torch.bfloat16)
    tensors = CompressedTensors().pack(x, layer_of(x))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {f"{UP}.weight": (torch.bfloat16, (64, 96))}
    assert torch.equal(tensors[f"{UP}.weight"], layer_of(x).weight.T.to(torch.bfloat16))


def test_a_layer_that_is_not_what_was_planned_is_an_error() -> None:
    x = outcome(fmt=int4())
    for layer in (
        layer_of(outcome(fmt=int4(symmetric=False))),
        Layer(UP, torch.zeros(96, 64)),
        layer_of(outcome(fmt=int4())).with_part(DensePart(torch.zeros(96, 64))),
        layer_of(outcome(DOWN, int4())),
    ):
        with pytest.raises(ValueError, match="up_proj"):
            CompressedTensors().pack(x, layer)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([outcome(fmt=int4(48))], "do not divide the 64 inputs of .*group_size 64 divides every width"),
        ([outcome(fmt=int4(), transposed=True)], "Conv1D"),
        ([outcome(fmt=int4(), dtype=torch.bfloat16)], "Nearest: scale_dtype bfloat16"),
        ([outcome(fmt=int4(symmetric=False)), outcome(DOWN, int4(-1, False))], "one setting for all"),
        ([outcome(fmt=int4(), router=True)], "decides which experts a token uses.*exclude 'router'"),
        ([outcome("m.experts.0.up_proj", int4(symmetric=False), expert=True)], "asymmetric integers in a model with"),
        ([outcome(fmt=int4()), outcome("m.experts.0.up_proj", expert=True)], "stays dense beside quantized"),
        ([outcome("m.experts.0.up_proj", int4(), expert=True)], "part of a tensor that engines read as a whole"),
        (
            [outcome(f"m.experts.{i}.up_proj", int4(g), expert=True) for i, g in enumerate((32, 64))],
            "other experts differ",
        ),
    ],
)
def test_refuses_with_the_nearest_that_loads(found: list[Outcome], message: str) -> None:
    reason = CompressedTensors().refuse(found, CONFIG)
    assert reason is not None
    assert re.search(message, reason)
    assert "Nearest:" in reason
    assert export.choose(found, CONFIG).name == "lilliput"
    with pytest.raises(PlanError, match="Nearest:"):
        export.choose(found, CONFIG, "compressed-tensors")


def test_takes_the_engines_own_layout_where_it_loads() -> None:
    found = [outcome(fmt=int4()), outcome(DOWN, IntegerFormat(8, True, -1)), outcome(HEAD)]
    assert export.choose(found, CONFIG).name == "compressed-tensors"
    assert export.choose(found, CONFIG, "lilliput").name == "lilliput"
    with pytest.raises(PlanError, match="Did you mean 'lilliput'"):
        export.choose(found, CONFIG, "liliput")


def test_config_ignores_every_other_linear_by_name() -> None:
    entry = CompressedTensors().config([outcome(fmt=int4()), outcome(DOWN, int4()), outcome(HEAD)], CONFIG)
    assert entry is not None
    QuantizationConfig.model_validate(entry)
    attention = [f"model.layers.0.self_attn.{x}_proj" for x in "koqv"]
    assert entry["ignore"] == sorted(["lm_head", "model.layers.0.mlp.gate_proj", *attention])
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "dequantize" not in entry
    with_zeros = CompressedTensors().config([outcome(fmt=int4(symmetric=False))], CONFIG)
    assert with_zeros is not None
    assert with_zeros["dequantize"] is True
    assert CompressedTensors().config([outcome()], CONFIG) is None


def test_decoded_while_loading_it_takes_one_scheme() -> None:
    exporter = CompressedTensors(decoded=True)
    entry = exporter.config([outcome(fmt=int4())], CONFIG)
    assert entry is not None
    assert entry["dequantize"] is True
    assert exporter.refuse([outcome(fmt=int4()), outcome(DOWN, int4())], CONFIG) is None
    assert "one setting for all" in (exporter.refuse([outcome(fmt=int4()), outcome(DOWN, int4(-1))], CONFIG) or "")
    assert "decodes the linears in the dtype of the scales" in (exporter.dense_note([outcome(fmt=int4())]) or "")


def test_what_else_stands_against_a_layout() -> None:
    found = [outcome(fmt=int4())]

    def against(*forms: object) -> Callable[[Exporter], str | None]:
        return lambda exporter: "no" if exporter in forms else None

    plain, decoded = CompressedTensors(), CompressedTensors(decoded=True)
    assert export.choose(found, CONFIG, refuse=against(plain)) == decoded
    assert export.choose(found, CONFIG, "compressed-tensors", against(plain)) == decoded
    assert export.choose(found, CONFIG, refuse=against(plain, decoded)).name == "lilliput"
    with pytest.raises(PlanError, match="cannot hold this result: no"):
        export.choose(found, CONFIG, "compressed-tensors", against(plain, decoded))


def test_a_wrappers_other_linears_are_ignored_by_both_names() -> None:
    config = Gemma3Config(
        text_config={"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    x = outcome(UP, int4(), stored=f"language_model.{UP}")
    entry = CompressedTensors().config([x], config)
    assert entry is not None
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in entry["ignore"]
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1" in entry["ignore"]
    assert "model.language_model.layers.0.mlp.down_proj" in entry["ignore"]
    assert not any(name.endswith("up_proj") for name in entry["ignore"])


def test_mixed_schemes_name_their_linears() -> None:
    entry = CompressedTensors().config([outcome(fmt=int4()), outcome(DOWN, int4(-1))], CONFIG)
    assert entry is not None
    targets = [group["targets"] for group in entry["config_groups"].values()]
    assert targets == [[r"re:^model\.layers\.(?:0)\.mlp\.up_proj$"], [r"re:^model\.layers\.(?:0)\.mlp\.down_proj$"]]


def test_targets_match_their_linears_and_no_others() -> None:
    names = ["model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.experts.7.up_proj"]
    patterns = [x.removeprefix("re:") for x in exact_targets([outcome(n, stored=f"t.{n}") for n in names])]
    matches = {n: any(re.match(p, n) for p in patterns) for n in [*names, *(f"t.{n}" for n in names)]}
    assert all(matches.values())
    others = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj2", "x.model.layers.1.mlp.up_proj", "lm_head"]
    assert not any(re.match(p, n) for p in patterns for n in others)


def test_conv1d_models_have_no_linear_but_the_head() -> None:
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=8)
    entry = CompressedTensors().config([outcome(HEAD, int4())], config)
    assert entry is not None
    assert entry["ignore"] == []


def test_notes_say_where_engines_run_dense() -> None:
    plain = CompressedTensors().dense_note([outcome(fmt=int4())])
    assert plain is not None
    assert "runs dense" in plain
    assert "vLLM" not in plain
    three = CompressedTensors().dense_note([outcome(fmt=IntegerFormat(3, False, 32))])
    assert three is not None
    assert "SGLang reads only 4 and 8 bits" in three
    assert "dtype of the scales" in three
    split = CompressedTensors().dense_note([outcome(fmt=int4()), outcome(UP.replace("up", "gate"), int4(-1))])
    assert split is not None
    assert "vLLM runs the linears of model.layers.0.mlp" in split
    assert "vLLM on a CPU refuses this file for its int3 g32 asym" in three
    head = CompressedTensors().dense_note([outcome(HEAD, int4(), table=True)])
    assert head is not None
    assert "vLLM has no place for a packed head" in head
    zeros = CompressedTensors().dense_note([outcome(sparsity=0.5)])
    assert zeros is not None
    assert "zeros of 1 pruned" in zeros
    assert CompressedTensors().dense_note([outcome()]) is None


def test_largest_group_divides_every_width() -> None:
    assert largest_group([outcome(fmt=int4()), outcome(DOWN, int4())]) == 32
    assert largest_group([outcome(fmt=int4()), outcome(DOWN)]) == 64


def test_a_table_is_packed_in_pieces_as_it_is_whole() -> None:
    form = IntegerFormat(4, False, 32, torch.float16)
    table = outcome(UP, form, table=True)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    grid = form.fit(weight)
    whole = Layer(UP, weight).with_part(QuantizedPart(form, form.encode(weight, grid), grid))
    pieces = [CompressedTensors().pack_rows(table, whole.rows(a, a + 32, UP), a) for a in (0, 32, 64)]
    for name, tensor in CompressedTensors().pack(table, whole).items():
        assert torch.equal(torch.cat([x[name] for x in pieces if name in x]), tensor)
