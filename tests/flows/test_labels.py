"""kill -9 and labels: the predictions that are kept, and what labels make of them, are the same."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sqlalchemy import select

from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.cli import main
from oodmon.store import tables
from oodmon.store.database import Database
from tests.flows.daemons import Site
from tests.waiting import PATIENCE_SECONDS, eventually

BATCHES = 1_200
ROWS = 16
KILLS = 4


def _site(folder: Path) -> Site:
    site = Site(folder, detectors=("msp", "error"))
    scores = np.random.default_rng(1).normal(size=2_000)
    Calibration.from_scores("error", "digest-error", scores, measures=EXPECTED_ERROR).save(
        folder / "states" / "error.calibration.safetensors"
    )
    text = site.config.read_text()
    site.config.write_text(
        text.replace("  flag_level", "  labels: {share: 0.5, least_labels: 50}\n  flag_level")
    )
    site.fill(BATCHES, rows=ROWS)
    return site


def _predictions(site: Site) -> list[tuple[object, ...]]:
    kept = tables.predictions
    database = Database(site.url)
    database.open()
    with database.read() as connection:
        rows = connection.execute(select(kept).order_by(kept.c.sample_id)).all()
    database.close()
    return [tuple(row) for row in rows]


def _label(site: Site, names: list[str]) -> None:
    """Hand over a label for each of these samples, the same whenever it is asked for."""
    lines = "".join(f"{name},{len(name) % 4}\n" for name in names)
    done = CliRunner().invoke(main, ["labels", str(site.config), "-"], input=lines)
    assert done.output == f"{len(names)} labels handed over\n", done.output


def _joined(site: Site, process: subprocess.Popen[bytes], labels: int) -> None:
    """Upkeep looks for labels when a daemon begins."""

    def all_found() -> bool:
        assert process.poll() is None, site.log()
        with site.open() as store:
            return sum(one.labelled for one in store.measured(0, 2**62)) == labels

    eventually(all_found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_predictions_and_labels_survive_kills(tmp_path: Path) -> None:
    calm, wild = _site(tmp_path / "calm"), _site(tmp_path / "wild")
    calm.finish(calm.start())
    kept = _predictions(calm)
    share = len(kept) / (BATCHES * ROWS)
    assert 0.45 < share < 0.55
    names = [str(row[1]) for row in kept][::7]

    rng = np.random.default_rng(5)
    for kill in range(KILLS):
        ready = wild.times_ready()
        process = wild.start()
        wild.wait_ready(ready)
        time.sleep(float(rng.uniform(0.02, 0.3)))
        process.kill()
        process.wait()
        _label(wild, names[kill::KILLS])  # some of them before their predictions are there
    wild.finish(wild.start())
    _label(calm, names)
    for site in (calm, wild):
        process = site.start()
        _joined(site, process, len(names))
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, site.log()

    assert wild.facts() == calm.facts()
    found = _predictions(wild)
    assert found == _predictions(calm)
    assert sum(row[-1] is not None for row in found) == len(names)
    estimates = [row["estimated_accuracy"] for row in _windows(calm)]
    assert all(0.0 <= estimate <= 1.0 for estimate in estimates)
    assert len(estimates) > 20


def _windows(site: Site) -> list[dict[str, float]]:
    with site.open() as store:
        return store.windows(detector="error")
