"""The page of an evaluation: whole, self-contained, and right where a detector could not score."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from oodmon.evaluate import evaluate
from oodmon.report.evaluated import write

HOSTILE = "<script>alert('x')</script>$\\frac{1}$"


class _Closed(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "path", "use", "rect", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "path", "use", "rect", "br"}:
            assert self.open.pop() == tag


def written(path: Path) -> str:
    draw = np.random.default_rng(0)
    ids = draw.normal(size=600).astype(np.float32)
    inside = {"good": ids, "constant": np.zeros(600, np.float32), HOSTILE: ids, "blind": ids}
    far = (ids[:300] + 3.0).astype(np.float32)
    far[0] = np.inf
    nothing = np.full(300, np.nan, np.float32)
    found = {
        "far": {"good": far, "constant": far, HOSTILE: ids[:300], "blind": nothing},
        HOSTILE: {**dict.fromkeys(inside, ids[:300]), "constant": np.full(300, -1.0, np.float32)},
    }
    table = {
        name: {
            key: None if np.isnan(scores).all() else evaluate(inside[key], scores)
            for key, scores in column.items()
        }
        for name, column in found.items()
    }
    write(path, f"net {HOSTILE}", "1", inside, found, table)
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = written(tmp_path / "deep" / "page.html")
    parsed = _Closed(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"#0[1-5]0[1-5]0[1-6]", page), "a placeholder colour was left"
    assert written(tmp_path / "again.html") == page, "the same scores give the same file"


def test_tables_are_best_first_and_a_dash_where_nothing_was_scored(tmp_path: Path) -> None:
    page = written(tmp_path / "page.html")
    assert "<h1>good separates best: AUROC 0.7" in page, "its mean is about (1 + 0.5) / 2"
    summary = page.split("<h2>AUROC</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in summary.split("<tr>")[2:]]
    assert [row[0] for row in rows][-1] == "blind"
    assert rows[-1][1] == "–"
    assert rows[-1][3] == "–", "no mean over what could not be judged"
    means = [float(row[3]) for row in rows[:-1]]
    assert means == sorted(means, reverse=True)
    assert "none could be scored" in page


def test_a_detector_has_one_look_in_every_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, tuple[str, str]]] = []
    plot = Axes.plot

    def noted(self: Axes, *values: Any, **options: Any) -> Any:
        if "label" in options:
            name = options["label"].rpartition(" ")[0]
            drawn.append((name, (options["color"], options["ls"])))
        return plot(self, *values, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    draw = np.random.default_rng(1)
    names = [f"detector{number}" for number in range(9)]
    inside = {name: draw.normal(size=200).astype(np.float32) for name in names}
    found = {
        data: {
            name: (draw.normal(size=200) + shift * place).astype(np.float32)
            for place, name in enumerate(names)
        }
        for data, shift in (("rising", 0.4), ("falling", -0.4))
    }
    table = {
        data: {name: evaluate(inside[name], scores) for name, scores in column.items()}
        for data, column in found.items()
    }
    write(tmp_path / "page.html", "net", "1", inside, found, table)
    looks = set(drawn)
    assert len(drawn) == 12, "the best six of each set"
    assert len({name for name, _ in looks}) == len({look for _, look in looks}) == len(looks)


def test_labels_of_tiny_scores_do_not_run_into_each_other(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).exponential(1e-5, 400).astype(np.float32)
    found = {"far": {"gram": ids * 3.0}}
    table = {"far": {"gram": evaluate(ids, ids * 3.0)}}
    write(tmp_path / "page.html", "net", "1", {"gram": ids}, found, table)
    scores = (tmp_path / "page.html").read_text(encoding="utf-8").split("<svg")[2]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", scores)
    numbers = [label for label in labels if re.fullmatch(r"[\d.−-]+", label)]
    assert 2 <= len(numbers) <= 7
    assert max(map(len, numbers)) <= 4, numbers
