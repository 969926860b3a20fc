"""Which modules with 3-D tensors are taken for experts: those whose function is the known one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilliput.anatomy.experts import UnrolledExperts, unroll


class Batched(nn.Module):
    """Experts as transformers writes them; `together`: the activation takes gate and up at once."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.together = together
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.empty(3, 16, 12, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(3, 12, 8, device="meta"))
        self.act_fn = (lambda gate, up: nn.functional.silu(gate) * up) if together else nn.SiLU()

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(self.num_experts):
            token, slot = torch.where(indices == e)
            gate, up = (hidden[token] @ self.gate_up_proj[e].T).chunk(2, -1)
            made = self.act_fn(gate, up) if self.together else self.act_fn(gate) * up
            out.index_add_(0, token, (made @ self.down_proj[e].T) * weights[token, slot, None])
        return out


def test_the_known_form_is_unrolled() -> None:
    found = unroll(Batched(together=False))
    assert isinstance(found, UnrolledExperts)
    assert found.experts == 3
    assert tuple(found.expert(2).up_proj.weight.shape) == (8, 12)


def test_an_activation_of_gate_and_up_at_once_is_another_form() -> None:
    assert unroll(Batched(together=True)) is None
