"""``oodmon replay``: what a config's drift tests and rules would have said about what was seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.cli.options import Duration, config_argument, when

if TYPE_CHECKING:
    from oodmon.config.schema import Config
    from oodmon.records import DriftResult, Window

__all__ = ["rehearse", "replay", "stored_windows"]

_SECOND: Final = 1_000_000_000
_BATCHES: Final = 512

Row = dict[str, Any]


@click.command()
@config_argument
@click.option(
    "--source",
    type=click.Choice(["store", "feed"]),
    default="store",
    show_default=True,
    help="Stored windows, or the batches that lie in the feed and are not settled yet.",
)
@click.option("--store-config", type=click.Path(dir_okay=False), help="Whose store to read.")
@click.option("--last", type=Duration(), default=0.0, help="Only the last so much, such as 7d.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def replay(config: str, source: str, store_config: str | None, last: float, as_json: bool) -> None:
    """Run what was seen through CONFIG's drift tests and rules, and show what would have alarmed.

    Nothing is written and nobody is told: a way to try other tests, thresholds and rules. Stored
    windows are counts, without the raw scores that they came from: a test that reads raw scores
    sees none, and of sliding windows a test that counts every sample once sees those that do not
    overlap. Ranks within a context are those that the daemon took. The feed holds raw scores, but
    is the daemon's while that runs.
    """
    from oodmon.config.parse import load

    checked = load(config, "daemon")
    if source == "feed":
        if last or store_config:
            raise click.UsageError("--last and --store-config are for --source store")
        results, alerts, windows = _from_feed(checked)
    else:
        results, alerts, windows = _from_store(checked, store_config or config, last)
    if as_json:
        for alert in alerts:
            click.echo(json.dumps(alert))
        return
    for alert in alerts:
        color = "red" if alert["status"] == "firing" else "green"
        click.echo(
            f"{when(alert['at_ns'])} {click.style(alert['status'], fg=color):<8} {alert['rule']} "
            f"{alert['test']} {alert['detector']} {alert['segment']}".rstrip()
        )
    fired = sum(alert["status"] == "firing" for alert in alerts)
    click.echo(f"{windows} windows, {fired} alarm{'' if fired == 1 else 's'}")
    for name, told in _summary(results, checked).items():
        click.echo(f"  {name}: {told}")


def _from_feed(config: Config) -> tuple[list[DriftResult], list[Row], int]:
    """A fresh pipeline over everything in the feed; nothing is settled."""
    from oodmon.config import build
    from oodmon.records import Alert, DriftResult, Fact, Window

    pipeline = build.pipeline(config)
    reader = build.daemon_half(config).feed.component.reader()
    facts: list[Fact] = []
    try:
        reader.seek({})
        while batches := reader.poll(_BATCHES, 0.0):
            for delivery in batches:
                batch = delivery.batch
                if (batch.model, batch.version) == (pipeline.model, pipeline.version):
                    facts += pipeline.step(batch)
    finally:
        reader.close()
    windowing = pipeline.windowing
    if pipeline.watermark:
        facts += pipeline.advance(
            pipeline.watermark + windowing.length + windowing.step + windowing.lateness
        )
    alerts = [
        _row(fact.rule, fact.labels, fact.status, fact.ended_at or fact.started_at)
        for fact in facts
        if isinstance(fact, Alert)
    ]
    results = [fact for fact in facts if isinstance(fact, DriftResult)]
    return results, alerts, sum(isinstance(fact, Window) for fact in facts)


def _from_store(
    config: Config, store_config: str, last: float
) -> tuple[list[DriftResult], list[Row], int]:
    from oodmon.cli.opened import opened_store

    with opened_store(store_config) as store:
        rows = store.windows(model=config.model.name, version=config.model.version)
    windows = stored_windows(rows)
    if last and windows:
        since = windows[-1].end - round(last * _SECOND)
        windows = [window for window in windows if window.start >= since]
    results, alerts = rehearse(config, windows)
    return results, alerts, len(windows)


def stored_windows(rows: Iterable[Mapping[str, Any]]) -> list[Window]:
    """Rows (one per detector) → windows, by their end, then segment."""
    import numpy as np

    from oodmon.records import Histogram, Window

    empty = Histogram.empty()
    grouped: dict[tuple[int, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["window_end_ns"], row["window_start_ns"], row["segment"])
        grouped.setdefault(key, []).append(row)
    return [
        Window(
            parts[0]["model"],
            parts[0]["version"],
            segment,
            start,
            end,
            parts[0]["samples"],
            parts[0]["dropped"],
            parts[0]["late"],
            {
                row["detector"]: Histogram(
                    np.array(row["counts"], np.int64),
                    row["invalid"],
                    empty.keys,
                    empty.sample,
                    pairs=row["pairs"],
                    jumps=row["jumps"],
                    judged=row["judged"],
                    errors=row["errors"],
                    swings=row["swings"],
                )
                for row in parts
                if row["detector"]
            },
            parts[0]["predicted"],
        )
        for (end, start, segment), parts in sorted(grouped.items(), key=lambda item: item[0])
    ]


def rehearse(config: Config, windows: Iterable[Window]) -> tuple[list[DriftResult], list[Row]]:
    """Drift tests and rules over closed windows, as the pipeline takes them."""
    from oodmon.cells import Cells
    from oodmon.config import build
    from oodmon.pipeline.streams import Streams
    from oodmon.records import Window
    from oodmon.rules import Rules

    half = build.daemon_half(config)
    name, version = config.model.name, config.model.version
    known = build.calibrations(config)
    context = half.calibration.ranked_within
    ranked = {d: Cells(c, context) if context else c for d, c in known.items()}
    streams = Streams(
        build.drift_tests(config, known),
        {d: ranks.reference(name, version) for d, ranks in ranked.items()},
    )
    rules = Rules(half.rules, {"model": name, "version": version})
    free: dict[str, int] = {}
    found: list[DriftResult] = []
    alerts: list[Row] = []
    for end, group in groupby(windows, key=lambda window: window.end):
        span = [_of(window, known) for window in group]
        spoken = streams.judge(span, _disjoint(span, free))
        found += spoken
        silent = Window(name, version, "", span[0].start, end)
        for transition in rules.step(spoken):
            episode = transition.episode
            status = "resolved" if transition.resolved else "firing"
            at = end if transition.resolved else episode.started_at
            alerts.append(_row(episode.rule, episode.labels, status, at))
            if transition.resolved:
                test = episode.labels["test"]
                streams.rearm(test, episode.detector, episode.segment, silent)
    return found, alerts


def _of(window: Window, known: Collection[str]) -> Window:
    """With the detectors that have a calibration now."""
    mine = {name: found for name, found in window.detectors.items() if name in known}
    return replace(window, detectors=mine)


def _disjoint(span: Iterable[Window], free: dict[str, int]) -> list[Window]:
    """Of windows that may overlap, those that begin where the one before them ended, or later."""
    found = []
    for window in span:
        if window.start >= free.get(window.segment, 0):
            free[window.segment] = window.end
            found.append(window)
    return found


def _row(rule: str, labels: Mapping[str, str], status: str, at: int) -> Row:
    stream = {name: labels.get(name, "") for name in ("test", "detector", "segment")}
    return {"rule": rule, "status": status, "at_ns": at, **stream}


def _summary(results: Iterable[DriftResult], config: Config) -> dict[str, str]:
    """Test → how often it found drift and how near it came."""
    seen: Counter[str] = Counter()
    drifted: Counter[str] = Counter()
    nearest: dict[str, float] = {}
    for result in results:
        seen[result.test] += 1
        drifted[result.test] += result.drifted
        if result.threshold > 0:
            share = result.statistic / result.threshold
            nearest[result.test] = max(nearest.get(result.test, 0.0), share)
    tests = config.daemon.drift if config.daemon is not None else {}
    return {
        name: f"{seen[name]} decisions, {drifted[name]} drifted"
        + (f", evidence up to {nearest[name]:.3g} × threshold" if name in nearest else "")
        for name in tests
    }
