"""Rounded inputs of folders that others wrote: all presets of the library, beside its own rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.source import inputs
from lilliput.source.reader import Entry

WIDTH = 256


class Held:
    """A reader of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.entries = {n: Entry(tuple(t.shape), t.dtype, t.nbytes, Path("x")) for n, t in tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


def drawn() -> Tensor:
    x = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, WIDTH)
    x[0, 4] = 0.0
    return x


@pytest.mark.parametrize(
    "name",
    ["W8A8", "W4A8", "W4A4", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4AFP8", "NVFP4", "MXFP4", "MXFP8", "MXFP4XFP8"],
)
def test_presets_round_as_the_library_does(name: str) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, quantization_status=QuantizationStatus.COMPRESSED, format="naive-quantized"
    )
    scale, factor = torch.tensor([0.02]), torch.tensor([57.0])
    tensors = {"m.a.weight": torch.zeros(4, WIDTH, dtype=torch.int8), "m.a.weight_scale": torch.ones(4, 1)}
    reader = Held({**tensors, "m.a.input_scale": scale, "m.a.input_global_scale": factor})
    found = inputs.find("compressed-tensors", config.model_dump(mode="json"), reader, "folder")  # type: ignore[arg-type]
    module = torch.nn.Linear(WIDTH, 4)
    module.quantization_status = QuantizationStatus.FROZEN  # type: ignore[assignment]
    module.register_buffer("input_scale", scale)
    if name == "NVFP4":
        module.register_buffer("input_global_scale", factor)
    assert scheme.input_activations is not None
    expected = forward_quantize(module, drawn(), "input", scheme.input_activations)
    torch.testing.assert_close(found["m.a"].of(drawn()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_a_missing_static_scale_is_named(name: str) -> None:
    config = QuantizationConfig(config_groups={"group_0": preset_name_to_scheme(name, ["Linear"])})
    reader = Held({"m.a.weight": torch.zeros(4, 8, dtype=torch.int8), "m.a.weight_scale": torch.ones(4, 1)})
    with pytest.raises(SourceError, match=r"m\.a\.input_(global_)?scale is missing"):
        inputs.find("compressed-tensors", config.model_dump(mode="json"), reader, "folder")  # type: ignore[arg-type]
