"""The test on true losses: its promise, what it finds, and that it is committed with the labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sqlalchemy import select

from oodmon.calibration import Calibration
from oodmon.cli.run import parts_of
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.daemon.backoff import Backoff
from oodmon.daemon.couriers import Couriers
from oodmon.daemon.late import Late
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.daemon.parts import Parts
from oodmon.daemon.routes import Routes
from oodmon.daemon.truth import Truth
from oodmon.errors import ConfigError, StateError, StoreError
from oodmon.labelling import LABELS, Labelling
from oodmon.pipeline import Pipeline
from oodmon.records import ALL, Alert, DriftResult, Fact
from oodmon.rules import Rule
from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.events import Store
from oodmon.store.labels import Prediction
from oodmon.store.outbox import Outbox
from oodmon.store.outcomes import Outcome
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, calibration

RULES = {"worse": Rule(LABELS, severity="critical", resolve_after_windows=2)}


def _truth(labelling: Labelling | None = None, reference: tuple[int, int] = (2_000, 200)) -> Truth:
    return Truth(
        labelling or Labelling(false_alarms="1 per 500 windows"), reference, RULES, "m", "1"
    )


def _outcomes(wrong: npt.NDArray[np.bool_], first: int) -> list[Outcome]:
    return [
        Outcome(f"s{first + place}", EPOCH + (first + place) * SECOND, bool(lost))
        for place, lost in enumerate(wrong)
    ]


def _run(truth: Truth, errors: list[float], rows: int = 50, seed: int = 0) -> list[Fact]:
    rng, state, facts = np.random.default_rng(seed), "", []
    for step, error in enumerate(errors):
        state, found = truth.judge(state, _outcomes(rng.random(rows) < error, step * rows))
        facts += found
    return facts


def _alerts(facts: list[Fact]) -> list[Alert]:
    return [fact for fact in facts if isinstance(fact, Alert)]


def test_a_true_loss_is_found_told_and_over_when_labels_say_so() -> None:
    facts = _run(_truth(), [0.1] * 40 + [0.3] * 10 + [0.05] * 60)
    firing, resolved = _alerts(facts)
    assert (firing.status, resolved.status) == ("firing", "resolved")
    assert firing.fingerprint == resolved.fingerprint
    assert (firing.rule, firing.severity, firing.labels["test"]) == ("worse", "critical", LABELS)
    # 50 labels a step: the change comes with sample 2,000, the alarm within three steps.
    assert EPOCH + 2_000 * SECOND <= firing.started_at <= EPOCH + 2_150 * SECOND
    summary = firing.evidence["summary"]
    assert "labels of samples since about" in summary
    assert "not 90.0% as in the reference" in summary
    assert "true accuracy falls by less than 2.0%" in firing.evidence["promise"]
    json.dumps(firing.evidence)
    results = [fact for fact in facts if isinstance(fact, DriftResult)]
    assert len(results) == 2 * 110
    rows = {(r.detector, r.start, r.end) for r in results}
    assert len(rows) == len(results), "each step has a row of its own"


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_the_promise_holds_at_the_edge_of_what_is_tolerated(phi: float) -> None:
    """12 % wrong where 10 % were and 2 % more are tolerated, and neighbours that are alike."""
    truth = _truth(Labelling(false_alarms="1 per 100 windows"), (10**8, 10**7))
    waits = []
    for seed in range(8):
        rng, state = np.random.default_rng([1, seed]), ""
        last = False
        for step in range(250):
            fresh = rng.random(20) < 0.12
            stays = rng.random(20) < phi
            wrong = np.empty(20, np.bool_)
            for row in range(20):
                last = wrong[row] = last if stays[row] else fresh[row]
            state, found = truth.judge(state, _outcomes(wrong, 20 * step))
            if _alerts(found):
                break
        waits.append(step + 1)
    assert np.mean(waits) >= 100


def test_a_stated_accuracy_takes_the_place_of_the_reference() -> None:
    stated = _truth(Labelling(false_alarms="1 per 500 windows", least_accuracy=0.8), (0, 0))
    assert not _alerts(_run(stated, [0.18] * 60))
    (firing,) = _alerts(_run(stated, [0.18] * 20 + [0.4] * 20))
    assert firing.status == "firing"


def test_other_options_begin_the_evidence_anew_and_keep_the_episode() -> None:
    rng = np.random.default_rng(2)
    state, found = "", []
    for step in range(8):
        state, some = _truth().judge(state, _outcomes(rng.random(50) < 0.4, 50 * step))
        found += some
    assert [alert.status for alert in _alerts(found)] == ["firing"]
    other = _truth(Labelling(false_alarms="1 per 9 days"))
    for step in range(8, 12):
        state, some = other.judge(state, _outcomes(rng.random(50) < 0.05, 50 * step))
        found += some
    assert [alert.status for alert in _alerts(found)] == ["firing", "resolved"]


# --- with the store ------------------------------------------------------------------------------


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    opened.open()
    yield opened
    opened.close()


def _late(store: Store, metrics: Metrics, truth: Truth | None) -> Late:
    pipeline = Pipeline("m", "1", {"msp": calibration()}, Windowing(), {}, {})
    routes = Routes({"ops": ("alert",)})
    parts = Parts(pipeline, routes, {}, labelling=Labelling(), truth=truth)
    couriers = Couriers(store, backoff=Backoff(), clock=lambda: EPOCH, metrics=metrics, seed=0)
    return Late(store, metrics, Observer(metrics), couriers, lambda: parts)


def _answered(store: Store, first: int, count: int) -> None:
    kept = [
        Prediction(f"s{place}", "m", "1", "", EPOCH + place * SECOND, 1, float("nan"))
        for place in range(first, first + count)
    ]
    store.append([], state=b"", positions={}, predictions=kept)


def _rows(store_url: str, name: str) -> Sequence[object]:
    database = Database(store_url)
    database.open()
    with database.read() as connection:
        found = list(connection.execute(select(tables.metadata.tables[name])))
    database.close()
    return found


def test_labels_evidence_and_alert_are_one_transaction(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    late = _late(store, metrics, _truth())
    rng = np.random.default_rng(3)
    _answered(store, 0, 400)
    for step in range(8):
        wrong = rng.random(50) < (0.1 if step < 4 else 0.6)
        names = range(50 * step, 50 * step + 50)
        store.add_labels({f"s{n}": int(not lost) for n, lost in zip(names, wrong, strict=True)})
        before = [_rows(store_url, name) for name in ("label_evidence", "labels", "outbox")]
        with monkeypatch.context() as patch:
            # The transaction is cut off when nearly everything was written.
            patch.setattr(Outbox, "add", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                late.round()
        assert [_rows(store_url, name) for name in ("label_evidence", "labels", "outbox")] == before
        late.round()
        assert not _rows(store_url, "labels")
    (alert,) = store.alerts()
    assert (alert["rule"], alert["test"], alert["status"]) == ("worse", LABELS, "firing")
    assert len(store.drift_results(test=LABELS)) == 2 * 8
    assert len(_rows(store_url, "outbox")) == 1
    told = {"model": "m", "model_version": "1", "rule": "worse", "severity": "critical"}
    assert metrics.value("oodmon_alert_firing", **told) == 1
    stream = {"model": "m", "model_version": "1", "test": LABELS, "detector": ALL, "segment": ALL}
    assert metrics.value("oodmon_drift_active", **stream) == 1
    # The same labels once more, and corrected ones: nobody is judged twice.
    state = _rows(store_url, "label_evidence")
    store.add_labels({f"s{n}": 7 for n in range(400)})
    late.round()
    assert _rows(store_url, "label_evidence") == state
    assert not _rows(store_url, "labels")


def test_a_daemon_that_was_replaced_judges_nothing(store: Store, store_url: str) -> None:
    late = _late(store, Metrics(), _truth())
    _answered(store, 0, 10)
    assert store.acquire() == ""
    store.add_labels({"s1": 0})
    database = Database(store_url)
    database.open()
    with database.write() as connection:
        connection.execute(tables.leases.update().values(holder="another"))
    database.close()
    with pytest.raises(StoreError):
        late.round()
    assert not _rows(store_url, "label_evidence")
    assert len(_rows(store_url, "labels")) == 1


TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  labels: {LABELS}
  drift:
    budget: {type: budget}
  rules:
    changed: {drift: budget}
    worse: {drift: labels, severity: critical, triggers: [retrain]}
  triggers:
    retrain: {type: webhook, url: "http://127.0.0.1:9/retrain"}
"""


def _config(folder: Path, options: str, labelled: int = 0) -> Path:
    path = folder / "oodmon.yaml"
    path.write_text(TEXT.replace("{LABELS}", options))
    (folder / "states").mkdir(exist_ok=True)
    made = Calibration.from_scores("msp", "d", np.arange(500.0))
    held = Calibration(
        made.detector, made.digest, made.scores, labelled=labelled, wrong=labelled // 10
    )
    held.save(build.calibration_path(str(folder / "states"), "msp"))
    return path


def test_a_rule_on_labels_is_read_from_the_config(tmp_path: Path) -> None:
    parts = parts_of(load(_config(tmp_path, "{share: 0.5}", 800), "daemon"))
    assert parts.truth is not None
    assert "1 per 30 days" in parts.truth.promise
    # The rule is none of the fold's, and its triggers are reached all the same.
    assert set(parts.pipeline._rules.rules) == {"changed"}  # type: ignore[attr-defined]
    facts = _run(parts.truth, [0.6] * 20)
    receivers = [receiver for receiver, _ in parts.routes(_alerts(facts)[0])]
    assert "triggers.retrain" in receivers
    with pytest.raises(StateError, match=r"labelled data again, or say daemon\.labels\.least"):
        parts_of(load(_config(tmp_path, "{share: 0.5}", 0), "daemon"))
    assert parts_of(load(_config(tmp_path, "{least_accuracy: 0.9}", 0), "daemon")).truth is not None


def test_a_rule_on_labels_needs_labels_and_its_name_is_taken(tmp_path: Path) -> None:
    path = _config(tmp_path, "{share: 0.5}", 800)
    text = path.read_text()
    path.write_text(text.replace("  labels: {share: 0.5}\n", ""))
    with pytest.raises(ConfigError, match="no drift test is called 'labels'"):
        load(path, "daemon")
    path.write_text(text.replace("budget: {type: budget}", "labels: {type: budget}"))
    with pytest.raises(ConfigError, match="choose another id"):
        load(path, "daemon")
