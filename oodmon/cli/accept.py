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
    from oodmon.store.events import Store

__all__ = ["accept"]

_SECOND: Final = 1_000_000_000
_LEAST: Final = 100
"""Scores that a new reference needs: fewer would hardly tell anything from chance."""
_PREVIOUS: Final = ".previous"
_RELOAD_SECONDS: Final = 60.0

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
    The daemon is asked to reload, begins its evidence again, resolves what fires, and tells in a
    notice what was adopted and by whom.
    """
    from oodmon.cli.opened import opened_store
    from oodmon.config.build import calibration_path, calibrations, daemon_half
    from oodmon.config.parse import load

    checked = load(config, "daemon")
    half = daemon_half(checked)
    folder = half.calibration.path
    known = calibrations(checked)
    if undo:
        _undo([calibration_path(folder, name) for name in known])
    else:
        if half.calibration.context:
            raise click.ClickException(
                f"calibration.context is {half.calibration.context}: the stored scores do not know "
                "their predicted classes; run `oodmon fit` on data of late instead"
            )
        with opened_store(config) as store:
            made = _made(checked, store, known, last)
        for calibration in made.values():
            click.echo(f"{calibration.detector}: {calibration.origin}")
        if not yes:
            click.confirm("Is this how good traffic looks from now on?", abort=True)
        for name, calibration in made.items():
            path = calibration_path(folder, name)
            path.with_name(path.name + _PREVIOUS).write_bytes(path.read_bytes())
            calibration.save(path)
    click.echo(_reloaded(half.http.host, half.http.port))


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
    return {name: _calibration(old, rows, by) for name, old in known.items()}


def _calibration(old: Calibration, rows: Sequence[Row], by: str) -> Calibration:
    """The scores that all windows kept in the same share, so that busy windows count for more."""
    import dataclasses

    import numpy as np

    from oodmon.calibration import Calibration

    mine = [row for row in rows if row["detector"] == old.detector and row["scored"]]
    share = min((float(row["raw"]["share"]) for row in mine), default=1.0)
    rng = np.random.default_rng(0)
    columns = [np.empty(0, np.float32)]
    for row in mine:
        scores = np.frombuffer(base64.b64decode(row["raw"]["scores"]), "<f4")
        columns.append(scores[rng.random(len(scores)) * float(row["raw"]["share"]) <= share])
    found = np.concatenate(columns)
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
    fresh = Calibration.from_scores(old.detector, old.digest, found, measures=old.measures)
    return dataclasses.replace(fresh, origin=origin)


def _ns(text: str) -> int:
    from datetime import datetime

    return round(datetime.fromisoformat(text).timestamp() * _SECOND)


def _reloaded(host: str, port: int) -> str:
    """Ask the daemon of this config to reload: what came of it."""
    import http.client

    where = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104  # to connect to
    connection = http.client.HTTPConnection(where, port, timeout=_RELOAD_SECONDS)
    try:
        connection.request("POST", "/-/reload")
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace").strip()
    except OSError as error:
        return (
            f"no daemon answers at {where}:{port} ({error}); it takes this when it starts or "
            "is sent SIGHUP"
        )
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return "the daemon has reloaded and goes by the new reference"
    raise click.ClickException(f"the daemon did not take it: {text}")
