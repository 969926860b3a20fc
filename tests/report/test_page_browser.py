"""The pages in a real browser: they open silently, ask for nothing, and every figure is there to be seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lilliput.report.compare import render_comparison

pytestmark = [pytest.mark.browser, pytest.mark.slow]

_BOXES = """[...document.querySelectorAll('.drawn')].map(figure => {
  const shown = [...figure.querySelectorAll('svg')].filter(svg => getComputedStyle(svg).display !== 'none');
  const box = shown[0].getBoundingClientRect();
  const parts = [...shown[0].querySelectorAll('path, use')].filter(part => {
    const { width, height } = part.getBoundingClientRect();
    return width + height > 1;
  });
  const words = [...shown[0].querySelectorAll('text')].map(word => word.getBoundingClientRect());
  const outside = words.filter(x => x.left < box.left - 2 || x.right > box.right + 2).length;
  const size = Math.min(...words.map(word => word.height));
  return { shown: shown.length, width: box.width, height: box.height, parts: parts.length, outside, size };
})"""
_CONTRAST = """(() => {
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = rgb => rgb.map(x => linear(x / 255))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const behind = node => { for (; node; node = node.parentElement) {
    const found = getComputedStyle(node).backgroundColor;
    if (!/^rgba.*, 0\\)$/.test(found)) return rgb(found);
  } return [255, 255, 255]; };
  const worst = {};
  for (const node of document.querySelectorAll('p, td, th, li, dt, dd, a, summary, small, .badge, .drawn text')) {
    const style = getComputedStyle(node);
    const [a, b] = [light(rgb(node.tagName === 'text' ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    worst[node.tagName] = Math.min(worst[node.tagName] ?? 99, ratio);
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, evidence: dict[str, Any], rendered: str) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    other = copy.deepcopy(evidence) | {"model": "out/sample-lm-w8"}
    other["size"]["bytes"] *= 2
    for row in other["quality"]["data"]:
        row["kl"] = {"value": 0.002, "low": 0.001, "high": 0.003}
    written = {"report": rendered, "compare": render_comparison([evidence, other])}
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize(("name", "figures"), [("report", 9), ("compare", 2)])
def test_it_opens_silently_and_shows_every_figure(
    browser: Any, pages: dict[str, Path], name: str, figures: int, width: int, dark: bool
) -> None:
    browser.open(pages[name], width, dark)
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate(_BOXES)
    assert len(boxes) == figures
    for box in boxes:
        assert box["shown"] == 1, box
        assert box["width"] > 280, box
        assert box["height"] > 60, box
        assert box["parts"] >= 2, box
        assert box["outside"] == 0, box
        assert box["size"] >= 9, box
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(x) for x in colour.removeprefix("rgb(").removesuffix(")").split(",")) < 200) == dark
    assert all(ratio >= 4.5 for ratio in browser.evaluate(_CONTRAST).values()), browser.evaluate(_CONTRAST)


def test_the_verdict_is_seen_without_scrolling_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 375, dark=False)
    assert browser.evaluate("document.querySelector('.headline').getBoundingClientRect().bottom") < 300
    assert browser.evaluate("document.querySelector('.figures').getBoundingClientRect().bottom") < 667


def test_a_table_sorts_by_number_and_by_name(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280, dark=False)
    cells = "[...document.querySelectorAll('#tensors tbody tr')].map(row => row.cells[{}].{})"
    click = "[...document.querySelectorAll('#tensors th button')].find(x => x.textContent === '{}').click()"
    browser.evaluate(click.format("size"))
    sizes = browser.evaluate(f"{cells.format(4, 'dataset.v')}.map(Number)")
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    browser.evaluate(click.format("size"))
    assert browser.evaluate(f"{cells.format(4, 'dataset.v')}.map(Number)") == sizes[::-1]
    browser.evaluate(click.format("tensor"))
    assert browser.evaluate(cells.format(0, "textContent"))[0] == "model.embed_tokens.weight"
    assert browser.complaints() == []


def test_the_switch_turns_light_into_dark_and_back(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280, dark=False)
    seen = []
    for _ in range(3):
        seen.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.evaluate("document.getElementById('theme').click()")
    assert seen[0] == seen[2] != seen[1]


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280, dark=True)
    assert browser.pdf().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.scroll')).overflow") == "visible"
    assert all(box["shown"] == 1 and box["height"] > 60 for box in browser.evaluate(_BOXES))
