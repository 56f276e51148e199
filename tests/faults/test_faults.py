"""Every fault in a few seeded runs: nothing is lost or differs, all arrives, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.catalogue import FAULTS, Fault, together
from tests.faults.session import Session
from tests.faults.site import Outcome
from tests.faults.soak import Look, judge
from tests.faults.verdicts import compared
from tests.servers.kafka import Broker

RUNS = (
    together("daemon: kill -9", "daemon: SIGTERM", "database: locked", "database: full disk"),
    together("two daemons on one database"),
    together(
        "agent: kill -9 in mid-write",
        "spool: bit-flipped frame",
        "spool: full disk",
        "clock jumps both ways",
    ),
    together(
        "broker: stopped and started",
        "broker: slow",
        "broker: refuses",
        "broker: acknowledgement lost",
        "sink hangs",
    ),
    together("database: server stopped", database="postgresql"),
    together(
        "kafka feed, daemon: kill -9",
        "kafka feed, agent: kill -9",
        "kafka feed, daemon: SIGTERM",
        "kafka feed, database: locked",
        "kafka feed, database: server stopped",
        "kafka feed, broker: stopped and started",
        "kafka feed, broker: slow",
        "kafka feed, broker: refuses",
        "kafka feed, broker: acknowledgement lost",
        "kafka feed, broker: hangs",
        "kafka feed, messages come again",
        database="postgresql",
    ),
    together(
        "kafka feed, two daemons on one database",
        "kafka feed, partitions move",
        database="postgresql",
    ),
)


def test_every_fault_is_in_one_of_the_runs() -> None:
    named = {name for run in RUNS for name in run.name.split(" + ")}
    # a lock of half a minute is for `make faults`
    assert named == {f.name for f in FAULTS} - {"database: locked for half a minute"}


@pytest.fixture(scope="module")
def session(_broker: Broker, request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session(_broker, request.getfixturevalue("postgres_server")) as found:
        yield found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", RUNS, ids=lambda fault: fault.name.replace(": ", " "))
def test_faults_change_nothing(session: Session, fault: Fault) -> None:
    verdict = session.judge(fault, fault.databases[0], seed=1)
    assert verdict.clean, verdict


def test_the_checker_sees_every_kind_of_harm() -> None:
    calm = Outcome(
        facts={"windows": ["a", "b"]}, sent=["1", "2"], threads=4, files=9, memory=50 << 20
    )

    def judged(**changed: Any) -> Any:
        fields = {name: getattr(calm, name) for name in ("facts", "sent", "threads", "files")}
        return compared(calm, Outcome(**{**fields, "memory": 50 << 20, **changed}))

    assert judged().clean
    assert judged(facts={"windows": ["a"]}).lost == 1
    assert judged(facts={"windows": ["a", "b", "c"]}).differing == 1
    assert judged(facts={"windows": ["a", "b", "b"]}).differing == 1
    assert judged(sent=["1"]).missing == 1
    assert judged(sent=["1", "2", "3"]).duplicates == 1
    assert judged(contents={"1": {b"x", b"y"}}).duplicates == 1
    copies = judged(sent=["1", "2", "2"])
    assert (copies.copies, copies.clean) == (1, True)
    for leak in ({"threads": 9}, {"files": 99}, {"memory": 99 << 20}):
        assert judged(**leak).leaks


def test_the_soak_sees_what_grows() -> None:
    def looks(**step: float) -> list[Look]:
        base = {"memory": 1e8, "work": 1.0, "files": 9.0, "threads": 5.0, "samples": 1e6}
        base |= {"backlog": 1e6, "pending": 0.0, "store": 1e6}
        work = {"work": 1.0, "samples": 1e5}
        return [
            Look(
                float(at),
                **{name: base[name] + at * {**work, **step}.get(name, 0.0) for name in base},
            )
            for at in range(90)
        ]

    assert judge(looks()) == []
    assert "memory" in judge(looks(memory=1e5))[0]
    assert "backlog" in judge(looks(backlog=1e6))[0]
    assert "pending" in judge(looks(pending=5.0))[0]
    assert "threads" in judge(looks(threads=0.3))[0]
    dearer = [
        Look(float(at), 10**8, 0.01 * at * at, 9, 5, 1e5 * at, 0.0, 0.0, 0.0) for at in range(90)
    ]
    assert "CPU" in judge(dearer)[0]
