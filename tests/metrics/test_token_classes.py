import pytest
import torch

from lilliput.metrics.token_classes import CLASSES, by_class, by_position, classify, words_of, worst


def test_words_are_parted_by_white_space() -> None:
    number, words = words_of(["The", " cat", "s", " of", "\n", "Rome"])
    assert number == [0, 1, 1, 2, 3, 4]
    assert words == ["The", " cats", " of", "\n", "Rome"]


def test_every_class_by_its_rule() -> None:
    text = ["He", " met", " Jo", "anna", " in", " 19", "84", ".", " Then", " x", "=", "1", " in", " in"]
    masks = classify([text, [" in"] * len(text)])
    at = {name: [text[i] for i in mask[0].nonzero().flatten().tolist()] for name, mask in masks.items()}
    assert set(masks) == set(CLASSES)
    assert at["names"] == [" Jo", "anna"]
    assert at["numbers"] == [" 19", "84", ".", " x", "=", "1"]
    assert at["code"] == [" x", "=", "1"]
    assert at["other words"] == [" in", " in", " in"]
    assert "He" in at["rare words"]
    assert not masks["rare words"][1].any()
    assert bool(torch.stack(list(masks.values())).any(0).all())


def test_wikitext_marks_are_no_code() -> None:
    assert not classify([["a", " @-@", " <unk>", " b"]] * 2)["code"].any()


def test_a_class_has_the_mean_over_its_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, True, True]])
    divergence = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [9.0, 4.0, 5.0]])
    found = by_class({"x": mask, "empty": mask & False}, divergence, divergence < 3)
    assert found[0].tokens == 5
    assert found[0].kl is not None
    assert found[0].kl.value == pytest.approx(3.0)
    assert found[0].kl.low < 3.0 < found[0].kl.high
    assert found[0].agreement is not None
    assert found[0].agreement.value == pytest.approx(2 / 5)
    assert (found[1].tokens, found[1].kl) == (0, None)


def test_positions_cover_the_window() -> None:
    divergence = torch.arange(10.0).repeat(3, 1)
    rows = by_position(divergence, bins=4)
    assert [(r["from"], r["to"]) for r in rows] == [(1, 3), (3, 6), (6, 9), (9, 11)]
    assert rows[-1]["kl"]["value"] == 8.5


def test_the_worst_tokens_are_named() -> None:
    windows = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    divergence = torch.tensor([[0.1, 5.0, 4.0], [0.2, 3.0, 9.0]])
    choice, reference = [["1", "2", "3"], ["4", "5", "6"]], [["p", "q", "r"], ["s", "t", "u"]]
    rows = worst(windows, divergence, choice, reference, count=3)
    assert [row["kl"] for row in rows] == [9.0, 5.0, 4.0]
    assert rows[0] == {"text": "efg", "token": "h", "ours": "6", "theirs": "u", "kl": 9.0}
    assert len(worst(windows, divergence, choice, reference)) == 4
