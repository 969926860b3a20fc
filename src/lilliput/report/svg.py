"""matplotlib's drawings as inline SVG that takes its colours and its font from the page.

Each drawing is made twice, for a screen and for a phone, because text that shrinks with its figure cannot be read.
Colours are tokens: matplotlib draws with a stand-in, and the stand-in becomes `var(--token)`, so that light and dark
are a matter of the style sheet. Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.errors import LilliputError
from lilliput.report.cells import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 720, 340  # CSS pixels
HEATS = 9  # steps of the scale of a heat map
_TOKENS = (
    *("ink", "muted", "grid", "surface", "base", "ours", "second", "ok", "loss", "unsure", "bad"),
    *(f"heat{i}" for i in range(HEATS)),
)
# Stand-ins that no drawing of matplotlib contains by itself.
COLOUR: Mapping[str, str] = {token: f"#0a0b{i + 16:02x}" for i, token in enumerate(_TOKENS)}
_TIP = "tip:"
_SHORT = re.compile(r"(\d+\.\d{2})\d+")  # a hundredth of a pixel is enough


@dataclass(frozen=True)
class Picture:
    """A drawing, twice as SVG text; `label` tells what it shows to those who do not see it; `table` is its data.

    legend: (colour token, words); scale: the words at both ends of the heat scale.
    """

    wide: str
    narrow: str
    label: str
    caption: str
    table: Table
    legend: tuple[tuple[str, str], ...] = ()
    scale: tuple[str, str] | None = None


@dataclass(frozen=True)
class Canvas:
    """Where a painter draws. `narrow`: on a phone; `heat` colours: COLOUR["heat0"] and so on."""

    axes: Axes
    narrow: bool


Paint = Callable[[Canvas], None]


def require() -> None:
    """Raises LilliputError where the libraries of the report are not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LilliputError(
            f"the HTML report needs {error.name}, which is not installed: run `pip install 'lilliput[report]'`, "
            "or ask for --json instead"
        ) from None


def tip(text: str) -> str:
    """A gid for an artist whose SVG group is to carry `text` as a tooltip."""
    return _TIP + text


def draw(name: str, paint: Paint, heights: tuple[float, float]) -> tuple[str, str]:
    """SVG of a painter's axes for a screen and for a phone. `name` is unique on the page; heights in CSS pixels."""
    return _draw(f"{name}-w", paint, WIDE, heights[0]), _draw(f"{name}-n", paint, NARROW, heights[1])


def _settings(salt: str) -> dict[str, Any]:
    ink, muted, grid = COLOUR["ink"], COLOUR["muted"], COLOUR["grid"]
    return {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 12,
        "font.family": "DejaVu Sans",  # matplotlib brings it along: the same measures on every machine
        "text.parse_math": False,  # a model may be called a$b$c
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": grid,
        "grid.linewidth": 1.0,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": ink,
        "xtick.labelsize": 11,
        "ytick.labelsize": 12,
        "ytick.major.size": 0,
        "xtick.major.size": 0,
        "path.simplify": False,
    }


def _draw(name: str, paint: Paint, width: float, height: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names in scripts that DejaVu lacks are measured wrong and shown right, by the reader's own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update(_settings(name))
        layout = ConstrainedLayoutEngine(w_pad=4 / 72, h_pad=4 / 72)
        figure = Figure(figsize=(width / 72, height / 72), layout=layout)
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        paint(Canvas(figure.add_subplot(), narrow=width == NARROW))
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), name, width)


def _inline(text: str, name: str, width: float) -> str:
    """matplotlib's file as an element of a page: no header, no metadata, no global style, ids of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', text)
    head = f'<svg viewBox="{view[1] if view else ""}" style="max-width:{width:g}px" aria-hidden="true">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'<g id="' + _TIP + r'([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="(?!' + _TIP + r')[^"]*">', "<g>", text)  # nobody refers to groups
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: _SHORT.sub(r"\1", match[0]), text)
    text = re.sub(r">\s+<", "><", text)
    for token, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{token})")
    return text


def clean(text: object) -> str:
    """Text as SVG can hold it: control characters, which XML forbids, become spaces."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", str(text))
