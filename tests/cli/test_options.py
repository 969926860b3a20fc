"""Groups of options: laid out as single ones for the command line, and one object for the command."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lilliput.cli.options import Job, Measure, grouped
from lilliput.errors import PlanError
from lilliput.options import Limits, Text


@dataclass(frozen=True)
class Pair:
    many: Annotated[int, typer.Option(min=1, help="How many.")] = 2
    names: Annotated[list[str] | None, typer.Option("--name", help="Which.")] = None


def test_a_group_becomes_options_and_arrives_as_one_object() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @grouped
    def go(model: str, *, first: bool = False, pair: Pair, last: int = 0) -> None:
        """Goes."""
        seen.append((model, first, pair, last))

    runner = CliRunner()
    assert runner.invoke(app, ["m"]).exit_code == 0
    assert runner.invoke(app, ["m", "--many", "3", "--name", "a", "--name", "b", "--last", "1"]).exit_code == 0
    assert seen == [("m", False, Pair(), 0), ("m", False, Pair(3, ["a", "b"]), 1)]
    assert runner.invoke(app, ["m", "--many", "0"]).exit_code == 2
    assert len(seen) == 2
    shown = runner.invoke(app, ["--help"]).stdout
    assert [x for x in ("--first", "--many", "--name", "--last", "--pair", "Goes.") if x in shown] == [
        "--first",
        "--many",
        "--name",
        "--last",
        "Goes.",
    ]


def test_sizes_are_read_by_their_option_s_name() -> None:
    arguments = Job(memory="2GB", size="1MB").arguments()
    assert (arguments["memory"], arguments["size"]) == (2_000_000_000, 1_000_000)
    assert Measure(memory="2GB").limits() == Limits(2_000_000_000)
    for wrong, option in ((Job(memory="much"), "--memory"), (Job(size="much"), "--size")):
        with pytest.raises(PlanError, match=option):
            wrong.arguments()


def test_what_is_measured_on_has_a_default() -> None:
    assert Measure().text() == Text(("docs:library",), 8, None, None)
    assert Measure(data=["a.txt", "b.txt"], windows=3).text(5) == Text(("a.txt", "b.txt"), 3, None, 5)
