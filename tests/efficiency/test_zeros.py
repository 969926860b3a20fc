import shutil

import torch
from safetensors.torch import load_file, save_file

from lilliput.efficiency import zeros
from lilliput.efficiency.shapes import shapes_of
from lilliput.efficiency.zeros import count_zeros
from lilliput.model.stored import open_model


def test_zeros_and_patterns_by_matrix(folder, tmp_path, monkeypatch):

    monkeypatch.setattr(zeros, "_CHUNK", 100)  # several pieces a matrix
    path = tmp_path / "pruned"
    shutil.copytree(folder("llama"), path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.{}.mlp.{}_proj.weight"
    half = torch.tensor([1.0, 0.0, 0.0, 1.0])
    tensors[name.format(0, "gate")] *= half.repeat(8)
    tensors[name.format(0, "up")] *= torch.tensor([1.0] * 4 + [0.0] * 4).repeat(4)  # 4:8, and not 2:4
    tensors[name.format(0, "down")] *= half.repeat(12)
    tensors[name.format(0, "down")][-1, :4] = 1.0  # one row breaks it
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = open_model(str(path))
    found = count_zeros(model, shapes_of(model))
    assert found[name.format(0, "gate")] == zeros.Zeros(48 * 16, (2, 4))
    assert found[name.format(0, "up")] == zeros.Zeros(48 * 16, (4, 8))
    assert found[name.format(0, "down")] == zeros.Zeros(32 * 24 - 2, None)
    assert found[name.format(1, "gate")] == zeros.Zeros(0, None)
    assert len(found) == 14  # the head is not among them
