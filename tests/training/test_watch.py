"""What a model shows is what transformers itself computes, and watching changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError
from lilliput.model.stored import open_model
from lilliput.training.beside import Beside, head, judged
from lilliput.training.watch import attention_scores, check, watching
from lilliput.verbs.objective import FIELDS

Tiny = Callable[[str], Path]


def opened(folder: Path) -> Skeleton:
    model = open_model(folder)
    model.load(tuple(model.skeleton.shapes))
    return model.skeleton


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "neox"])
def test_hidden_states_and_attention_are_transformers_own(tiny: Tiny, name: str) -> None:
    skeleton, ids = opened(tiny(name)), torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True, output_attentions=True)
        plain = skeleton.read(ids)
        with watching(skeleton, FIELDS) as shown:
            finished = skeleton.read(ids)
    seen = shown()
    assert torch.equal(finished, plain)
    assert len(seen.hidden) == len(seen.attention) + 1 == len(out.hidden_states)
    for a, b in zip(seen.hidden[:-1], out.hidden_states[:-1], strict=True):  # theirs has the last one normed
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b, scores in zip(seen.attention, out.attentions, seen.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(scores.softmax(-1), a)
    torch.testing.assert_close(head(skeleton, seen.hidden[-1][0]), out.logits[0], rtol=1e-4, atol=1e-3)
    assert seen.values[0].shape[:2] == (2, 2 if name in ("llama", "qwen2") else 4)


def test_the_last_block_alone_is_kept_where_no_other_is_asked_for(tiny: Tiny) -> None:
    skeleton, ids = opened(tiny("llama")), torch.arange(8)[None]
    with torch.no_grad(), watching(skeleton, FIELDS) as shown:
        skeleton.read(ids)
    whole = shown()
    with torch.no_grad(), watching(skeleton, FIELDS, last=True) as shown:
        skeleton.read(ids)
    assert len(shown().scores) == len(shown().values) == 1
    assert torch.equal(shown().values[0], whole.values[-1])
    assert torch.equal(shown().hidden[-1], whole.hidden[-1])


def test_gradients_pass_through_what_is_shown_and_nothing_stays_behind(tiny: Tiny) -> None:
    skeleton, ids = opened(tiny("qwen2")), torch.arange(8)[None]
    weight: Any = skeleton.tensor("model.layers.0.self_attn.q_proj.weight")
    weight.requires_grad_()
    with watching(skeleton, frozenset({"scores"})) as shown:
        skeleton.read(ids)
    shown().scores[0].tril().sum().backward()  # type: ignore[no-untyped-call]
    assert float(weight.grad.abs().max()) > 0
    for module in skeleton.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") == "sdpa"


def test_masks_are_added_or_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 5, 3, generator=generator), torch.randn(1, 2, 5, 3, generator=generator)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & ~torch.ones(5, 5, dtype=torch.bool).tril(-3)

    def slow(at: int, head: int, of: int) -> float:
        return float(q[0, head, at].double() @ k[0, head // 2, of].double()) * 0.5

    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for mask in (seen[None, None], added[None, None]):
        scores = attention_scores(q, k, mask, 0.5)
        assert torch.equal(scores.isfinite(), seen.expand(1, 4, 5, 5))
        assert float(scores[0, 3, 4, 2]) == pytest.approx(slow(4, 3, 2), rel=1e-5)
    capped = attention_scores(q, k, None, 0.5, softcap=1.5)
    assert float(capped[0, 0, 1, 0]) == pytest.approx(1.5 * torch.tensor(slow(1, 0, 0) / 1.5).tanh().item(), rel=1e-5)
    assert float(capped[0, 0, 0, 1]) == -torch.inf


def test_attention_that_shows_nothing_is_refused_and_hidden_states_are_not() -> None:
    config = tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    skeleton = Skeleton(config)
    check(skeleton, frozenset({"hidden"}))
    with pytest.raises(SourceError, match="feature-kd"):
        check(skeleton, frozenset({"scores"}))


def test_a_teacher_beside_says_what_it_thinks_of_the_tokens_that_count(tiny: Tiny) -> None:
    model = open_model(tiny("qwen2"))
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tiny("qwen2")).eval()
    ids = torch.randint(0, 512, (2, 7), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 7, dtype=torch.bool)
    counts[0, 3:5] = counts[1, 6:] = True

    def weigh(label: Tensor) -> Tensor:
        return torch.full_like(label, float(len(label)))

    with torch.no_grad():
        log_p = (theirs(ids).logits / 2).log_softmax(-1)
    with Beside(model, frozenset({"hidden"}), False, 2.0, weigh) as teacher:
        look = teacher.look(ids, counts, None)
        taught = look.taught(0, 3)
        places = [(0, 2), (0, 3), (1, 5)]
        expected = torch.stack([log_p[row, at] for row, at in places])
        torch.testing.assert_close(taught.log_p, expected, rtol=1e-4, atol=1e-4)
        label = torch.stack([log_p[row, at, ids[row, at + 1]] for row, at in places])
        assert taught.log_label is not None
        torch.testing.assert_close(taught.log_label, label, rtol=1e-4, atol=1e-4)
        assert taught.weight is not None
        assert taught.weight.tolist() == [2.0, 2.0, 1.0]  # a sample at a time
        assert torch.equal(look.taught(1, 3).log_p, taught.log_p[1:])
        assert len(look.seen.hidden) == 3
        whole = judged(model.skeleton, ids)
        assert whole.shape == ids.shape
        assert float(whole[0, 0]) == 0.0
    assert model.skeleton.tensor(model.skeleton.head).is_meta
