"""STRS against a slow one on the whole model, what is written of it, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.search.asvd_search import Options, search
from lilliput.methods.weight import svd_truncate
from lilliput.model.stored import open_model
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run import passes, stages
from lilliput.run import search as trials
from lilliput.run.journal import Work
from lilliput.run.stream import run
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.scores import Budget, Share
from lilliput.verbs.search import Search

RATIOS = (0.3, 0.6, 0.9)
IDS = torch.randint(0, 48, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(noisy: Callable[[int], Path]) -> Path:
    return noisy(5)


def planned(folder: Path, ratio: float = 0.4, weighting: str = "absmean", **options: Any) -> tuple[Plan, Any]:
    """Factors in float32: what is stored is what is computed."""
    model = open_model(str(folder))
    truncating = {"weighting": weighting, "factors": "float32"}
    recipe = Recipe(
        steps=(
            Step(method="asvd-search", options={"ratios": list(RATIOS), **options}),
            Step(method="svd-truncate", target=Target(ratio=ratio), options=truncating),
        )
    )
    made = make(model, recipe, samples=5, tokens=24, budget=None, size=None, seed=None, dtype=torch.float32)
    return made, model


def truncated(weight: Tensor, scale: Tensor, rank: int) -> Tensor:
    """W diag(s) = U S VT, cut, and then diag(s)^-1."""
    u, s, vt = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] / scale


def slow(folder: Path, weighting: str, looked: int, ratio: float) -> tuple[dict[str, int], float]:
    """The ranks that the search has to find, and the threshold: all thresholds tried, by transformers in float64."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    names = [n for n, x in model.named_modules() if isinstance(x, torch.nn.Linear) and n != "lm_head"]
    original = {n: model.get_submodule(n).weight.detach().clone() for n in names}
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: seen.__setitem__(n, x[0].abs().mean((0, 1))))
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()

    def loss(name: str, rank: int) -> float:
        scale = seen[name].sqrt() + 1e-6 if weighting == "absmean" else torch.ones_like(seen[name])
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(truncated(original[name], scale, rank))
            lost = float(model(input_ids=IDS[:looked], labels=IDS[:looked]).loss)
            model.get_submodule(name).weight.copy_(original[name])
        return lost

    tried = []
    for name, r in itertools.product(names, RATIOS):
        rows, width = original[name].shape
        rank = int(r * rows * width / (rows + width))
        tried.append((loss(name, rank), name, rank))

    def size(chosen: Mapping[str, int]) -> int:
        return sum(chosen[n] * sum(w.shape) if n in chosen else w.numel() for n, w in original.items())

    uniform = {n: int(ratio * w.numel() / sum(w.shape)) for n, w in original.items()}
    for threshold in sorted(lost for lost, _, _ in tried):
        chosen: dict[str, int] = {}
        for lost, name, rank in tried:
            if lost <= threshold:
                chosen[name] = min(rank, chosen.get(name, rank))
        if size(chosen) <= size(uniform):
            return chosen, threshold
    raise AssertionError("no threshold comes down to the size")


@pytest.mark.parametrize(("weighting", "share", "looked"), [("absmean", 0.5, 3), ("none", 1.0, 5)])
def test_the_ranks_are_those_of_a_slow_search(
    folder: Path, tmp_path: Path, weighting: str, share: float, looked: int
) -> None:
    made, model = planned(folder, weighting=weighting, share=share)
    with Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
        (found,) = work.find("found")
        losses = [r["loss"] for r in work.find("trial")]
    chosen, threshold = slow(folder, weighting, looked, 0.4)
    ranks = {name: target["rank"] for name, target in found["targets"].items() if "rank" in target}
    assert len(set(ranks.values())) > 2, "ranks that are all alike show nothing"
    assert ranks == chosen
    assert len(losses) == len(made.resolved.linears) * len(RATIOS), "every layer at every ratio, once"
    said = f"on the samples at {torch.tensor(threshold).exp():.4g} or below"
    assert said in found["said"]


def test_what_is_written_is_what_was_found_and_no_more_than_planned(folder: Path, tmp_path: Path) -> None:
    made, model = planned(folder, share=0.4)
    before = load_file(folder / "model.safetensors")
    with Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
        (found,) = work.find("found")
        after = stages.decided(made, model, work)
        assert not [*work.folder.glob("trial-*"), *work.folder.glob("backward-*")]
        written: dict[str, Tensor] = {}
        for path in work.staging.glob("*.safetensors"):
            written |= load_file(path)
    assert after.bytes <= made.bytes
    assert after.notes[-1] == found["said"]
    whole = 0
    for name, target in found["targets"].items():
        rows, width = before[f"{name}.weight"].shape
        if target.get("rank") is None:
            whole += 1
            assert torch.equal(before[f"{name}.weight"], written[f"{name}.weight"])
        else:
            assert written[f"{name}.weight"].numel() == rows * target["rank"]
            assert written[f"{name}.weight_right"].numel() == width * target["rank"]
    assert 0 < whole < len(found["targets"])


def test_a_killed_search_goes_on_and_finds_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = planned(folder, share=0.4)
    with Work(tmp_path / "straight", "key") as work:
        run(made, model, IDS, work, Quiet())
        wanted = work.find("found")
        count = len(work.find("trial"))
    real = trials._Trials._measured
    asked: list[int] = []

    def stopping(self: Any, changes: Any) -> float:
        asked.append(len(changes))
        if len(asked) == 8:
            raise KeyboardInterrupt
        return real(self, changes)

    monkeypatch.setattr(trials._Trials, "_measured", stopping)
    with pytest.raises(KeyboardInterrupt), Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
    with Work(tmp_path / "out", "key") as work:
        run(made, open_model(str(folder)), IDS, work, Quiet())
        assert work.find("found") == wanted
    assert len(asked) == count + 1, "what was known is not measured again"


def test_what_is_spilled_is_known_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = planned(folder, weighting="gram", share=1.0)
    sizes: list[int] = []
    init, noted = Activations.__init__, trials._Trials._observe

    def counted(
        self: Activations, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, create: bool
    ) -> None:
        init(self, path, shape, dtype, create=create)
        if not path.name.startswith("trial"):
            sizes.append(path.stat().st_size)

    def observed(self: Any) -> None:
        noted(self)
        grams = [load_file(path) for path in self._stats.values()]
        sizes.append(sum(x.nbytes for of in grams for key, x in of.items() if key.endswith("gram")))

    monkeypatch.setattr(Activations, "__init__", counted)
    monkeypatch.setattr(trials._Trials, "_observe", observed)
    with Work(tmp_path / "out", "key") as work:
        trials.search(
            made,
            made.resolved.of(Search)[0],
            passes.budget(made, made.resolved.of(Search)[0]),
            model,
            IDS,
            work,
            Quiet(),
        )
    together = sum(x.linear.parameters * 4 for x in made.resolved.linears)  # this search never keeps such
    assert stages.cost(made, model).disk == sum(sizes) + together


def made_up(losses: Mapping[str, Mapping[int, float]], ratio: float = 0.5) -> tuple[Budget, Any]:
    def size(target: Target) -> int:
        rank = svd_truncate.rank_of(target, 20, 20)
        return 800 if rank is None else 80 * rank

    budget = {name: Share(n, (20, 20), Target(ratio=ratio), size) for n, name in enumerate(losses)}

    def loss(changes: Mapping[str, Target], left: int) -> float:
        ((name, target),) = changes.items()
        assert target.rank is not None
        return losses[name][target.rank]

    return budget, loss


OPTIONS = Options(ratios=(0.2, 0.5, 0.8))  # ranks 2, 5, 8 of 20 x 20


def test_one_threshold_for_all() -> None:
    """At 2.5 a goes down to 5, b to 2 although its 5 is worse than that, c stays: 400 + 160 + 800 of 1,200 bytes are
    too many, so the next one, 3.0, is taken."""
    budget, loss = made_up(
        {"a": {2: 9.0, 5: 2.4, 8: 2.0}, "b": {2: 2.5, 5: 2.6, 8: 2.1}, "c": {2: 8.0, 5: 7.0, 8: 3.0}}
    )
    targets, said = search(loss, budget, OPTIONS)
    assert {n: t.rank for n, t in targets.items()} == {"a": 5, "b": 2, "c": 8}
    assert said.startswith("asvd-search: 3 of 3 linears truncated")
    assert "at 20.09 or below" in said


def test_a_threshold_lets_all_of_equal_loss_through() -> None:
    budget, loss = made_up({"a": {2: 1.0, 5: 1.0, 8: 1.0}, "b": {2: 1.0, 5: 1.0, 8: 1.0}})
    targets, _ = search(loss, budget, OPTIONS)
    assert {n: t.rank for n, t in targets.items()} == {"a": 2, "b": 2}


def test_what_fits_as_it_is_stays() -> None:
    budget, loss = made_up({"a": {2: 1.0, 5: 0.9, 8: 0.8}}, ratio=1.0)
    targets, said = search(loss, budget, OPTIONS)
    assert targets["a"].rank is None
    assert targets["a"].ratio == 1.0
    assert said == "asvd-search: all 1 linears fit unchanged."


def test_losses_that_are_no_numbers_are_not_let_through() -> None:
    nan = float("nan")
    budget, loss = made_up({"a": {2: nan, 5: 2.0, 8: 1.0}, "b": {2: 1.5, 5: 3.0, 8: float("inf")}})
    targets, _ = search(loss, budget, OPTIONS)
    assert {n: t.rank for n, t in targets.items()} == {"a": 8, "b": 2}
    budget, loss = made_up({"a": {2: nan, 5: nan, 8: 1.0}})
    with pytest.raises(LilliputError, match="too few layers have a finite loss"):
        search(loss, budget, OPTIONS)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"method": "asvd-search"}, {"method": "laser"}], "tries out svd-truncate, not 'laser'"),
        ([{"method": "asvd-search"}, {"method": "svd-truncate", "target": {"rank": 4}}], "no ratio to divide"),
        (
            [
                {"method": "asvd-search", "options": {"ratios": [0.5]}},
                {"method": "svd-truncate", "target": {"ratio": 0.3}},
            ],
            r"smallest ratio .* is 0\.5, and 0\.3 is below",
        ),
        (
            [{"method": "asvd-search", "options": {"ratios": [0.5, 1.0]}}, {"method": "svd-truncate"}],
            r"a ratio of 1\.0: ratios takes numbers above 0 and below 1",
        ),
        (
            [{"method": "asvd-search"}, {"method": "svd-truncate", "options": {"weighting": "fisher"}}],
            "before squared gradients are known",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(folder: Path, steps: list[dict[str, Any]], message: str) -> None:
    chosen = Recipe(steps=tuple(Step.model_validate(x) for x in steps))
    with pytest.raises(PlanError, match=message):
        make(
            open_model(str(folder)), chosen, samples=5, tokens=8, budget=None, size=None, seed=None, dtype=torch.float32
        )
