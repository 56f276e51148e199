"""Labels that come late: kept predictions, the inbox, what both come to, and replays."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, text

from oodmon.admission import Admission
from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.contracts import Delivery
from oodmon.daemon.inlet import Inlet
from oodmon.daemon.intake import Intake
from oodmon.daemon.labels import predictions, tell
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ContractError
from oodmon.feeds.spool import Spool
from oodmon.labelling import Labelling
from oodmon.pipeline import Pipeline
from oodmon.secret import Secret
from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.events import Store
from oodmon.store.labels import Prediction
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, batch, calibration
from tests.waiting import PATIENCE_SECONDS

MODEL = {"model": "m", "model_version": "1"}


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    opened.open()
    yield opened
    opened.close()


def _kept(name: str, predicted: int = 0, error: float = math.nan, at: int = EPOCH) -> Prediction:
    return Prediction(name, "m", "1", "", at, predicted, error)


def _append(store: Store, *kept: Prediction) -> None:
    store.append([], state=b"", positions={}, predictions=kept)


def _count(store_url: str, name: str) -> int:
    database = Database(store_url)
    database.open()
    with database.read() as connection:
        found = connection.execute(select(func.count()).select_from(tables.metadata.tables[name]))
        count = int(found.scalar_one())
    database.close()
    return count


def test_a_label_inserted_by_anybody_finds_its_prediction(store: Store, store_url: str) -> None:
    _append(store, _kept("a", 1), _kept("b", 2), _kept("c", 3))
    database = Database(store_url)
    database.open()
    with database.write() as connection:
        connection.execute(
            text(
                "INSERT INTO labels (pipeline, sample_id, label) "
                "VALUES ('default', 'a', 1), ('default', 'b', 7), ('default', 'nobody', 1)"
            )
        )
    database.close()
    assert store.join_labels(EPOCH) == 2
    (found,) = store.measured(0, 2**62)
    assert (found.samples, found.labelled, found.accuracy) == (3, 2, 0.5)
    assert math.isnan(found.estimated)
    assert math.isnan(found.corrected)
    assert store.join_labels(EPOCH) == 0
    # What found no prediction waits for one.
    assert _count(store_url, "labels") == 1
    _append(store, _kept("nobody", 1))
    assert store.join_labels(EPOCH) == 1
    assert _count(store_url, "labels") == 0


def test_a_corrected_label_takes_the_place_of_the_first(store: Store) -> None:
    _append(store, _kept("a", 1))
    for label, right in ((0, 0.0), (1, 1.0)):
        store.add_labels({"a": 5})
        store.add_labels({"a": label})
        store.join_labels(EPOCH)
        assert store.measured(0, 2**62)[0].accuracy == right


def test_a_replay_changes_nothing_and_keeps_the_label(store: Store, store_url: str) -> None:
    _append(store, _kept("a", 1), _kept("a", 2))
    store.add_labels({"a": 1})
    store.join_labels(EPOCH)
    _append(store, _kept("a", 2), _kept("b", 1))
    (found,) = store.measured(0, 2**62)
    assert (found.samples, found.labelled, found.accuracy) == (2, 1, 1.0)
    assert _count(store_url, "predictions") == 2


def test_more_labels_than_one_transaction_takes(store: Store) -> None:
    names = [f"s{place}" for place in range(5_001)]
    _append(store, *(_kept(name) for name in names))
    store.add_labels(dict.fromkeys(names, 0))
    assert store.join_labels(EPOCH) == 5_001
    assert store.measured(0, 2**62)[0].labelled == 5_001


def test_the_interval_is_wilsons_and_the_span_is_half_open(store: Store) -> None:
    _append(store, *(_kept(f"s{place}", at=EPOCH + place) for place in range(10)))
    store.add_labels({f"s{place}": int(place == 0) for place in range(10)})
    store.join_labels(EPOCH)
    (found,) = store.measured(EPOCH, EPOCH + 10)
    assert found.accuracy == 0.9
    # Newcombe, Statistics in Medicine 1998, formula 3
    assert (found.low, found.high) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert store.measured(EPOCH + 1, EPOCH + 9)[0].labelled == 8
    (perfect,) = store.measured(EPOCH + 1, EPOCH + 10)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.7008, abs=1e-3)


def test_labels_on_some_set_the_estimate_on_all_right(store: Store) -> None:
    rng = np.random.default_rng(0)
    errors = rng.beta(1.0, 4.0, 4_000)
    # The estimate is too mild: the model is wrong 0.15 more often than it thinks.
    right = rng.random(4_000) > np.minimum(errors + 0.15, 1.0)
    _append(store, *(_kept(f"s{i}", 1, float(error)) for i, error in enumerate(errors)))
    some = rng.choice(4_000, 600, replace=False)
    store.add_labels({f"s{i}": int(right[i]) for i in some.tolist()})
    store.join_labels(EPOCH)
    (found,) = store.measured(0, 2**62)
    assert found.estimated == pytest.approx(1.0 - errors.mean())
    assert found.shift == pytest.approx(np.mean(right[some] - (1.0 - errors[some])))
    assert found.corrected == pytest.approx(found.estimated + found.shift)
    assert abs(found.corrected - right.mean()) < found.error < 0.05
    assert abs(found.estimated - right.mean()) > 0.1
    # Less than the labels alone leave open, for the estimate knows something.
    assert found.error < (found.high - found.low) / 2.0


def test_what_is_old_goes_and_labels_nobody_has_looked_at_stay(
    store: Store, store_url: str
) -> None:
    _append(store, _kept("old", at=EPOCH), _kept("new", at=EPOCH + 10))
    store.add_labels({"lost": 1})
    store.join_labels(EPOCH)
    store.add_labels({"fresh": 1})
    pruned = store.prune(EPOCH + 5, ["predictions", "labels"])
    assert pruned == {"predictions": 1, "labels": 1}
    assert _count(store_url, "labels") == 1


def test_pipelines_that_share_a_database_do_not_share_labels(store: Store, store_url: str) -> None:
    other = Store(store_url, "other")
    other.open()
    _append(store, _kept("a"))
    other.add_labels({"a": 0})
    assert (store.join_labels(EPOCH), other.join_labels(EPOCH)) == (0, 0)
    other.close()


# --- which predictions are kept ----------------------------------------------------------------


def test_a_share_is_chosen_by_the_name_alone() -> None:
    names = [f"request-{place}" for place in range(20_000)]
    kept = [name for name in names if Labelling(0.1).keeps(name)]
    assert 0.09 < len(kept) / len(names) < 0.11
    assert set(kept) <= {name for name in names if Labelling(0.3).keeps(name)}
    assert all(Labelling().keeps(name) for name in names[:10])


def test_what_is_kept_of_a_batch() -> None:
    one = batch(
        [0.25, 0.5, 0.75],
        sample_ids=("a", "b", "c"),
        predicted=np.array([4, 5, 6], np.int32),
        segment=np.array([1, 0, 1], np.int32),
        segments=("x", "y"),
    )
    assert predictions(Labelling(), one, "msp")[0] == Prediction("a", "m", "1", "y", EPOCH, 4, 0.25)
    assert [kept.segment for kept in predictions(Labelling(), one, "msp")] == ["y", "x", "y"]
    assert math.isnan(predictions(Labelling(), one, "")[0].expected_error)
    assert not predictions(Labelling(), replace(one, repeats=True), "msp")
    assert not predictions(Labelling(), batch([0.1]), "msp")
    unnamed = batch([0.1, 0.2], predicted=np.zeros(2, np.int32))
    assert [kept.sample_id for kept in predictions(Labelling(), unnamed, "")] == [
        "agent/0/0",
        "agent/0/1",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, r"share: 0\.0 is not in"),
        ({"over_seconds": 0.0}, "over_seconds"),
        ({"least_labels": 0}, "least_labels"),
        ({"false_alarms": "seldom"}, "false_alarms"),
        ({"tolerated_loss": -0.1}, "tolerated_loss"),
        ({"least_accuracy": 1.0}, "least_accuracy"),
    ],
)
def test_options_are_checked(options: dict[str, float], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        Labelling(**options)  # type: ignore[arg-type]


def _intake(labelling: Labelling | None, metrics: Metrics) -> Intake:
    errors = Calibration.from_scores(
        "error", "digest-error", np.linspace(0.0, 0.4, 500), measures=EXPECTED_ERROR
    )
    known = {"msp": calibration(), "error": errors}
    pipeline = Pipeline("m", "1", known, Windowing(10.0, 0.0, 0.0), {}, {})
    return Intake(pipeline, [], metrics, labelling)


def _take(intake: Intake, sequence: int, rows: int = 50) -> None:
    one = batch(
        np.full(rows, 0.2),
        float(sequence),
        sequence,
        detectors=("msp", "error"),
        predicted=np.zeros(rows, np.int32),
    )
    intake.take(Delivery(one, "p", str(sequence)))


def test_the_intake_keeps_what_it_took_once_and_nothing_where_it_is_off() -> None:
    intake = _intake(Labelling(), Metrics())
    for sequence in (0, 1, 1):
        _take(intake, sequence)
    assert len(intake.group.predictions) == 100
    assert {kept.expected_error for kept in intake.group.predictions} == {float(np.float32(0.2))}
    off = _intake(None, Metrics())
    _take(off, 0)
    assert not off.group.predictions


def _tell(labelling: Labelling, store: Store, metrics: Metrics) -> None:
    store.join_labels(store.newest_ns())
    tell(labelling, store, metrics, store.newest_ns())


def test_metrics_tell_once_labels_suffice(store: Store) -> None:
    metrics, labelling = Metrics(), Labelling(least_labels=40)
    intake = _intake(labelling, metrics)
    for sequence in range(4):
        _take(intake, sequence)
    intake.advance(EPOCH + 60 * SECOND)
    group = intake.group
    store.append(group.facts, state=b"", positions={}, predictions=group.predictions)
    names = [kept.sample_id for kept in group.predictions]
    store.add_labels(dict.fromkeys(names[:39], 0))
    _tell(labelling, store, metrics)
    assert metrics.value("oodmon_labelled_samples", **MODEL) == 39
    assert "oodmon_accuracy_ratio{" not in metrics.render().decode()
    store.add_labels(dict.fromkeys(names[39:50], 1))
    _tell(labelling, store, metrics)
    assert metrics.value("oodmon_accuracy_ratio", **MODEL) == pytest.approx(39 / 50)
    low = metrics.value("oodmon_accuracy_low_ratio", **MODEL)
    assert low < 39 / 50 < metrics.value("oodmon_accuracy_high_ratio", **MODEL)
    assert metrics.value("oodmon_estimate_shift_ratio", **MODEL) == pytest.approx(-0.02)
    assert metrics.value("oodmon_corrected_accuracy_ratio", **MODEL) == pytest.approx(0.78)
    # Nobody has labelled the traffic of late.
    _take(intake, 1_000)
    intake.advance(EPOCH + 2_000 * SECOND)
    store.append(group.facts, state=b"", positions={}, predictions=group.predictions)
    _tell(Labelling(over_seconds=60.0, least_labels=1), store, metrics)
    assert metrics.value("oodmon_labelled_samples", **MODEL) == 0
    assert "oodmon_accuracy_ratio{" not in metrics.render().decode()


# --- over HTTP -----------------------------------------------------------------------------------


def _post(inlet: Inlet, body: bytes, token: str = "t0ken-of-the-tests") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", inlet.port, timeout=PATIENCE_SECONDS)
    try:
        login = {"Authorization": f"Bearer {token}"}
        connection.request("POST", "/v1/labels", body, login)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.fixture
def intake_port(tmp_path: Path) -> Iterator[tuple[Inlet, Store]]:
    """An HTTP intake whose labels go to a store; the store is not open yet."""
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    inlet = Inlet(
        Admission(port=0, token=Secret("t0ken-of-the-tests")),
        Spool(str(tmp_path / "spool")),
        "m",
        "1",
        metrics=Metrics(),
        keep_labels=store.add_labels,
    )
    inlet.start()
    yield inlet, store
    inlet.stop()
    store.close()


def test_posted_labels_are_in_the_store_before_the_answer(
    intake_port: tuple[Inlet, Store],
) -> None:
    inlet, store = intake_port
    body = json.dumps({"labels": {"a": 1, "é\u0000": 2}}).encode()
    status, told = _post(inlet, body)
    assert (status, told["error"]) == (503, "cannot be taken now")
    store.open()
    assert _post(inlet, body) == (200, {"rows": 2})
    _append(store, _kept("a", 1), _kept("é\x00", 2))
    assert store.join_labels(EPOCH) == 2
    assert store.measured(0, 2**62)[0].accuracy == 1.0
    assert _post(inlet, body, token="guessed")[0] == 401


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[]", "the body"),
        (b"{}", "labels"),
        (b'{"labels": {"a": "cat"}}', "labels.a: expected the number of a class"),
        (b'{"labels": {"a": true}}', "labels.a"),
        (b'{"labels": {"a": -1}}', "found -1"),
        (b'{"labels": {"a": 1e3}}', "found 1000.0"),
        (b'{"labels": {"a": 9999999999}}', "found 9999999999"),
        (b'{"labels": {"": 1}}', "a sample id is empty"),
        (b'{"labels": {}, "model": "m"}', "unknown fields: model"),
        (json.dumps({"labels": {str(n): 1 for n in range(10_001)}}).encode(), "more than 10,000"),
    ],
)
def test_labels_that_are_none_are_refused_whole(
    intake_port: tuple[Inlet, Store], body: bytes, said: str
) -> None:
    inlet, store = intake_port
    store.open()
    status, told = _post(inlet, body)
    assert status == 422
    assert said in told["error"]


def test_labels_are_refused_where_no_prediction_is_kept(tmp_path: Path) -> None:
    inlet = Inlet(
        Admission(port=0, token=Secret("t0ken-of-the-tests")),
        Spool(str(tmp_path / "spool")),
        "m",
        "1",
        metrics=Metrics(),
    )
    inlet.start()
    try:
        status, told = _post(inlet, b'{"labels": {"a": 1}}')
    finally:
        inlet.stop()
    assert status == 422
    assert "daemon.labels" in told["error"]
