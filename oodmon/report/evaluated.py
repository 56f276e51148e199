"""Figures of an evaluation → one self-contained HTML file: tables, ROC curves, scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from oodmon.evaluate import Evaluation, means, roc
from oodmon.report.canvas import GRID, MUTED, SERIES, page, plain, svg

__all__ = ["write"]

Scores = npt.NDArray[np.float32]
Found = Mapping[str, Mapping[str, Scores]]
"""Data set → detector → scores."""

_CURVES: Final = len(SERIES)
"""ROC curves in one panel: the best detectors on that data set."""
_PANELS: Final = 12
"""Detectors whose scores are drawn: the best on average."""
_BINS: Final = 60
_TRIM: Final = (0.005, 0.995)
"""Scores are drawn between these quantiles of all that are shown; the rest is at the edges."""
_USUAL: Final = (0.05, 0.95)
_REACH: Final = 6.0
"""And no farther from in-distribution's usual scores than so many times their range."""
_POINTS: Final = 400
"""Of a curve: more than a screen shows."""
_COLUMNS: Final = 3
_TICKS: Final = 5
_PLAIN: Final = (-2, 4)
"""Scores outside of these powers of ten are written as a number times one: else labels overlap."""


def write(
    path: Path,
    model: str,
    version: str,
    inside: Mapping[str, Scores],
    found: Found,
    table: Mapping[str, Mapping[str, Evaluation | None]],
) -> None:
    """Write the page; it asks nothing of the network. The same scores give the same file.

    Args:
        inside: detector → in-distribution scores, NaN where it could not score one.
        found: the same for each data set.
        table: what `oodmon.evaluate` says of them, none where there is nothing to say.
    """
    mean = means(table)
    order = list(mean)
    text = page(
        "evaluated.html.j2",
        model=model,
        version=version,
        order=order,
        means=mean,
        table=table,
        samples=max((len(scores) for scores in inside.values()), default=0),
        roc=Markup(_curves(inside, found, table, order)),  # noqa: S704 - ours
        scores=Markup(_scores(inside, found, order[:_PANELS])),  # noqa: S704 - ours
        curves=_CURVES,
        panels=_PANELS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _valid(scores: Scores) -> Scores:
    return scores[~np.isnan(scores)]


def _curves(
    inside: Mapping[str, Scores],
    found: Found,
    table: Mapping[str, Mapping[str, Evaluation | None]],
    order: list[str],
) -> str:
    """One panel per data set, in each the best detectors; one has one look in all of them."""
    columns = min(len(found), _COLUMNS)
    rows = -(-len(found) // columns)
    looks = {detector: _look(number) for number, detector in enumerate(order)}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(found):
                axes.set_visible(False)
                continue
            name = list(found)[place]
            judged = {key: one for key, one in table[name].items() if one is not None}
            best = sorted(judged, key=lambda key: -judged[key].auroc)[:_CURVES]
            for detector in best:
                colour, style = looks[detector]
                flagged, caught = _thinned(
                    *roc(_valid(inside[detector]), _valid(found[name][detector]))
                )
                label = f"{plain(detector)} {judged[detector].auroc:.3f}"
                axes.plot(flagged, caught, color=colour, lw=1.4, ls=style, label=label)
            axes.plot([0, 1], [0, 1], color=GRID, lw=1.0, ls="--")
            axes.axhline(0.95, color=MUTED, lw=0.7, ls=":")
            axes.set_xlim(0.0, 1.0)
            axes.set_ylim(0.0, 1.005)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_title(plain(name))
            if place >= len(found) - columns:
                axes.set_xlabel("in-distribution flagged")
            if place % columns == 0:
                axes.set_ylabel("OOD caught")
            axes.legend(loc="lower right", handlelength=1.2)

    return svg("roc", 0.3 + 3.0 * rows, draw, "ROC curves of the best detectors")


def _thinned(
    flagged: npt.NDArray[np.float64], caught: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most so many points, evenly along the curve's length; its ends stay."""
    if len(flagged) <= _POINTS:
        return flagged, caught
    along = flagged + caught  # both never fall, so this is the way along the curve
    places = np.searchsorted(along, np.linspace(0.0, along[-1], _POINTS))
    places[0], places[-1] = 0, len(along) - 1
    places = np.unique(places.clip(0, len(along) - 1))
    return flagged[places], caught[places]


def _scores(inside: Mapping[str, Scores], found: Found, shown: list[str]) -> str:
    """One panel per detector: in-distribution filled, each data set a line."""
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(shown):
                axes.set_visible(False)
                continue
            detector = shown[place]
            sides = {name: _valid(scores[detector]) for name, scores in found.items()}
            edges = _edges(_valid(inside[detector]), list(sides.values()))
            axes.stairs(
                _shares(_valid(inside[detector]), edges),
                edges,
                fill=True,
                color=MUTED,
                alpha=0.35,
                label="in-distribution",
            )
            for number, (name, scores) in enumerate(sides.items()):
                colour, style = _look(number)
                axes.stairs(
                    _shares(scores, edges), edges, color=colour, lw=1.3, ls=style, label=plain(name)
                )
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=_TICKS)
            axes.ticklabel_format(axis="x", scilimits=_PLAIN)
            if place >= len(shown) - columns:
                axes.set_xlabel("score")
            if place % columns == 0:
                axes.set_ylabel("share of samples")
            axes.grid(visible=False)
            axes.set_title(plain(detector))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=min(len(labels), 6))

    return svg("scores", 0.7 + 1.9 * rows, draw, "Scores in distribution and of each data set")


def _look(number: int) -> tuple[str, str]:
    """Colour and dashes of the line with this number."""
    return SERIES[number % len(SERIES)], ("-", "--", ":")[number // len(SERIES) % 3]


def _edges(ids: Scores, sides: list[Scores]) -> npt.NDArray[np.float64]:
    """Edges of the bins; what lies beyond them counts in the outermost."""
    known = ids[np.isfinite(ids)].astype(np.float64)
    together = np.concatenate([ids, *sides]).astype(np.float64)
    together = together[np.isfinite(together)]
    low, high = np.quantile(together, _TRIM) if len(together) else (0.0, 0.0)
    if len(known):
        least, most = np.quantile(known, _USUAL)
        if most > least:
            low = max(low, least - _REACH * (most - least))
            high = min(high, most + _REACH * (most - least))
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, _BINS + 1)


def _shares(scores: Scores, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    counts, _ = np.histogram(np.clip(scores.astype(np.float64), edges[0], edges[-1]), edges)
    shares: npt.NDArray[np.float64] = counts / max(len(scores), 1)
    return shares
