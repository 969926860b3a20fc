"""Several processes as one run: the same results, the same order, the same end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput import api
from lilliput.errors import LilliputError
from lilliput.machine import ranks
from lilliput.progress import Quiet
from lilliput.run.journal import Work

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
Together = Callable[..., dict[str, Any]]
SAME: Mapping[str, Any] = {"tokens": 32, "device": "cpu", "dtype": "float32"}
QUICK = ("gptq.search=minmax",)


def line(model: Path, out: Path, recipe: str, *more: str, samples: int = 7, windows: int = 0) -> list[str]:
    args = ["compress", str(model), "--out", str(out), "--recipe", recipe, "--samples", str(samples)]
    args += [x for key, value in SAME.items() for x in (f"--{key}", str(value))]
    return [*args, "--eval-windows", str(windows), *(x for s in settings(recipe) for x in ("--set", s)), *more]


def settings(recipe: str) -> tuple[str, ...]:
    return (*QUICK, "awq.grid=3", "awq.search=minmax") if "awq" in recipe else QUICK if recipe == "gptq" else ()


def alone(model: Path, out: Path, recipe: str, *, samples: int = 7, windows: int = 0, **more: Any) -> api.Compression:
    given = {"samples": samples, "eval_windows": windows, "settings": settings(recipe), "progress": Quiet()}
    return api.compress(model, out, recipe=recipe, **{**SAME, **given, **more})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def digest(folder: Path) -> dict[str, str]:
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(folder.glob("*.safetensors"))}


def codes(packed: Tensor, bits: int = 4) -> Tensor:
    """The fields of packed 32-bit words; a last word's unused ones are zeros on both sides of a comparison."""
    return torch.stack([(packed.long() >> (bits * n)) & (2**bits - 1) for n in range(32 // bits)], -1)


def agreement(a: Path, b: Path) -> float:
    """Share of equal codes over all linears.

    Sums in another order move a Gram matrix by 1e-7, which turns no code here. A code at a tie would turn, and some
    percent of those after it with it: in models of this size one code is that much.
    """
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    equal = total = 0
    for name, x in ours.items():
        if name.endswith("weight_packed"):
            same = codes(x) == codes(theirs[name])
            equal, total = equal + int(same.sum()), total + same.numel()
    assert total
    return equal / total


@pytest.mark.parametrize(("recipe", "name", "windows"), [("gptq", "llama", 2), ("awq-gptq", "qwen2", 0)])
def test_two_ranks_find_what_one_finds(
    recipe: str, name: str, windows: int, tiny: Tiny, together: Together, tmp_path: Path
) -> None:
    done = together(line=line(tiny(name), tmp_path / "two", recipe, "--json", windows=windows), model=tiny(name))
    assert done["code"] == [0, 0], done["stderr"]
    one = alone(tiny(name), tmp_path / "one", recipe, windows=windows)
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.99
    said = json.loads(done["stdout"][0])  # one object, and nothing else
    assert done["stdout"][1] == ""
    assert done["stderr"][1] == ""
    assert "blocks" in done["stderr"][0]
    assert [row["tokens"] for row in said["rows"]] == [row["tokens"] for row in one.rows]
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    if one.evaluation is not None:
        assert said["measured"]["perplexity"]["value"] == pytest.approx(one.evaluation.perplexity.value, rel=1e-3)
        assert api.verify(tmp_path / "two").problems == ()


def test_without_calibration_the_bytes_are_the_same(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    """More processes than samples do no harm where no sample is read."""
    command = line(tiny("llama"), tmp_path / "two", "rtn", "--set", "rtn.search=minmax", samples=1)
    done = together(line=command, model=tiny("llama"))
    assert done["code"] == [0, 0], done["stderr"]
    alone(tiny("llama"), tmp_path / "one", "rtn", samples=1, settings=("rtn.search=minmax",))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


LAID_OUT = """
import dataclasses, json
from pathlib import Path
from lilliput import api
from lilliput.plan import footprint
from lilliput.errors import LilliputError
from lilliput.progress import Quiet
from lilliput.stats import fold

counts, plain, choose = [], fold.all_reduce, footprint.choose

def counted(state):
    found = plain(state)
    counts.append([state.count, found.count])
    return found

fold.all_reduce = counted
footprint.choose = lambda *a, **k: dataclasses.replace(choose(*a, **k), batch=1, lockstep={lockstep})
args = json.loads({args!r})
done = api.compress(args.pop("model"), args.pop("out"), progress=Quiet(), **args)
assert done.plan.batching.lockstep is {lockstep}
assert done.skipped == 0 and len(done.rows) == 32
Path({seen!r} + str(rank)).write_text(json.dumps(counts))
"""


@pytest.mark.parametrize("lockstep", [True, False])
def test_ranks_with_unlike_passes_and_experts(lockstep: bool, tiny: Tiny, together: Together, tmp_path: Path) -> None:
    """One pass on the first rank, two on the second; some experts are met by one rank only."""
    model = tiny("mixtral")
    args = {**SAME, "samples": 3, "tokens": 3, "recipe": "gptq", "settings": QUICK, "eval_windows": 0}
    own = json.dumps({**args, "model": str(model), "out": str(tmp_path / "two")})
    code = LAID_OUT.format(lockstep=lockstep, args=own, seen=str(tmp_path / "seen-"))
    done = together(code=code, model=model)
    assert done["code"] == [0, 0], done["stderr"]
    alone(model, tmp_path / "one", "gptq", samples=3, tokens=3)
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.99
    here, there = (json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(2))
    pairs = [(a, b) for (a, both), (b, same) in zip(here, there, strict=True) if both == same == a + b]
    assert len(pairs) == len(here)
    assert (3, 6) in pairs
    assert any(a == 0 < b for a, b in pairs)
    assert any(b == 0 < a for a, b in pairs)


def test_ranks_that_try_out_agree_on_what_they_find(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    """Three of seven samples are looked at, by one process two of them; then one process alone has one and one none."""
    for share in ("0.4", "0.1"):
        recipe = tmp_path / f"search-{share}.yaml"
        options = f"{{share: {share}, late: 1.0, kept: [0.1, 0.5]}}"
        where = "where: {include: ['*.mlp.up_proj', '*.mlp.down_proj']}"
        recipe.write_text(f"steps:\n  - method: laser-search\n    options: {options}\n  - method: laser\n    {where}\n")
        command = line(tiny("llama"), tmp_path / f"two-{share}", str(recipe), "--json")
        killed = together(line=command, at="lilliput.streaming.backward:_head", call=4, how="before", on=1)
        assert killed["code"] == [2, -9], killed["stderr"]
        again = together(line=command)
        assert again["code"] == [0, 0], again["stderr"]
        one = api.compress(
            tiny("llama"), tmp_path / f"one-{share}", recipe=recipe, samples=7, eval_windows=0, progress=Quiet(), **SAME
        )
        assert digest(tmp_path / f"one-{share}") == digest(tmp_path / f"two-{share}")
        (found,) = (note for note in one.plan.notes if note.startswith("laser-search: "))
        assert found in json.loads(again["stdout"][0])["notes"]


RECIPE = """
name: everything
steps:
  - {method: spinquant, options: {steps: 1, sequences: 2, r2: true}}
  - {method: owl, options: {multiple: 2.0}}
  - {method: wanda, target: {sparsity: 0.5}}
  - {method: gptq, target: {bits: 4}, options: {search: minmax}}
"""


def test_learning_and_dividing_and_a_break_between(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = line(tiny("llama"), tmp_path / "two", str(recipe), "--json")
    killed = together(line=command, at="lilliput.stats.fold:update", call=8 + 6, how="before", on=1)
    assert killed["code"] == [2, -9], killed["stderr"]
    again = together(line=command)
    assert again["code"] == [0, 0], again["stderr"]
    assert json.loads(again["stdout"][0])["blocks_skipped"] == 0
    alone(tiny("llama"), tmp_path / "one", str(recipe))
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.99


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, together: Together, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks write that nobody disturbs."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    done = together(line=line(tiny("llama"), out, "gptq"), model=tiny("llama"))
    assert done["code"] == [0, 0], done["stderr"]
    return digest(out)


LOST = "the processes of this run have lost each other"


@pytest.mark.parametrize(
    ("on", "at", "call", "how", "codes", "blocks"),
    [
        (1, "lilliput.stats.fold:update", 6, "before", [2, -9], 1),
        (0, "lilliput.run.journal:Work.note", 3, "torn", [-9, 2], 1),
        (0, "lilliput.methods.weight.gptq:METHOD.run", 6, "interrupt", [130, 2], 1),
    ],
)
def test_a_rank_that_ends_ends_all_and_they_go_on(
    on: int,
    at: str,
    call: int,
    how: str,
    codes: list[int],
    blocks: int,
    tiny: Tiny,
    together: Together,
    unbroken: dict[str, str],
    tmp_path: Path,
) -> None:
    command = line(tiny("llama"), tmp_path / "out", "gptq", "--json")
    killed = together(line=command, at=at, call=call, how=how, on=on, model=tiny("llama"))
    assert killed["code"] == codes, killed["stderr"]
    last = [x for x in killed["stderr"][0].splitlines() if "blocks " not in x]
    assert killed["stderr"][1] == ""
    assert len(last) == (how == "interrupt" or on == 1)
    assert all(LOST in x or "interrupted. Run the same command again" in x for x in last)
    assert not (tmp_path / "out").exists()
    again = together(line=command, model=tiny("llama"))
    assert again["code"] == [0, 0], again["stderr"]
    assert json.loads(again["stdout"][0])["blocks_skipped"] == blocks
    assert digest(tmp_path / "out") == unbroken
    assert os.listdir(tmp_path) == ["out"]


def test_a_rank_that_ends_when_all_is_done(
    tiny: Tiny, together: Together, unbroken: dict[str, str], tmp_path: Path
) -> None:
    job = {"line": line(tiny("llama"), tmp_path / "out", "gptq"), "model": tiny("llama")}
    done = together(**job, at="lilliput.run.journal:Work.publish", call=1, how="before", on=1)
    assert done["code"] == [0, -9], done["stderr"]
    assert digest(tmp_path / "out") == unbroken
    assert os.listdir(tmp_path) == ["out"]
    refused(together(**job), "exists already")


def refused(answer: dict[str, Any], *words: str) -> None:
    """All ranks ended, and the leader alone said why, in one line."""
    assert answer["code"] == [2] * len(answer["code"]), answer["stderr"]
    said = [x for x in answer["stderr"][0].splitlines() if "blocks " not in x]
    assert len(said) == 1, said
    assert all(word in said[0] for word in words), said
    assert set(answer["stderr"][1:]) == {""}
    assert set(answer["stdout"]) == {""}


def test_an_unfinished_run_of_other_processes(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    command = line(tiny("llama"), tmp_path / "out", "gptq")
    job = {"line": command, "model": tiny("llama")}
    together(**job, at="lilliput.stats.fold:update", call=6, how="before", on=1)
    refused(together(**job, ranks=3), "unfinished run of another plan", "processes")
    states = tmp_path / ".out.partial" / "work" / "rank-1" / "hidden-0001.bin"
    states.write_bytes(bytes(states.stat().st_size))
    refused(together(**job), "rank-1/hidden-0001.bin is not what the unfinished run wrote", "start again")


def test_what_several_processes_cannot_do(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    job = {"line": line(tiny("llama"), tmp_path / "out", "gptq", samples=2), "model": tiny("llama")}
    refused(together(**job, ranks=3), "3 processes cannot share 2 calibration samples", "--samples")
    refused(together(line=["verify", str(tmp_path)]), "verify runs in a single one", "without torchrun")
    assert os.listdir(tmp_path) == []


def test_folders_of_other_ranks_without_a_journal_are_in_nobodys_way(tmp_path: Path) -> None:
    """They are left where the first process ended while the others were still beginning."""
    left = tmp_path / ".out.partial" / "work" / "rank-1"
    left.mkdir(parents=True)
    (left / "hidden-0000.bin").write_bytes(b"0")
    with Work(tmp_path / "out", "key") as work:
        assert not left.exists()
        assert work.records == []


def test_the_plan_is_said_once(tiny: Tiny, together: Together) -> None:
    args = ["plan", str(tiny("llama")), "--recipe", "gptq", "--samples", "4", "--tokens", "32", "--json"]
    done = together(line=args, model=tiny("llama"))
    assert done["code"] == [0, 0], done["stderr"]
    said = json.loads(done["stdout"][0])
    assert said["batch"] == 2
    assert any("2 processes share the calibration samples" in x for x in said["notes"])
    assert done["stdout"][1] == ""


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ranks.rank(), ranks.size(), ranks.share(7)) == (0, 1, slice(0, 7))
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(ranks.share(7))
        assert ranks.lead() == (rank == 0)
    assert [i for part in shares for i in range(7)[part]] == list(range(7))
    assert sorted(part.stop - part.start for part in shares) == [2, 2, 3]


def test_alone_nothing_is_exchanged() -> None:
    value, tensor = {"a": (1,)}, torch.ones(2)
    assert ranks.agreed(value) is value
    assert ranks.gathered(value) == [value]
    assert ranks.same(tensor) is ranks.add(tensor) is ranks.largest(tensor) is tensor
    with ranks.joined(), pytest.raises(LilliputError, match="mine"), ranks.together():
        raise LilliputError("mine")
    assert not torch.distributed.is_initialized()


def test_started_by_torchrun(tiny: Tiny, unbroken: dict[str, str], tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lilliput"]
    command = line(tiny("llama"), tmp_path / "out", "gptq", "--json")
    done = subprocess.run([*start, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    assert digest(tmp_path / "out") == unbroken
    assert os.listdir(tmp_path) == ["out"]
