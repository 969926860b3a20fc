"""A method says what it is in keywords that cannot be misspelt, and a step knows its verb."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from pydantic import Field

from lilliput import methods
from lilliput.anatomy.model import Block, Groups, Linear
from lilliput.errors import PlanError
from lilliput.methods.fit import signround
from lilliput.methods.learn import spinquant
from lilliput.methods.search import laser_search
from lilliput.methods.weight import gptq, quip, spqr
from lilliput.streaming.peak import Run
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.spec import Method, Stage, Task


class Options(Strict):
    """One option."""

    some: int = Field(3, description="a number")


def _compress(**named: Any) -> Compress[Any]:
    given: dict[str, Any] = {"paper": "none", "options": Options, "needs": ("gram", "fisher"), "covers": {}}
    return Compress(**{**given, "writes": "quantized", "run": lambda layer, stats, target, o: layer, **named})


def _task(spec: Any, target: Target | None = None, **options: Any) -> Task:
    method = Method("some", spec, "A summary.\n\nMore.")
    return Task(1, method, target or Target(), method.parse(options))


def test_a_misspelt_keyword_fails_where_the_method_is_declared() -> None:
    with pytest.raises(TypeError, match="maskd"):
        _compress(maskd=False)
    with pytest.raises(TypeError, match="run"):
        Rewrite(paper="none", options=Options, needs=(), covers={})  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        _compress().masked = False  # type: ignore[misc]


def test_a_step_knows_its_verb_and_has_its_methods_options() -> None:
    task = _task(_compress())
    assert task.label == "step 2 (some)"
    assert task.method.summary == "A summary."
    assert task.of(Compress).verb == "compress"
    with pytest.raises(RuntimeError, match=r"step 2 \(some\) is no rewrite: it is compress"):
        task.of(Rewrite)
    assert task.of(Compress).options_of(task).some == 3
    other = Task(0, task.method, Target(), gptq.Options())
    with pytest.raises(RuntimeError, match="options of another method"):
        task.of(Compress).options_of(other)
    with pytest.raises(PlanError, match=r"no option 'sume'\..* Did you mean 'some'"):
        task.method.parse({"sume": 1})


def test_what_a_step_reads_may_depend_on_its_options() -> None:
    assert _task(_compress()).needs == {"gram"}
    assert _task(_compress()).fisher
    narrow = _compress(reads=lambda o: ("gram",) if o.some > 3 else ())
    assert _task(narrow).needs == frozenset()
    assert _task(narrow, some=4).needs == {"gram"}
    assert not _task(narrow, some=4).fisher


def test_squared_gradients_are_of_all_samples_unless_the_method_says_less() -> None:
    assert _task(_compress()).fisher_samples(8) == 8
    assert _task(_compress(fisher_samples=lambda o: None)).fisher_samples(8) == 8
    assert _task(_compress(fisher_samples=lambda o: o.some)).fisher_samples(8) == 3
    assert _task(_compress(fisher_samples=lambda o: o.some)).fisher_samples(2) == 2
    assert _task(_compress(needs=("gram",))).fisher_samples(8) == 0


def test_a_target_is_completed_by_what_the_method_writes_and_by_its_own_values() -> None:
    def fields(spec: Compress[Any], **named: Any) -> dict[str, Any]:
        done = spec.completed(Target(**named)).model_dump(exclude_none=True)
        return {key: done[key] for key in done.keys() & {"bits", "sparsity", "pattern", "rank", "ratio"}}

    assert fields(_compress()) == {"bits": 4}
    assert fields(_compress(), bits=3) == {"bits": 3}
    assert fields(_compress(writes="support")) == {"sparsity": 0.5}
    assert fields(_compress(writes="support"), pattern="2:4") == {"pattern": "2:4"}
    assert fields(_compress(writes="parts")) == {}
    assert fields(_compress(writes="parts", default={"ratio": 0.8})) == {"ratio": 0.8}
    assert fields(_compress(writes="parts", default={"ratio": 0.8}), rank=4) == {"rank": 4}


def test_the_plan_asks_functions_of_the_options_and_reads_none_by_name() -> None:
    linears = tuple(Linear(name, "up", "up", 5, 2) for name in "abcdef")
    run = Run((Block(linears, (), (), Groups(())),), 2, 8, samples=4, tokens=5, itemsize=4, stored=2)
    spqr_ram, gptq_ram = (x.METHOD.cost(run, linears[:1], x.Options()).ram for x in (spqr, gptq))
    assert spqr_ram == gptq_ram + (16 << 20)
    assert quip.METHOD.rounds(quip.Options(refine=3)) == 4
    assert gptq.METHOD.rounds(gptq.Options(refine=3)) == 1
    fit = signround.METHOD.cost(run, linears[:1], signround.Options(iters=7, batch=8))
    assert fit.operations == (7 * 4 * 3 + 3 * 4) * 5 * 10
    trying = laser_search.METHOD.cost(run, linears, laser_search.Options(kept=(0.1, 0.5), late=1.0, share=0.5))
    assert trying.operations == 3 * 60 * (1 + 6 * 2 / 2) * 2 * 5
    sequences = spinquant.METHOD.sequences
    assert sequences is not None
    assert [sequences(spinquant.Options(sequences=8), n) for n in (3, 20)] == [3, 8]


def test_every_verb_has_its_stage() -> None:
    found = methods.verbs()
    assert None not in found.values()
    assert {spec.verb: spec.stage for spec in found.values() if spec is not None} == {
        "compress": Stage.LINEAR,
        "inputs": Stage.LINEAR,
        "rewrite": Stage.BLOCK,
        "repair": Stage.BLOCK,
        "fit": Stage.CLOSE,
        "edit": Stage.MODEL,
        "allocate": Stage.TARGETS,
        "choose": Stage.TARGETS,
        "search": Stage.TARGETS,
        "learn": Stage.MODEL,
        "behave": Stage.RUNNING,
        "cache": Stage.CACHE,
        "train": Stage.TRAINING,
        "adapt": Stage.TRAINING,
        "objective": Stage.TRAINING,
    }


@pytest.mark.parametrize(
    ("declared", "said"), [(None, "declares no METHOD"), (gptq.METHOD, "'compress': move it to weight/")]
)
def test_a_file_that_declares_no_method_of_its_folder_is_named(
    monkeypatch: pytest.MonkeyPatch, declared: object, said: str
) -> None:
    monkeypatch.setattr(signround, "METHOD", declared)
    with pytest.raises(RuntimeError, match=rf"signround.py .*{said}"):
        methods._load("fit", "signround")
