"""The store's transaction: written once, whatever is appended again, and by one daemon only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, select

from oodmon.errors import ContractError, StoreError
from oodmon.records import BIN_EDGES, Histogram, Window
from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.events import AgentSeen, Store
from tests.unit import store_facts as made

SEEN = AgentSeen("agent-a", "digits", "1", 10, made.START, 320, dropped=5, lost=1)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    store.open()
    yield store
    store.close()


def rows_of(url: str, *only: str) -> dict[str, list[Any]]:
    """Every row of every table (or of some), sorted."""
    database = Database(url)
    database.open()
    with database.read() as connection:
        found = {
            table.name: sorted(map(repr, connection.execute(select(table)).all()))
            for table in tables.metadata.sorted_tables
            if not only or table.name in only
        }
    database.close()
    return found


def append(store: Store, index: int) -> None:
    store.append(
        made.facts(index),
        state=f"state {index}".encode(),
        positions={"p0": str(index), "p1": "0"},
        outbox=[("sinks.log", made.event(f"e{index}")), ("sinks.kafka", made.event(f"e{index}"))],
        agents=[replace(SEEN, sequence=10 + index, observed_at=made.START + index)],
        digest="d",
    )


def test_new_store_has_nothing(store: Store) -> None:
    assert store.load() is None
    assert store.windows() == store.alerts() == store.agents() == store.positions() == []
    assert store.depths() == {}


def test_load_gives_what_was_appended_last(store: Store, store_url: str) -> None:
    for index in range(3):
        append(store, index)
    store.close()
    again = Store(store_url)
    again.open()
    snapshot = again.load()
    again.close()
    assert snapshot is not None
    assert snapshot.state == b"state 2"
    assert snapshot.positions == {"p0": "2", "p1": "0"}
    assert snapshot.digest == "d"


def test_same_facts_again_change_nothing(store: Store, store_url: str) -> None:
    for index in range(4):
        append(store, index)
    before = rows_of(store_url)
    append(store, 3)  # crashed between commit and settle
    after = rows_of(store_url)
    # The count of commits is all that tells them apart.
    assert before.pop("pipeline_state") != after.pop("pipeline_state")
    assert before == after
    assert len(before["windows"]) == 4 * 2 * 2
    assert len(before["outbox"]) == 4 * 2


def test_replay_from_an_older_position_changes_no_fact(store: Store, store_url: str) -> None:
    for index in range(4):
        append(store, index)
    store.append([made.alert(1, ended=3)], state=b"s", positions={})
    before = rows_of(store_url)
    for index in range(4):
        append(store, index)
    after = rows_of(store_url)
    del before["pipeline_state"], after["pipeline_state"]
    assert before == after


def test_grouping_of_commits_leaves_no_trace_in_facts(store_url: str, tmp_path: Any) -> None:
    one = Store(store_url)
    one.open()
    for index in range(6):
        append(one, index)
    one.close()
    other_url = f"sqlite:///{tmp_path / 'other.db'}"
    other = Store(other_url)
    other.open()
    other.append(
        [fact for index in range(6) for fact in made.facts(index)], state=b"", positions={}
    )
    other.close()
    kinds = ("windows", "drift_results", "alerts", "flagged_samples", "notices")
    assert rows_of(store_url, *kinds) == rows_of(other_url, *kinds)


def test_failed_append_leaves_nothing_and_store_works_on(store: Store, store_url: str) -> None:
    append(store, 0)
    before = rows_of(store_url)
    broken = replace(made.event("bad"), data={"set": {1, 2}})
    with pytest.raises(StoreError, match="not plain JSON") as caught:
        store.append(
            made.facts(1), state=b"lost", positions={"p0": "9"}, outbox=[("sinks.log", broken)]
        )
    assert not caught.value.retryable
    assert rows_of(store_url) == before
    append(store, 1)
    assert len(store.notices()) == 2


def test_two_daemons_on_one_pipeline(store_url: str) -> None:
    first, second = Store(store_url), Store(store_url)
    first.open()
    second.open()
    append(first, 0)
    assert second.load() is not None
    append(first, 1)  # second's state is stale now
    with pytest.raises(StoreError, match="another daemon appends to pipeline 'default'") as caught:
        append(second, 2)
    assert not caught.value.retryable
    second.load()
    append(second, 2)
    with pytest.raises(StoreError, match="another daemon"):
        append(first, 3)  # thought dead, came back
    assert [row["text"] for row in second.notices()] == [row["text"] for row in first.notices()]
    assert len(second.notices()) == 3
    first.close()
    second.close()


def test_two_daemons_that_both_begin(store_url: str) -> None:
    first, second = Store(store_url), Store(store_url)
    first.open()
    second.open()
    assert first.load() is None
    assert second.load() is None
    append(first, 0)
    with pytest.raises(StoreError, match="another daemon"):
        append(second, 0)
    first.close()
    second.close()


def test_reading_the_snapshot_does_not_disturb_the_writer(store: Store, store_url: str) -> None:
    append(store, 0)
    reader = Store(store_url)
    reader.open()
    reader.load()
    append(store, 1)
    reader.close()


def test_pipelines_share_a_database(store_url: str) -> None:
    one, two = Store(store_url, "one"), Store(store_url, "two")
    one.open()
    two.open()
    append(one, 0)
    append(two, 0)
    append(two, 1)
    assert len(one.windows()) == 4
    assert len(two.windows()) == 8
    assert [row.event.id for row in one.pending("sinks.log", made.START, 10)] == ["e0"]
    assert "pipeline" not in one.windows()[0]
    one.close()
    two.close()


def test_window_rows(store: Store) -> None:
    append(store, 0)
    row = store.windows(detector="gram", segment="")[0]
    source = made.window(0)
    assert (row["window_start_ns"], row["window_end_ns"]) == (source.start, source.end)
    assert (row["samples"], row["dropped"], row["late"], row["invalid"]) == (1000, 2, 1, 3)
    assert row["counts"] == source.detectors["gram"].counts.tolist()
    assert row["scored"] == sum(row["counts"])
    assert row["predicted"] == {1: 600, 7: 400}
    # 0.01 is an edge of the bins: exact there.
    below = int(source.detectors["gram"].counts[BIN_EDGES[1:] <= 0.010001].sum())
    assert math.isclose(row["share_p01"], below / row["scored"])


def test_shares_of_a_uniform_stream_are_their_levels(store: Store) -> None:
    p = np.random.default_rng(0).uniform(size=400_000)
    counts = np.histogram(p, BIN_EDGES)[0].astype(np.int64)
    filled = replace(
        made.window(0, detectors=()),
        detectors={"msp": Histogram(counts, 0, np.empty(0, np.uint64), np.empty(0, np.float32))},
    )
    store.append([filled], state=b"", positions={})
    row = store.windows()[0]
    assert abs(row["share_p05"] - np.mean(p <= 0.05)) < 2e-4
    assert abs(row["share_p01"] - np.mean(p <= 0.01)) < 1e-9
    assert abs(row["mean_p"] - 0.5) < 0.005


def test_window_without_any_score_is_kept(store: Store) -> None:
    empty = Window("digits", "1", "", made.START, made.START + 10, samples=0, dropped=9)
    store.append([empty], state=b"", positions={})
    [row] = store.windows()
    assert (row["detector"], row["dropped"], row["scored"]) == ("", 9, 0)
    assert row["share_p05"] is row["mean_p"] is None


def test_nan_is_null_and_infinity_stays(store: Store) -> None:
    odd = replace(
        made.drift(0), statistic=math.nan, threshold=math.inf, effect=-math.inf, p_value=math.nan
    )
    store.append([odd, replace(made.flagged(0), score=math.nan)], state=b"", positions={})
    [row] = store.drift_results()
    assert row["statistic"] is row["p_value"] is None
    assert row["threshold"] == math.inf
    assert row["effect"] == -math.inf
    assert row["drifted"] is False
    assert store.exceedances()[0]["score"] is None


def test_evidence_that_is_not_finite_or_not_plain(store: Store) -> None:
    odd = replace(
        made.alert(0),
        evidence={"a": math.nan, "b": np.float32(1.5), "c": (1, math.inf), "d": "x\x00y"},
    )
    store.append([odd], state=b"", positions={})
    assert store.alerts()[0]["evidence"] == {"a": None, "b": 1.5, "c": [1, None], "d": "x�y"}


def test_evidence_can_be_queried_as_json(store: Store, store_url: str) -> None:
    odd = {"novel": ["a\x00", "\ud800", "𝄞"], "statistic": math.inf}
    store.append([replace(made.alert(0), evidence=odd)], state=b"", positions={})
    query = {
        "sqlite": "SELECT json_extract(evidence, '$.novel[2]') FROM alerts",
        "postgresql": "SELECT evidence::jsonb -> 'novel' ->> 2 FROM alerts",
    }
    database = Database(store_url)
    database.open()
    with database.read() as connection:
        assert connection.exec_driver_sql(query[database.dialect]).scalar() == "𝄞"
    database.close()


def test_hostile_texts_do_not_stop_the_daemon(store: Store) -> None:
    names = ["a\x00b", "\ud800", "é" * 4000, "é" * 4000 + "2", "'; DROP TABLE windows; --", ""]
    hostile = [replace(made.flagged(0), sample_id=name) for name in names]
    store.append(hostile, state=b"", positions={})
    store.append(hostile, state=b"", positions={})
    found = [row["sample_id"] for row in store.exceedances()]
    assert len(set(found)) == len(names)
    assert max(len(name.encode()) for name in found) <= 256
    assert "'; DROP TABLE windows; --" in found


def test_samples_that_share_a_name_are_all_kept(store: Store) -> None:
    same = [replace(made.flagged(0), sample_id="request-1", score=float(i)) for i in range(3)]
    store.append(same, state=b"", positions={})
    store.append(same, state=b"", positions={})
    assert [row["score"] for row in store.exceedances()] == [0.0, 1.0, 2.0]


def test_an_episode_is_one_row(store: Store) -> None:
    store.append([made.alert(1)], state=b"", positions={})
    [row] = store.alerts(status="firing")
    assert (row["ended_at_ns"], row["resolution"]) == (0, {})
    assert row["evidence"]["windows"] == 1
    assert row["labels"]["model"] == row["model"] == "digits"
    store.append([made.alert(1, ended=4)], state=b"", positions={})
    [row] = store.alerts()
    assert row["status"] == "resolved"
    assert row["ended_at_ns"] == made.START + 40 * made.SECOND
    assert row["evidence"]["windows"] == 1
    assert row["resolution"]["windows"] == 3
    store.append([replace(made.alert(1, ended=4), evidence={})], state=b"", positions={})
    assert store.alerts() == [row]  # what was written first stays
    store.append([made.alert(6), made.alert(6, ended=7)], state=b"", positions={})
    assert [r["started_at_ns"] for r in store.alerts(newest_first=True)] == [
        made.START + 60 * made.SECOND,
        made.START + 10 * made.SECOND,
    ]
    assert store.alerts(status="firing") == []


def test_agents_are_totals_that_never_go_back(store: Store) -> None:
    store.append([], state=b"", positions={}, agents=[SEEN])
    later = replace(SEEN, observed_at=made.START + 5, sequence=12, samples=400, version="2")
    store.append([], state=b"", positions={}, agents=[later])
    store.append([], state=b"", positions={}, agents=[SEEN])
    assert store.agents_seen() == [later]
    [row] = store.agents()
    assert (row["version"], row["samples"], row["observed_at_ns"]) == ("2", 400, made.START + 5)


def test_questions(store: Store) -> None:
    for index in range(5):
        append(store, index)
    at = [made.START + index * 10 * made.SECOND for index in range(5)]
    asked = store.drift_results(test="ks", since_ns=at[1], until_ns=at[3])
    assert [row["window_start_ns"] for row in asked] == at[1:3]
    newest = store.drift_results(test="ks", limit=2, newest_first=True)
    assert [row["window_start_ns"] for row in newest] == [at[4], at[3]]
    assert len(store.windows(segment="eu", detector="msp")) == 5
    assert len(store.windows(segment=None, detector="msp")) == 10
    assert store.windows(model="other") == []
    assert [row["sample_id"] for row in store.exceedances(most_novel_first=True, limit=2)] == [
        "sample-4",
        "sample-3",
    ]
    assert store.drift_results(drifted=True) == []
    with pytest.raises(ContractError, match=r"windows has no column 'test'; it has: model, "):
        store.windows(test="ks")


def test_trigger_history(store: Store) -> None:
    store.note_fired("retrain", "r1", 100, "fired")
    store.note_fired("retrain", "r1", 200, "cooldown")  # delivered twice
    store.note_fired("retrain", "r2", 300, "cooldown")
    store.note_fired("retrain", "r2", 350, "quota")
    store.note_fired("other", "r3", 400, "fired")
    assert store.fired("retrain", 0) == [100]
    assert store.fired("retrain", 101) == []
    assert [row["outcome"] for row in store.firings(trigger_id="retrain")] == ["fired", "cooldown"]
    store.note_fired("retrain", "r2", 500, "fired")  # revived by hand, and it did fire
    assert store.fired("retrain", 0) == [100, 500]


def test_prune(store: Store) -> None:
    for index in range(4):
        append(store, index)
    store.append([made.alert(0, ended=1), made.alert(3, ended=9)], state=b"", positions={})
    rows = store.pending("sinks.log", made.START, 10)
    store.settle("sinks.log", [row.seq for row in rows[:2]])
    store.bury("sinks.log", [rows[2].seq], "no")
    border = made.START + 20 * made.SECOND
    assert store.prune(border, ("windows", "outbox", "alerts")) == {
        "windows": 8,
        "outbox": 2,
        "alerts": 1,
    }
    assert {row["window_start_ns"] for row in store.windows()} == {border, border + 10**10}
    assert len(store.alerts()) == 3  # two still fire, one ended later
    assert len(store.drift_results()) == 8
    assert store.depths()["sinks.log"].dead == 1
    assert store.prune(border)["dead_letters"] == 1
    assert len(store.drift_results()) == 4
    assert store.depths()["sinks.log"].pending == 1
    with pytest.raises(ContractError, match="prune: unknown positions"):
        store.prune(border, ("positions",))


def test_prune_takes_more_than_one_bite(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodmon.store.retention._CHUNK_ROWS", 7)
    store.append([made.flagged(i) for i in range(30)], state=b"", positions={})
    assert store.prune(2**62, ("flagged_samples",)) == {"flagged_samples": 30}
    assert store.exceedances() == []


def test_sql_that_a_person_writes(store: Store, store_url: str) -> None:
    append(store, 0)
    store.append([made.alert(0, ended=1)], state=b"", positions={})
    url = store_url.replace("postgresql://", "postgresql+psycopg://")
    engine = create_engine(url)
    with engine.connect() as connection:
        ask = connection.exec_driver_sql
        [(start, started, ended)] = ask(
            "SELECT w.window_start, a.started_at, a.ended_at FROM alerts_view a "
            "JOIN windows_view w ON w.window_start = a.started_at "
            "WHERE w.detector = 'gram' AND w.segment = ''"
        )
        [(observed,)] = ask("SELECT observed_at FROM agents_view")
        assert ask("SELECT count(*) FROM dead_letters").scalar() == 0
    engine.dispose()
    assert start == started
    if store_url.startswith("sqlite"):
        assert (started, ended) == ("2023-11-14T22:13:20.000Z", "2023-11-14T22:13:30.000Z")
    else:
        assert started.timestamp() == 1_700_000_000
        assert ended.timestamp() == 1_700_000_010
    assert observed is not None
