"""``oodmon status`` and ``oodmon tail``: what the store knows, at a glance and as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.cli.opened import opened_store
from oodmon.cli.options import Duration, config_argument, when

if TYPE_CHECKING:
    from rich.table import Table

    from oodmon.store.events import Store

__all__ = ["status", "tail"]

_SECOND: Final = 1_000_000_000
_PAGE: Final = 500
_LEAST_SECONDS: Final = 0.05


@click.command()
@config_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def status(config: str, as_json: bool) -> None:
    """Show the model, its agents, the last windows, the drift evidence and the outbox."""
    from oodmon.config.parse import load

    model = load(config, "daemon").model
    with opened_store(config) as store:
        found = _status(store, model.name, model.version)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    firing = found["firing"]
    state = f"[red]{len(firing)} firing[/red]" if firing else "[green]nothing fires[/green]"
    console.print(f"[bold]{model.name}[/bold] version {model.version}: {state}")
    for table in _tables(found):
        console.print(table)


def _status(store: Store, model: str, version: str) -> dict[str, Any]:
    """Everything that is shown, as plain JSON values."""
    where = {"model": model, "version": version}
    windows = store.windows(**where, newest_first=True, limit=_PAGE)  # type: ignore[arg-type]
    results = store.drift_results(**where, newest_first=True, limit=_PAGE)  # type: ignore[arg-type]
    return {
        "model": model,
        "version": version,
        "agents": store.agents(),
        "windows": _latest(windows, ("detector", "segment")),
        "drift": _latest(results, ("test", "detector", "segment")),
        "firing": store.alerts(**where, status="firing"),  # type: ignore[arg-type]
        "resolved": [
            row
            for row in store.alerts(**where, newest_first=True, limit=10)  # type: ignore[arg-type]
            if row["status"] != "firing"
        ],
        "outbox": {
            name: {"pending": depth.pending, "dead": depth.dead, "oldest_ns": depth.oldest_ns}
            for name, depth in sorted(store.depths().items())
        },
        "positions": store.positions(),
    }


def _latest(rows: Iterable[Mapping[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """The newest row of each stream, of rows that come newest first."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        newest.setdefault(tuple(row[name] for name in key), dict(row))
    return [newest[found] for found in sorted(newest)]


def _tables(found: Mapping[str, Any]) -> Iterable[Table]:
    from rich import box
    from rich.table import Column, Table

    from oodmon.records import ALL

    def table(*columns: str, title: str) -> Table:
        # On a narrow screen what is long goes on in the next line: nothing is cut off.
        made = [Column(name, overflow="fold") for name in columns]
        look = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
        return Table(*made, title=title, title_justify="left", **look)  # type: ignore[arg-type]

    agents = table("agent", "last seen", "samples", "dropped", "lost", "sampled", title="Agents")
    for row in found["agents"]:
        agents.add_row(
            row["source"],
            when(row["observed_at_ns"]),
            str(row["samples"]),
            str(row["dropped"]),
            str(row["lost"]),
            f"{row['sampled_fraction']:.0%}",
        )
    yield agents
    shown = ("detector", "segment", "until", "samples", "p≤0.05", "p≤0.01", "invalid", "late")
    windows = table(*shown, title="Last windows")
    windows.columns[2].no_wrap = True
    for row in found["windows"]:
        windows.add_row(
            row["detector"] or "-",
            row["segment"] or "-",
            when(row["window_end_ns"]).partition("-")[2],
            str(row["samples"]),
            _share(row["share_p05"]),
            _share(row["share_p01"]),
            str(row["invalid"]),
            str(row["late"]),
        )
    yield windows
    drift = table(
        "test", "detector", "segment", "statistic", "threshold", "effect", "", title="Drift"
    )
    for row in found["drift"]:
        drift.add_row(
            row["test"],
            "all" if row["detector"] == ALL else row["detector"],
            "all" if row["segment"] == ALL else row["segment"] or "-",
            _number(row["statistic"]),
            _number(row["threshold"]),
            _number(row["effect"]),
            "[red]drifted[/red]" if row["drifted"] else "calm",
        )
    yield drift
    alerts = table("rule", "severity", "status", "since", "until", "stream", title="Episodes")
    for row in [*found["firing"], *found["resolved"]]:
        alerts.add_row(
            row["rule"],
            row["severity"],
            "[red]firing[/red]" if row["status"] == "firing" else row["status"],
            when(row["started_at_ns"]),
            when(row["ended_at_ns"]),
            _stream(row),
        )
    if alerts.row_count:
        yield alerts
    outbox = table("receiver", "pending", "dead letters", "oldest", title="Outbox")
    for name, depth in found["outbox"].items():
        outbox.add_row(name, str(depth["pending"]), str(depth["dead"]), when(depth["oldest_ns"]))
    if outbox.row_count:
        yield outbox


@click.command()
@config_argument
@click.option(
    "--since",
    type=Duration(),
    default=0.0,
    help="Begin so long ago, such as 6h or 7d; by default now.",
)
@click.option("--every", type=Duration(), default=1.0, show_default=True, help="Look so often.")
@click.option("--once", is_flag=True, help="Show what is there and end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def tail(config: str, since: float, every: float, once: bool, as_json: bool) -> None:
    """Follow alerts and notices as the daemon commits them; Ctrl-C ends it."""
    begun = time.time_ns() - round(since * _SECOND)
    told: set[tuple[str, ...]] = set()
    with opened_store(config) as store:
        if not since:
            told.update(_identity(kind, row) for kind, row in _happened(store, 0))
        # Ctrl-C is how one stops following, not a failure.
        with suppress(KeyboardInterrupt):
            _follow(store, begun if since else 0, told, 0.0 if once else every, as_json)


def _follow(
    store: Store, since_ns: int, told: set[tuple[str, ...]], every: float, as_json: bool
) -> None:
    """Say what was not told yet, again and again; once where `every` is 0."""
    while True:
        for kind, row in _happened(store, since_ns):
            identity = _identity(kind, row)
            if identity not in told:
                told.add(identity)
                click.echo(json.dumps({"kind": kind, **row}) if as_json else _sentence(kind, row))
        if not every:
            return
        time.sleep(max(every, _LEAST_SECONDS))


def _happened(store: Store, since_ns: int) -> list[tuple[str, dict[str, Any]]]:
    """Alerts and notices in order of time. An alert counts when it started and when it ended."""
    # An episode that started before may end after: all that fire are looked at, and the newest.
    rows = [("alert", row) for row in store.alerts(newest_first=True, limit=_PAGE)]
    found = [
        (kind, row)
        for kind, row in rows
        if max(row["started_at_ns"], row["ended_at_ns"]) >= since_ns
    ]
    notices = store.notices(newest_first=True, limit=_PAGE, since_ns=since_ns)
    found += [("notice", row) for row in notices]
    return sorted(found, key=lambda pair: _at(*pair))


def _at(kind: str, row: Mapping[str, Any]) -> int:
    if kind == "notice":
        return int(row["observed_at_ns"])
    return int(row["ended_at_ns"] or row["started_at_ns"])


def _identity(kind: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if kind == "notice":
        return (kind, row["model"], row["version"], row["source"], row["key"])
    return (kind, row["fingerprint"], str(row["started_at_ns"]), row["status"])


def _sentence(kind: str, row: Mapping[str, Any]) -> str:
    at = when(_at(kind, row))
    if kind == "notice":
        return f"{at} notice   {row['source']}: {row['text']}"
    firing = row["status"] == "firing"
    word = click.style("FIRING  ", fg="red", bold=True) if firing else "resolved"
    evidence = row["evidence"] if isinstance(row["evidence"], Mapping) else {}
    detail = ""
    if firing and evidence:
        detail = f", after {evidence.get('samples', '?')} samples"
        if evidence.get("promise"):
            detail += f" ({evidence['promise']})"
        if evidence.get("summary"):
            detail += f"\n    {evidence['summary']}"
    return (
        f"{at} {word} {row['rule']} [{row['severity']}] {row['model']}/{row['version']} "
        f"{_stream(row)}{detail}"
    )


def _stream(row: Mapping[str, Any]) -> str:
    """Which test, and what it speaks of."""
    from oodmon.records import ALL

    if row["detector"] == row["segment"] == ALL:
        return f"{row['test']}, over all streams"
    where = "any segment" if row["segment"] == ALL else row["segment"]
    detector = "all detectors" if row["detector"] == ALL else row["detector"]
    return f"{row['test']}, {detector}" + (f" in {where}" if where else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
