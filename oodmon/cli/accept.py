"""``oodmon accept``: what is seen now is the new reference."""

from __future__ import annotations

import base64
import getpass
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.cli.options import Duration, config_argument, when

if TYPE_CHECKING:
    from oodmon.calibration import Calibration
    from oodmon.config.schema import Config
    from oodmon.contexts import Context
    from oodmon.drift.thresholds import Threshold
    from oodmon.store.events import Store

__all__ = ["accept"]

_SECOND: Final = 1_000_000_000
_HOUR: Final = 3600 * _SECOND
_LEAST: Final = 100
"""Scores that a new reference needs: fewer would hardly tell anything from chance."""
_PREVIOUS: Final = ".previous"

Row = Mapping[str, Any]


@click.command()
@config_argument
@click.option(
    "--last",
    type=Duration(),
    default="1h",
    show_default=True,
    help="Adopt the last so much; where an alert fires, no more than what came since its change.",
)
@click.option("--undo", is_flag=True, help="Go back to the reference before the last accept.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def accept(config: str, last: float, undo: bool, yes: bool) -> None:
    """Adopt the traffic of late as the reference that CONFIG's drift tests compare with.

    For a change that is there to stay and is fine. Each detector's calibration is made anew from
    the raw scores that the store keeps of its windows; what the detectors learnt stays as it is.
    Thresholds that `oodmon fit` found for drift tests with `false_alarms` are found anew.
    Where CONFIG ranks within a context, hours, segments or classes that had next to no traffic in
    that time keep the reference that they have.
    The daemon is asked to reload, begins its evidence again, resolves what fires, and tells in a
    notice what was adopted and by whom. Where it refuses, everything stays as it was.
    """
    from oodmon.cli.adopted import adopted
    from oodmon.cli.opened import opened_store
    from oodmon.cli.promised import renewed
    from oodmon.config.build import calibration_path, calibrations, daemon_half, threshold_path
    from oodmon.config.parse import load

    checked = load(config, "daemon")
    half = daemon_half(checked)
    folder = half.calibration.path
    known = calibrations(checked)
    paths = [calibration_path(folder, name) for name in known]
    paths += [path for name in half.drift if (path := threshold_path(folder, name)).exists()]
    previous = [path.with_name(path.name + _PREVIOUS) for path in paths]
    made: dict[str, Calibration] = {}
    thresholds: dict[Path, Threshold] = {}
    if not undo:
        with opened_store(config) as store:
            made = _made(checked, store, known, last)
        if half.calibration.ranked_within:
            _check(made, half.calibration.ranked_within, half.windows.length)
        for calibration in made.values():
            click.echo(f"{calibration.detector}: {calibration.origin}")
        if not yes:
            click.confirm("Is this how good traffic looks from now on?", abort=True)
        thresholds = renewed(checked, made)
    with adopted([*paths, *previous, *thresholds], half.http.host, half.http.port):
        if undo:
            _undo(paths)
            return
        for path, old in zip(paths, previous, strict=True):
            old.write_bytes(path.read_bytes())
        for name, calibration in made.items():
            calibration.save(calibration_path(folder, name))
        for path, threshold in thresholds.items():
            threshold.save(path)


def _undo(paths: Sequence[Path]) -> None:
    kept = [path for path in paths if path.with_name(path.name + _PREVIOUS).exists()]
    if not kept:
        raise click.ClickException("nothing was accepted, or it was undone already")
    for path in kept:
        path.with_name(path.name + _PREVIOUS).replace(path)
        click.echo(f"{path.name}: as it was before")


def _made(
    config: Config, store: Store, known: Mapping[str, Calibration], last: float
) -> dict[str, Calibration]:
    """Detector → its calibration from the windows of late."""
    from oodmon.config.build import daemon_half

    newest = store.newest_ns()
    since = newest - round(last * _SECOND)
    firing = [
        row["evidence"].get("since")
        for row in store.alerts(
            model=config.model.name, version=config.model.version, status="firing"
        )
    ]
    for began in firing:
        if began:
            since = max(since, _ns(began))
    rows = store.windows(model=config.model.name, version=config.model.version, since_ns=since)
    # Sliding windows overlap; those that begin at a multiple of their length do not.
    rows = [
        row
        for row in rows
        if row["window_start_ns"] % (row["window_end_ns"] - row["window_start_ns"]) == 0
    ]
    by = f"{getpass.getuser()} at {when(time.time_ns())}"
    context = daemon_half(config).calibration.ranked_within
    return {name: _calibration(old, rows, by, context) for name, old in known.items()}


def _calibration(old: Calibration, rows: Sequence[Row], by: str, context: Context) -> Calibration:
    """The scores that all windows kept in the same share, so that busy windows count for more."""
    import dataclasses

    import numpy as np

    from oodmon.calibration import Calibration

    mine = [row for row in rows if row["detector"] == old.detector and row["scored"]]
    share = min((float(row["raw"]["share"]) for row in mine), default=1.0)
    rng = np.random.default_rng(0)
    columns = [np.empty(0, np.float32)]
    classes = [np.empty(0, np.int32)]
    segments: list[str] = []
    times: list[int] = []
    for row in mine:
        scores = np.frombuffer(base64.b64decode(row["raw"]["scores"]), "<f4")
        kept = rng.random(len(scores)) * float(row["raw"]["share"]) <= share
        columns.append(scores[kept])
        unknown = np.full(len(scores), -1)
        classes.append(np.asarray(row["raw"].get("classes", unknown), np.int32)[kept])
        segments += [row["segment"]] * int(kept.sum())
        times += [row["window_start_ns"]] * int(kept.sum())
    found, predicted = np.concatenate(columns), np.concatenate(classes)
    if len(found) < _LEAST:
        raise click.ClickException(
            f"{old.detector}: the windows of that time hold {len(found)} raw scores; at least "
            f"{_LEAST} are needed: give a longer --last, or wait"
        )
    first, end = mine[0]["window_start_ns"], max(row["window_end_ns"] for row in mine)
    origin = (
        f"{len(found)} scores of traffic from {when(first)} to {when(end)} in place of "
        f"{len(old)}, accepted by {by}"
    )
    fresh = Calibration.from_scores(
        old.detector,
        old.digest,
        found,
        predicted if (predicted >= 0).any() else None,
        old.measures,
        segments,
        times,
    )
    if context:
        fresh, stays = _merged(fresh, old, context)
        origin += f"; {stays} scores of contexts that were hardly seen then stay" if stays else ""
    # What the model gets right, and how doubt is to be read, was not measured anew.
    return dataclasses.replace(
        fresh,
        origin=origin,
        labelled=old.labelled,
        wrong=old.wrong,
        slope=old.slope,
        offset=old.offset,
    )


def _merged(fresh: Calibration, old: Calibration, context: Context) -> tuple[Calibration, int]:
    """The new scores, and the old ones of contexts that are too rare among the new; how many."""
    import numpy as np

    from oodmon.calibration import Calibration
    from oodmon.cells import LEAST, contexts_of
    from oodmon.errors import ContractError

    try:
        now, before = contexts_of(fresh, context), contexts_of(old, context)
    except ContractError:
        return fresh, 0  # `_check` says what the new one lacks
    names, seen = np.unique(now, return_counts=True)
    stays = ~np.isin(before, names[seen >= LEAST])
    # Where the old ones stay, a handful of new ones would only blur them.
    comes = ~np.isin(now, np.unique(before[stays]))
    parts = (fresh, comes), (old, stays)
    merged = Calibration.from_scores(
        old.detector,
        old.digest,
        np.concatenate([one.scores[rows] for one, rows in parts]),
        _joined([(one.predicted, rows) for one, rows in parts]),
        old.measures,
        _joined([(np.array(one.segments, np.str_)[one.segment], rows) for one, rows in parts]),
        _joined([(one.times, rows) for one, rows in parts]),
    )
    return merged, int(stays.sum())


def _joined(columns: Sequence[tuple[Any, Any]]) -> Any:
    """The chosen rows of all columns; nothing where one of them is not known."""
    import numpy as np

    known = all(len(column) for column, _ in columns)
    return (
        np.concatenate([column[rows] for column, rows in columns]) if known else columns[0][0][:0]
    )


def _check(made: Mapping[str, Calibration], context: Context, window: int) -> None:
    """Tell what keeps the new reference from being ranked within the context."""
    from oodmon.cells import Cells
    from oodmon.errors import ContractError

    if "hour" in context.of and (window > _HOUR or _HOUR % window):
        raise click.ClickException(
            f"calibration.context is {context}: windows of {window / _SECOND:g} s do not lie "
            "within one hour of the day; run `oodmon fit` on data of late instead"
        )
    for name, calibration in made.items():
        try:
            Cells(calibration, context)
        except ContractError:
            raise click.ClickException(
                f"calibration.context is {context}: the windows of that time do not know the "
                f"predicted classes of the scores of {name!r}; wait until newer ones do, or run "
                "`oodmon fit` on data of late"
            ) from None


def _ns(text: str) -> int:
    from datetime import datetime

    return round(datetime.fromisoformat(text).timestamp() * _SECOND)
