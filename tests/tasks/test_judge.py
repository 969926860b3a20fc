"""A judge behind an OpenAI-compatible server: both orders, ties, errors, and what is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lilliput.errors import DataError
from lilliput.metrics import paired
from lilliput.options import Judge
from lilliput.tasks import judge as judges
from lilliput.tasks.answers import AnswerStore
from lilliput.tasks.instructions import compare_instructions, separate
from lilliput.tasks.judge import preferred


class Server:
    """Answers chats by `say(answer A, answer B)`; `fail`: statuses to give before that; `seen`: requests."""

    def __init__(self) -> None:
        self.say: Callable[[str, str], str] = lambda a, b: "[[C]]"
        self.fail: list[int] = []
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                status = outer.fail.pop(0) if outer.fail else 200
                said = outer.answer(body["messages"][-1]["content"])
                data = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                whole = json.dumps(data if status == 200 else {"error": "not now"}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, text: str) -> str:
        if "[Answer of assistant A]" not in text:
            return "yes"
        first, second = (text.split(f"[Answer of assistant {x}]\n")[1].split(f"\n[End of answer {x}]")[0] for x in "AB")
        return self.say(first, second)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def longest(a: str, b: str) -> str:
    """A judge with a taste: the longer answer."""
    return "So [[A]] or [[B]]?\n" + ("[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]")


def test_the_last_verdict_counts_and_none_is_a_tie() -> None:
    assert preferred("First I thought [[A]], but [[B]]") == "B"
    assert preferred("[[C]]") == preferred("no idea") == preferred("") == "C"


def test_wins_ties_and_losses(server: Server) -> None:
    server.say = longest
    prompts = [f"p{i}" for i in range(5)]
    (found,) = judges.compare(
        Judge(server.url, "m"),
        prompts,
        ["long one", "s", "same", "xx", "long one"],
        ["short", "longer", "same", "yy", "s"],
    )
    assert (found.prompts, found.wins, found.ties, found.losses) == (5, 2, 2, 1)
    assert found.win_rate is not None
    assert found.win_rate.value == pytest.approx(0.6)
    assert found.p_value == paired.mcnemar(1, 2)
    assert found.consistent is not None
    assert found.consistent.value == 1.0
    assert len(server.seen) == 8  # equal answers are not sent


def test_a_judge_that_prefers_the_first_place_decides_nothing(server: Server) -> None:
    server.say = lambda a, b: "[[A]]"
    (found,) = judges.compare(Judge(server.url, "m"), ["p", "q"], ["a", "b"], ["c", "d"])
    assert (found.wins, found.ties, found.losses) == (0, 2, 0)
    assert found.consistent is not None
    assert found.consistent.value == 0.0


def test_categories_come_after_all(server: Server) -> None:
    server.say = longest
    found = judges.compare(
        Judge(server.url, "m"), ["p", "q", "r"], ["aa", "b", "cc"], ["a", "bb", "c"], categories=["x", "y", "x"]
    )
    assert [(x.name, x.prompts, x.wins) for x in found] == [("all", 3, 2), ("x", 2, 2), ("y", 1, 0)]
    assert found[2].win_rate is None


def test_the_key_travels_in_a_header_and_is_not_shown(server: Server) -> None:
    judge = Judge(server.url, "m", key="secret")
    judges.check(judge)
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert "secret" not in repr(judge)


def test_a_busy_server_is_asked_again_and_a_wrong_one_is_named(server: Server) -> None:
    server.fail = [503, 429]
    judges.check(Judge(server.url, "m", wait=0.0))
    assert len(server.seen) == 3
    server.fail = [404]
    with pytest.raises(DataError, match=r"'m' at http.*status 404.*not now.*--judge-model"):
        judges.check(Judge(server.url, "m", wait=0.0))
    server.fail = [302]
    with pytest.raises(DataError, match="status 302"):
        judges.check(Judge(server.url, "m", wait=0.0))
    assert len(server.seen) == 5
    with pytest.raises(DataError, match="not a judge"):
        judges.check(Judge("localhost:8000", "m"))
    with pytest.raises(DataError, match="refused"):
        judges.check(Judge("http://127.0.0.1:1/v1", "m", wait=0.0))


def test_answers_are_kept(server: Server, tmp_path: Path) -> None:
    server.say = longest
    judge = Judge(server.url, "m")
    first = judges.compare(judge, ["p"], ["aa"], ["a"], store=AnswerStore(tmp_path / "judge.jsonl"))
    again = judges.compare(judge, ["p"], ["aa"], ["a"], store=AnswerStore(tmp_path / "judge.jsonl"))
    assert first == again
    assert len(server.seen) == 2


def test_instructions_are_judged(server: Server, tiny: Any, noisy: Path, jsonl: Any, tmp_path: Path) -> None:
    server.say = longest
    rows = [
        {"turns": [f"Explain {x}."], "category": c} for x, c in zip(("names", "objects", "classes"), "aab", strict=True)
    ]
    path = jsonl("v.jsonl", *rows)
    judge = Judge(server.url, "m")
    found = compare_instructions(noisy, tiny("llama"), path, tokens=8, judge=judge, work=tmp_path / "work")
    assert (found.judge, [x.name for x in found.judged]) == ("m", ["all", "a", "b"])
    assert found.judged[0].prompts == 3
    json.dumps(found.to_json())
    assert (tmp_path / "work" / "judge.jsonl").exists()


def test_a_judge_needs_instructions(server: Server, jsonl: Any) -> None:
    judge = Judge(server.url, "m", wait=0.0)
    with pytest.raises(DataError, match="--tasks instructions=FILE"):
        separate(["piqa"], "base", judge)
    path = jsonl("v.jsonl", {"prompt": "a"}, {"prompt": "b"})
    server.fail = [401]
    with pytest.raises(DataError, match="status 401"):
        separate([f"instructions={path}"], "base", judge)
