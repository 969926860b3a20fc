"""Configs whose tokens are numbered anew."""

from __future__ import annotations

import pytest

from lilliput.anatomy.token_ids import named_ids, numbering, renumbered
from lilliput.errors import PlanError

CONFIG = {"bos_token_id": 3, "eos_token_id": [5, 7], "pad_token_id": -1, "sep_token_id": None, "hidden_size": 64}


def test_single_tokens_are_found_and_numbered_anew() -> None:
    assert named_ids(CONFIG) == {3, 5, 7}
    assert renumbered(CONFIG, numbering((3, 5, 7)), 10, "it") == {
        "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": -1, "sep_token_id": None,
    }  # fmt: skip


def test_tokens_that_are_not_to_be_written_may_have_left() -> None:
    config = {"suppress_tokens": [3, 4], "bad_words_ids": [[3, 4], [5]]}
    assert renumbered(config, numbering((3, 5)), 10, "it") == {"suppress_tokens": [0], "bad_words_ids": [[1]]}


def test_ids_beyond_the_embedding_stay() -> None:
    assert renumbered({"bos_token_id": 50256}, numbering((3, 5)), 10, "it") == {"bos_token_id": 50256}


@pytest.mark.parametrize(
    ("config", "why"), [({"eos_token_id": 4}, "it names the token 4"), ({"sequence_bias": {"a": 1}}, "sequence_bias")]
)
def test_what_cannot_be_numbered_anew_is_refused(config: dict[str, object], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        renumbered(config, numbering((3, 5)), 10, "it")
