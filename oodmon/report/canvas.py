"""What pages and their figures share: style, and SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from oodmon.report import wording

__all__ = ["ALARM", "GRID", "INK", "MUTED", "SERIES", "page", "plain", "svg"]

_FOLDER: Final = Path(__file__).parent
_WIDTH: Final = 9.6

# matplotlib writes colours as #rrggbb; these stand for the page's own and are replaced by them.
INK, MUTED, GRID, ALARM = "#010101", "#020202", "#030303", "#040404"
SERIES: Final = ("#050501", "#050502", "#050503", "#050504", "#050505", "#050506")
_VARIABLES: Final = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    ALARM: "var(--alarm)",
    **{colour: f"var(--series-{place})" for place, colour in enumerate(SERIES, 1)},
}

_STYLE: Final[Any] = {
    "text.parse_math": False,  # names are names, whatever signs they hold
    "svg.fonttype": "none",
    "svg.hashsalt": "oodmon",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.constrained_layout.use": True,
}


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled; words of `wording` are its filters."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(wording, name) for name in wording.__all__}
    style = Markup((_FOLDER / "page.css").read_text(encoding="utf-8"))  # noqa: S704 - ours
    return environment.get_template(template).render(style=style, **values)


def svg(name: str, height: float, draw: Callable[[Figure], None], described: str) -> str:
    """Draw a figure and make it part of a page: no namespaces, no ids that clash, page colours."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"#0[1-5]0[1-5]0[1-6]\b", lambda m: _VARIABLES.get(m[0], m[0]), text)
    text = text.replace("'DejaVu Sans', ", "")
    return text.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)


def plain(name: str) -> str:
    """A name that is not longer than a title."""
    return name if len(name) <= 60 else name[:57] + "…"
