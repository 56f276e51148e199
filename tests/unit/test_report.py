"""The report on a real store that a real pipeline filled."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oodmon.drift.budget import Budget
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.errors import ContractError, StoreError
from oodmon.pipeline import Pipeline
from oodmon.records import Alert, ScoreBatch
from oodmon.report import build, plots, wording
from oodmon.report.thumbnails import thumbnails
from oodmon.rules import Rule
from oodmon.store.events import AgentSeen, Store
from oodmon.store.labels import Prediction
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, calibration

HOSTILE = "<script>alert('x')</script>\"&$\\frac{1}$"
ROWS = 40


def batches(count: int, change_at: int, segments: Sequence[str]) -> Iterator[ScoreBatch]:
    """Two detectors; from `change_at` on a quarter of the samples of one segment is novel."""
    rng = np.random.default_rng(0)
    for sequence in range(count):
        segment = rng.integers(0, len(segments), ROWS).astype(np.int32)
        novel = (sequence >= change_at) & (segment == 0) & (rng.random(ROWS) < 0.5)
        columns = {
            "energy": rng.normal(size=ROWS) + 3.0 * novel,
            "gram": rng.normal(size=ROWS) + 1.5 * novel,
        }
        yield ScoreBatch(
            "digits",
            "1",
            f"agent-{HOSTILE}",
            sequence,
            EPOCH + sequence * SECOND,
            {name: column.astype(np.float32) for name, column in columns.items()},
            {name: f"digest-{name}" for name in columns},
            sample_ids=tuple(f"{HOSTILE}/{sequence}/{row}" for row in range(ROWS)),
            segment=segment,
            segments=tuple(segments),
            predicted=np.where(novel, 3, rng.integers(0, 10, ROWS)).astype(np.int32),
            dropped=1 if sequence == 5 else 0,
            notices=(f"breaker opened: {HOSTILE}",) if sequence == 7 else (),
        )


def fill(url: str, count: int = 120, change_at: int = 70) -> list[Alert]:
    """A store that holds what a pipeline concluded from `batches`."""
    pipeline = Pipeline(
        "digits",
        "1",
        {name: calibration(detector=name) for name in ("energy", "gram")},
        Windowing(length_seconds=2.0, allowed_lateness_seconds=0.0),
        {"budget": Budget("1 per 10000 windows"), "ks": KolmogorovSmirnov()},
        {"novelty": Rule("budget", severity="critical"), HOSTILE: Rule("ks", for_windows=2)},
        flag_level=0.002,
    )
    store = Store(url)
    store.open()
    alerts: list[Alert] = []
    for batch in batches(count, change_at, [HOSTILE, "camera 2"]):
        facts = pipeline.step(batch)
        alerts += [fact for fact in facts if isinstance(fact, Alert)]
        seen = AgentSeen(
            source=batch.source,
            model=batch.model,
            version=batch.version,
            sequence=batch.sequence,
            observed_at=batch.observed_at,
            samples=batch.rows,
            dropped=batch.dropped,
            sampled_fraction=batch.sampled_fraction,
            lost=0,
        )
        store.append(facts, state=b"", positions={}, agents=[seen])
    store.close()
    return alerts


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    url = f"sqlite:///{folder / 'oodmon.db'}"
    assert any(alert.rule == "novelty" for alert in fill(url))
    path = build(url, folder / "deep" / "report.html")
    assert path == folder / "deep" / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Elements, attributes and text; fails on tags that do not close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "use", "path", "rect", "image"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_every_part_is_there(page: str, parsed: Reader) -> None:
    text = " ".join(parsed.words)
    for heading in (
        "Evidence",
        "Samples in the tail",
        "Tail probabilities before and after",
        "Tail probabilities over time",
        "Which samples are new",
        "Predicted classes",
        "Episodes",
        "Drift tests",
        "Segments",
        "Most novel samples",
        "Agents",
        "Notices",
    ):
        assert heading in text
    assert parsed.tags.count("svg") == 5
    assert "novelty has been firing since" in text
    assert "1 per 10000 windows" in text
    assert wording.count(120 * ROWS - 2 * ROWS) in text or wording.count(120 * ROWS) in text


def test_nothing_is_asked_of_the_network(page: str, parsed: Reader) -> None:
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
    assert not {"link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not re.search(r"url\(\s*['\"]?(?!#|data:)", page)
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_hostile_names_are_text(page: str, parsed: Reader) -> None:
    assert page.count("<script") == 1, "the report's own"
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    # In tables and cards as well as in the figures' titles and legends.
    assert " ".join(parsed.words).count(HOSTILE) > 20


def _policy(page: str) -> str:
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert found
    return found[1]


def _script(page: str) -> str:
    return page.partition("<script>")[2].partition("</script>")[0]


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_the_only_script_that_may_run_is_the_reports_own(page: str) -> None:
    assert f"script-src '{_digest(_script(page))}'" in html.unescape(_policy(page))
    assert "default-src 'none'" in html.unescape(_policy(page))


def _flags(page: str) -> list[dict[str, Any]]:
    found = re.search(r'data-flags="([^"]*)"', page)
    assert found
    return list(json.loads(html.unescape(found[1])))


def test_what_the_slider_says_stands_in_a_table_too(page: str, parsed: Reader) -> None:
    energy, gram = _flags(page)
    assert [energy["detector"], gram["detector"]] == ["energy", "gram"]
    # Half of one of two segments is novel since window 35 of 60: a quarter of some 2,000 samples.
    assert 1_900 < energy["samples"] < 2_100
    for one in (energy, gram):
        assert len(one["levels"]) == len(one["flagged"]) == len(one["doubtful"]) > 30
        assert all(b <= r for b, r in zip(one["doubtful"], one["flagged"], strict=True))
        certain = [r - b for r, b in zip(one["flagged"], one["doubtful"], strict=True)]
        assert certain[one["start"]] == max(certain)
    at = energy["levels"].index(0.01)
    assert energy["flagged"][at] - energy["doubtful"][at] > 250
    # About 15 ordinary samples have p <= 0.01; the bound allows for that and for chance.
    assert 15 < energy["doubtful"][at] < 60
    words = " ".join(parsed.words).split()
    for one in (energy, gram):
        assert str(one["flagged"][one["levels"].index(0.01)]) in words
        assert str(one["doubtful"][one["levels"].index(0.01)]) in words
    assert "form hidden" in page, "without the script there is no dead slider"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_slider_moves(page: str, tmp_path: Path) -> None:
    probe = """{
    const form = document.querySelector("#flags form"), told = [];
    const say = () => told.push([...form.querySelectorAll("output")].map((o) => o.value).join("|"));
    say();
    form.elements.threshold.value = 3;
    form.elements.threshold.dispatchEvent(new Event("input"));
    say();
    told.push(form.elements.threshold.getAttribute("aria-valuetext"));
    form.elements.detector.value = 1;
    form.elements.detector.dispatchEvent(new Event("change"));
    say();
    told.push(form.hidden);
    document.title = told.join(";");
    }"""
    policy = _policy(page)
    copy = page.replace(policy, f"{policy} '{_digest(probe)}'")
    path = tmp_path / "report.html"
    path.write_text(copy.replace("</body>", f"<script>{probe}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    home = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, home, path.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    told = html.unescape(title[1]).split(";")
    energy, gram = _flags(page)

    def said(one: dict[str, Any], place: int) -> str:
        flagged, doubtful = one["flagged"][place], one["doubtful"][place]
        share = f"{100 * doubtful / flagged:.1f}\u202f%"
        return f"p ≤ {one['levels'][place]}|{flagged}|{doubtful} ({share})|{flagged - doubtful}"

    assert told[0] == said(energy, energy["start"])
    assert told[1] == said(energy, 3)
    assert told[2].startswith(f"p at most {energy['levels'][3]}: {energy['flagged'][3]} flagged")
    assert told[3] == said(gram, gram["start"])
    assert told[4] == "false"


def test_ids_are_unique_and_references_hold(parsed: Reader) -> None:
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {
        value[1:] for _, name, value in parsed.attributes if name == "href" and value[0] == "#"
    }
    assert wanted <= set(ids)


def test_colours_come_from_the_page(page: str) -> None:
    assert "var(--ink)" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#0[1-5]0[1-5]0[1-6]\b", page)


def test_a_quiet_store_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'quiet.db'}"
    assert fill(url, count=20, change_at=99) == []
    page = build(url, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Nothing alarmed" in page
    assert "before and after" not in page


def test_the_same_store_gives_the_same_report(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    fill(url, count=20, change_at=99)
    one = build(url, tmp_path / "one.html").read_bytes()
    assert build(url, tmp_path / "two.html").read_bytes() == one


def test_labels_that_came_take_the_place_of_the_estimate(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    alerts = fill(url)
    changed = next(alert for alert in alerts if alert.rule == "novelty").started_at
    store = Store(url)
    store.open()
    path = build(url, tmp_path / "report.html")
    assert "Accuracy by labels" not in path.read_text(encoding="utf-8")
    for began, right, doubt in ((changed - 60 * SECOND, 180, 0.05), (changed + SECOND, 120, nan)):
        names = [f"{began}/{place}" for place in range(200)]
        kept = [Prediction(name, "digits", "1", "", began, 1, doubt) for name in names]
        store.append([], state=b"", positions={}, predictions=kept)
        store.add_labels({name: int(place < right) for place, name in enumerate(names)})
    store.join_labels(changed)
    store.close()
    reader = Reader()
    reader.feed(build(url, tmp_path / "report.html").read_text(encoding="utf-8"))
    words = " ".join(" ".join(reader.words).split())
    assert "before 200 90.0 % 85.1 % to 93.4 % 95.0 % 90.0 % ±" in words
    assert "after 200 60.0 % 53.1 % to 66.5 % – –" in words


def test_an_empty_store_is_an_error_that_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    with pytest.raises(StoreError, match="no closed window of digits/7"):
        build(url, tmp_path / "report.html", model="digits", version="7")


def test_thumbnails_from_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    images = np.random.default_rng(0).random((3, 3, 8, 6)).astype(np.float32)
    np.savez(path, ids=np.array(["a", "b", HOSTILE]), images=images)
    found = thumbnails(path, ["a", HOSTILE, "missing"])
    assert set(found) == {"a", HOSTILE}
    assert found["a"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (1, 8, 8), (8, 8, 3), (3, 8, 8)])
def test_thumbnails_of_every_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    import base64

    images = np.full((1, *shape), 7.0)
    images.flat[0] = -3.0
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), images=images)
    address = thumbnails(tmp_path / "x.npz", ["a"])["a"]
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert picture.size == (96, 96)
    assert picture.getextrema() != ((0, 0),)


def test_thumbnails_from_a_folder_stay_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "deep" / "a.png", tmp_path / "secret.png"):
        Image.new("L", (4, 4)).save(path)
    (folder / "torn.png").write_bytes(b"not a picture")
    ids = ["deep/a", "../secret", "torn", "nul\0", "/etc/hostname"]
    assert set(thumbnails(folder, ids)) == {"deep/a"}


def test_thumbnails_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(ContractError, match="ids"):
        thumbnails(path, ["a"])
    np.savez(path, ids=np.array(["a"]), images=np.zeros((2, 4, 4)))
    with pytest.raises(ContractError, match="do not go together"):
        thumbnails(path, ["a"])


def test_wording() -> None:
    assert wording.count(1_234_567) == "1\u202f234\u202f567"
    assert wording.number(-0.00123) == "−0.00123"
    assert wording.number(None) == "–"
    assert wording.number(float("inf")) == "∞"
    assert wording.percent(0.1234) == "12.3\u202f%"
    assert wording.span(90 * SECOND) == "1 min 30 s"
    assert wording.span(3_600 * SECOND) == "1 h"
    assert wording.span(2 * 86_400 * SECOND + 59 * SECOND) == "2 d"
    assert wording.span(SECOND // 2) == "0.5 s"


def test_lines_do_not_run_over_hours_without_traffic() -> None:
    at = np.array([0, 10, 20, 30, 500, 900, 910, 920], np.int64) * SECOND + EPOCH
    values = np.arange(8, dtype=np.float64)
    days, drawn = plots._with_gaps(at, values)
    np.testing.assert_array_equal(
        drawn, [0.0, 1.0, 2.0, 3.0, 3.0, np.nan, 4.0, 4.0, np.nan, 5.0, 6.0, 7.0]
    )
    seconds = (days - days[0]) * 86_400
    np.testing.assert_allclose(
        seconds, [0, 10, 20, 30, 40, 40, 500, 510, 510, 900, 910, 920], atol=1e-3
    )


def test_lines_without_a_gap_stay_as_they_are() -> None:
    at = np.arange(0, 80, 10, dtype=np.int64) * SECOND + EPOCH
    days, drawn = plots._with_gaps(at, np.ones(8))
    assert len(days) == len(drawn) == 8
    assert np.isfinite(drawn).all()
