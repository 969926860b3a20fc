"""Squared gradients: those of autograd on the whole model, resumable, planned, refused where they are no numbers."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.model.stored import Model, open_model
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run import fisher, stream
from lilliput.run.editing import prepared
from lilliput.run.journal import Work
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.streaming.states import Activations
from lilliput.target import Target

LAYERS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
MAKES: dict[str, Callable[[], Any]] = {
    "llama, tied, grouped queries": lambda: tf.LlamaConfig(**SHAPE),
    "mixtral": lambda: tf.MixtralConfig(
        **{**SHAPE, "tie_word_embeddings": False}, num_local_experts=3, num_experts_per_tok=2
    ),
    "gpt2, Conv1D": lambda: tf.GPT2Config(vocab_size=48, n_embd=24, n_layer=LAYERS, n_head=4, n_positions=32),
}
TARGET = Target(format="codebook", bits=3, group_size="channel")
SQUEEZE = (Step(method="squeezellm", target=TARGET),)
IDS = torch.randint(0, 48, (3, 10), generator=torch.Generator().manual_seed(1))


def saved(make_config: Callable[[], Any], folder: Path) -> Any:
    torch.manual_seed(0)
    whole = tf.AutoModelForCausalLM.from_config(make_config()).float().eval()
    with torch.no_grad():
        for value in whole.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    whole.save_pretrained(folder)
    return whole


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    saved(MAKES["llama, tied, grouped queries"], folder)
    return open_model(str(folder))


def planned(source: Model, steps: tuple[Step, ...], **more: Any) -> tuple[Plan, Model]:
    recipe = Recipe(steps=steps)
    model = prepared(source, recipe)
    given: dict[str, Any] = {"samples": 3, "tokens": 10, "budget": None, "size": None, "seed": None, **more}
    return make(model, recipe, dtype=torch.float32, **given), model


def taken(made: Plan, model: Model, out: Path) -> dict[str, Tensor]:
    """Squared gradients by full name, as the pass leaves them in the work folder."""
    found: dict[str, Tensor] = {}
    with Work(out, "key") as work:
        fisher.take(made, model, IDS, work, Quiet(), 0)
        assert not list(work.folder.glob("*.bin")), "neither hidden states nor gradients stay"
        for block, prefix in enumerate(model.skeleton.block_names):
            found |= {f"{prefix}.{n}": x for n, x in load_file(fisher.path_of(work, block)).items()}
    return found


@pytest.mark.parametrize("make_config", MAKES.values(), ids=MAKES)
def test_equals_autograd_on_the_whole_model(make_config: Callable[[], Any], tmp_path: Path) -> None:
    """Relative difference of each linear below 1e-4, and no number further off than 1e-4 of the largest."""
    whole = saved(make_config, tmp_path / "model")
    made, model = planned(open_model(str(tmp_path / "model")), SQUEEZE)
    found = taken(made, model, tmp_path / "out")
    model.load(model.skeleton.shapes)
    modules = {n: model.skeleton.tensor(f"{n}.weight").requires_grad_() for n in found}
    expected = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in modules.items()}
    for row in IDS:
        for value in modules.values():
            value.grad = None
        with torch.enable_grad():
            logits = model.skeleton.model(input_ids=row[None], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]).backward()
        for name, value in modules.items():
            if value.grad is not None:
                expected[name] += value.grad.double() ** 2 / len(IDS)
    # The skeleton is the same function as the model that transformers loads.
    torch.testing.assert_close(
        model.skeleton.model(input_ids=IDS, use_cache=False).logits, whole(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )
    assert set(found) == {x.name for x in made.compressed}
    for plan in made.compressed:
        want = expected[plan.name].T if plan.linear.transposed else expected[plan.name]
        got = found[plan.name].double()
        assert got.shape == (plan.linear.out_features, plan.linear.in_features)
        assert float((got - want).norm()) <= 1e-4 * float(want.norm())
        assert float((got - want).abs().max()) <= 1e-4 * float(want.max()) + 1e-30


def test_fewer_samples_where_asked_for(source: Model, tmp_path: Path) -> None:
    few = (Step(method="squeezellm", target=TARGET, options={"fisher_samples": 1}),)
    made, model = planned(source, few)
    assert made.resolved.fisher(3) == 1
    assert planned(source, SQUEEZE)[0].resolved.fisher(3) == 3
    assert not made.resolved.needs, "squared gradients are no statistic of inputs"
    assert made.resolved.reads_tokens
    one = taken(made, model, tmp_path / "one")
    parts = backward.fisher(
        model.skeleton, model.read, Samples(IDS[:1], tmp_path), [[f"{n}.weight" for n in one]] * LAYERS
    )
    for _, found, _ in parts:
        for name, value in found.items():
            torch.testing.assert_close(one[name.removesuffix(".weight")], value, rtol=0, atol=0)


def test_folds_change_squares_as_they_change_gradients(source: Model, tmp_path: Path) -> None:
    """w' = w s: dL / dw' = dL / dw / s; seen through the weights that squeezellm is given after smoothquant."""
    made, model = planned(source, (Step(method="smoothquant"), *SQUEEZE))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    made_of = fisher.layer

    def spied(path: Path | None, plan: Any, weights: Any) -> Any:
        layer = made_of(path, plan, weights)
        assert layer.fisher is not None
        seen[plan.name] = layer.fisher, layer.weight
        return layer

    with pytest.MonkeyPatch.context() as patch, Work(tmp_path / "out", "key") as work:
        patch.setattr(fisher, "layer", spied)
        stream.run(made, model, IDS, work, Quiet())
    plain = taken(*planned(source, SQUEEZE), tmp_path / "plain")
    changed = 0
    for name, (value, weight) in seen.items():
        before = source.read(f"{name}.weight").float()
        torch.testing.assert_close(value * weight**2, plain[name] * before**2, rtol=1e-4, atol=1e-12)
        changed += not torch.equal(before, weight)
    assert changed >= 5 * LAYERS


class KilledError(Exception):
    """Stands for kill -9."""


def run(made: Plan, model: Model, out: Path, *, tidy: bool = False) -> tuple[list[str], dict[str, str]]:
    with Work(out, "key") as work:
        stream.run(made, model, IDS, work, Quiet())
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in work.staging.glob("*.safetensors")}
        left = [p.name for p in work.folder.iterdir() if p.name != "journal.jsonl"]
        assert not (tidy and left), "squares and states do not outlive the run"
        return [r["kind"] for r in work.records], files


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_run_stopped_at_any_record_ends_with_the_same_bytes(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    also = (Step(method="codebook", target=TARGET, options={"weigh": "fisher", "refits": 0}),)
    made, model = planned(source, also if calibrated else SQUEEZE)
    kinds, expected = run(made, model, tmp_path / "whole", tidy=True)
    assert kinds.count("fisher") == LAYERS
    squares = backward._squares
    done: list[None] = []
    monkeypatch.setattr(backward, "_squares", lambda *a: (done.append(None), squares(*a))[1])
    note = Work.note
    for after in range(len(kinds)):
        for before in (True, False):
            out, seen = tmp_path / f"{after}-{before}", iter(range(len(kinds)))

            def stopped(
                self: Work, record: Mapping[str, Any], seen: Any = seen, after: int = after, before: bool = before
            ) -> None:
                if next(seen) < after:
                    note(self, record)
                    return
                if not before:
                    note(self, record)
                raise KilledError

            done.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Work, "note", stopped)
                with pytest.raises(KilledError):
                    run(made, model, out)
            again, files = run(made, model, out)
            assert files == expected
            assert again == kinds
            assert len(done) <= LAYERS + (before and kinds[after] == "fisher")


def test_another_gradient_in_the_work_folder_is_noticed(source: Model, tmp_path: Path) -> None:
    made, model = planned(source, SQUEEZE)
    out, note = tmp_path / "out", Work.note

    def stopped(self: Work, record: Mapping[str, Any]) -> None:
        note(self, record)
        if record["kind"] == "fisher":
            raise KilledError

    with pytest.MonkeyPatch.context() as patch, Work(out, "key") as work:
        patch.setattr(Work, "note", stopped)
        with pytest.raises(KilledError):
            stream.run(made, model, IDS, work, Quiet())
    path = work.folder / f"gradient-{LAYERS - 1:04d}.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(LilliputError, match="not what the unfinished run wrote"):
        run(made, model, out)


def test_infinite_gradients_are_refused_by_name(source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = planned(source, SQUEEZE)
    name = "model.layers.1.mlp.up_proj.weight"
    read = model.read

    def broken(asked: str) -> Tensor:
        value = read(asked)
        return value * float("inf") if asked == name else value

    monkeypatch.setattr(model, "read", broken)
    with pytest.raises(LilliputError, match=r"Fisher information of model\."):
        taken(made, model, tmp_path / "out")


def test_disk_and_memory_are_planned(source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = planned(source, SQUEEZE)
    most, alive = [0], {}
    real, gone = Activations.__init__, Activations.delete

    def counted(
        self: Activations, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, create: bool
    ) -> None:
        real(self, path, shape, dtype, create=create)
        alive[path] = path.stat().st_size
        most[0] = max(most[0], sum(alive.values()))

    monkeypatch.setattr(Activations, "__init__", counted)
    monkeypatch.setattr(Activations, "delete", lambda self: (alive.pop(self.path, None), gone(self))[1])
    found = taken(made, model, tmp_path / "out")
    assert 0.7 * fisher.cost(made, model).disk <= most[0] <= fisher.cost(made, model).disk
    assert fisher.stored(made).disk == 4 * sum(x.numel() for x in found.values())
    assert fisher.stored(planned(source, (Step(method="rtn", target=Target(bits=4)),))[0]).disk == 0


def test_too_little_memory_names_what_the_backward_pass_needs(tiny: Callable[[str], Path]) -> None:
    model = open_model(str(tiny("wide")))
    tokens = 4096
    made = planned(model, SQUEEZE, tokens=tokens, measured=False)[0]
    assert made.batching.where == "the backward pass for squared gradients"
    with pytest.raises(PlanError, match="the backward pass for squared gradients alone needs") as refused:
        planned(model, SQUEEZE, tokens=tokens, budget=made.batching.bytes - 10**6, measured=False)
    named = re.search(r"give --memory ([\d.]+)MB", str(refused.value))
    assert named is not None
    planned(model, SQUEEZE, tokens=tokens, budget=int(float(named[1]) * 1e6), measured=False)


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if place and place not in self._known:
                    self._known.add(place)
                    self.now += size
                    weakref.finalize(storage, self._gone, place, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def test_depth_costs_no_memory(tmp_path: Path) -> None:
    """Four times the blocks, and no more bytes that live at once: fewer than the weights alone have."""
    peaks: list[int] = []
    for layers in (3, 12):
        sizes = {**SHAPE, "num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 128}
        saved(lambda sizes=sizes: tf.LlamaConfig(**sizes), tmp_path / f"{layers}")  # type: ignore[misc]
        made, model = planned(open_model(str(tmp_path / f"{layers}")), SQUEEZE)
        with Living() as living, Work(tmp_path / f"out-{layers}", "key") as work:
            fisher.take(made, model, IDS, work, Quiet(), 0)
        peaks.append(living.most)
    block = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert block < peaks[0] < 12 * block
    assert peaks[1] < 1.05 * peaks[0]


def test_a_folder_from_a_run_opens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    done = api.compress(
        tiny("llama"), tmp_path / "out", recipe="squeezellm", samples=2, tokens=32, device="cpu", dtype="float32",
        eval_windows=0, progress=Quiet(),
    )  # fmt: skip
    assert sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors")) == done.plan.bytes
    assert torch.isfinite(api.load(tmp_path / "out")(input_ids=IDS).logits).all()


def test_two_ranks_share_the_samples(source: Model, tmp_path: Path) -> None:
    """Each rank's part by itself, added up as ranks do it, is the whole; a rank without samples adds nothing."""
    made, model = planned(source, SQUEEZE)
    whole = taken(made, model, tmp_path / "whole")
    sums: dict[str, Tensor] = {}
    names = [[f"{n}.weight" for n in whole]] * LAYERS
    for n, some in enumerate((IDS[:1], IDS[1:], IDS[3:])):
        (tmp_path / str(n)).mkdir()
        for _, found, _ in backward.fisher(model.skeleton, model.read, Samples(some, tmp_path / str(n)), names):
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros(())) + value
    for name, value in whole.items():
        torch.testing.assert_close(sums[f"{name}.weight"] / 3, value, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    tiny: Callable[[str], Path], together: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Sums in another order move squares by 1e-7, which may turn a code at a tie: 99.9 % of all bytes are equal."""
    line = ["compress", str(tiny("llama")), "--recipe", "squeezellm", "--samples", "3", "--tokens", "32"]
    line += ["--device", "cpu", "--dtype", "float32", "--eval-windows", "0", "--out"]
    for count in (1, 2):
        ended = together(ranks=count, line=[*line, str(tmp_path / str(count))])
        assert ended["code"] == [0] * count, ended["stderr"]
    one, two = ({n: x for f in sorted((tmp_path / str(c)).glob("*.safetensors")) for n, x in load_file(f).items()}
                for c in (1, 2))  # fmt: skip
    assert one.keys() == two.keys()
    equal = sum(
        int((one[n].contiguous().view(torch.uint8) == two[n].contiguous().view(torch.uint8)).sum()) for n in one
    )
    assert equal >= 0.999 * sum(x.numel() * x.element_size() for x in one.values())
