"""docs/detectors.md is what the code says, and the generator that makes it shows all there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from docs import generate, measured
from oodmon.cli import main
from oodmon.cli.markdown import entries, overview
from oodmon.registry import detectors

PAGE = Path(generate.__file__).parent / "detectors.md"
OWN = [name for name in detectors.names() if detectors.get(name).__module__.startswith("oodmon.")]


@pytest.mark.parametrize("name", generate.PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    made = generate.PAGES[name]()
    assert (PAGE.parent / name).read_text(encoding="utf-8") == made, f"{name}: run `make docs`"


def section(name: str) -> str:
    (_, _, rest) = PAGE.read_text(encoding="utf-8").partition(f"### `{name}`\n")
    assert rest, f"{name} has no section"
    return rest.partition("\n### ")[0]


@pytest.mark.parametrize("name", OWN)
def test_every_detector_is_told_whole(name: str) -> None:
    """Held against the class itself, not against what the generator reads."""
    cls = detectors.get(name)
    told = section(name)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        (line,) = [line for line in told.splitlines() if line.startswith(f"| `{field.name}` |")]
        if field.default is not dataclasses.MISSING:
            assert line.endswith(f"| `{field.default!r}` |")
    paper = cls.paper
    assert paper is None or (paper.title in told and paper.url in told)
    assert f"cost {cls.cost}" in told
    (line,) = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| [`{name}`](#{name}) |")
    ]
    assert f"| {cls.cost} |" in line


ROW = {
    "name": "mine",
    "summary": "P(A|B) of it.",
    "module": "mine.parts",
    "doc": "P(A|B) of it.\n\nReads      ``x`` (B, D)\nScore      y\n\nSee ``z``.",
    "paper": "Ann, Bob and Cy, ICML 2001",
    "title": "On It",
    "url": "",
    "reads": "logits",
    "cost": "C",
    "stability": "beta",
    "options": [
        {"name": "path", "takes": "text", "default": None},
        {"name": "kind", "takes": "one of a | b", "default": "'a'"},
    ],
}


def test_markdown_of_one_component() -> None:
    table = overview([ROW, {"name": "bad", "broken": "no module"}]).splitlines()
    assert table == [
        "| `type` | in one sentence | reads | cost | file | paper |",
        "| --- | --- | --- | --- | --- | --- |",
        "| [`mine`](#mine) | P(A\\|B) of it. | logits | C | `parts.py` | Ann et al., ICML 2001 |",
    ]
    assert entries([ROW]) == (
        "### `mine`\n\nP(A|B) of it.\n\n"
        "```text\nReads      ``x`` (B, D)\nScore      y\n```\n\nSee `z`.\n\n"
        "| option | takes | default |\n| --- | --- | --- |\n"
        "| `path` | text | required |\n| `kind` | one of a \\| b | `'a'` |\n\n"
        "beta · [`mine/parts.py`](../mine/parts.py) · cost C · On It, Ann, Bob and Cy, ICML 2001\n"
    )


def test_columns_that_nothing_fills_are_left_out() -> None:
    bare = {**ROW, "paper": "", "reads": "", "cost": ""}
    assert overview([bare]).splitlines()[0] == "| `type` | in one sentence | file |"


def test_catalog_prints_markdown_with_plugins() -> None:
    shown = CliRunner().invoke(main, ["catalog", "detectors", "--markdown"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("## detectors\n\n| `type` |")
    assert "### `msp`" in shown.stdout
    both = CliRunner().invoke(main, ["catalog", "--markdown", "--json"])
    assert both.exit_code == 2
    assert "give one of them" in both.output


def test_tables_of_measurements_are_best_first_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(detector: str, data: str, auroc: float) -> dict[str, object]:
        figures = {"auroc": auroc, "fpr95_ood": 1.0 - auroc}
        return {"network": "net", "detector": detector, "data": data, "ours": figures}

    table = {
        "lines": [
            line("msp", "near", 0.6),
            line("msp", "far", 0.7),
            line("gram, two", "near", 0.5),
            line("gram, two", "far", 0.9),
        ],
        "exposure": [{"network": "net", "data": "far", "before": 0.5, "after": 0.75}],
    }
    (tmp_path / "published_weights.json").write_text(json.dumps(table))
    monkeypatch.setattr(measured, "_FOLDER", tmp_path)
    assert measured.published().splitlines() == [
        "| net | near | far | mean |",
        "| --- | --- | --- | --- |",
        "| `gram`, two | 0.500 / 0.50 | 0.900 / 0.10 | 0.700 |",
        "| `msp` | 0.600 / 0.40 | 0.700 / 0.30 | 0.650 |",
    ]
    assert measured.exposure().splitlines()[2:] == ["| net | far | 0.500 | 0.750 |"]
