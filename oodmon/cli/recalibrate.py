"""``oodmon recalibrate``: the estimated accuracy, set right by labels that came late."""

from __future__ import annotations

import dataclasses
import getpass
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from oodmon.cli.options import Duration, config_argument, when

if TYPE_CHECKING:
    from oodmon.calibration import Calibration

__all__ = ["recalibrate"]

_SECOND: Final = 1_000_000_000


@click.command()
@config_argument
@click.option(
    "--last",
    type=Duration(),
    default="30d",
    show_default=True,
    help="Go by labels of samples of the last so much; no longer ago than the last `oodmon fit`.",
)
@click.option("--undo", is_flag=True, help="Take the detector at its word again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def recalibrate(config: str, last: float, undo: bool, yes: bool) -> None:
    """Set the estimated accuracy of CONFIG's model right by the labels that have come.

    How often the model is wrong at each level of doubt is learnt anew (slope and offset of the log
    odds), where `oodmon fit` learnt it on held-out data. From then on windows, metrics, alerts and
    kept predictions hold the estimate as it is now; ranks and what the detectors learnt stay. What
    `accuracy_loss` compares with is the reference, judged in the same way: its promise holds on.
    The daemon is asked to reload, and tells in a notice what was done and by whom.
    """
    from oodmon.calibration import EXPECTED_ERROR
    from oodmon.cli.adopted import adopted
    from oodmon.cli.opened import opened_store
    from oodmon.config.build import calibration_path, calibrations, daemon_half
    from oodmon.config.parse import load

    checked = load(config, "daemon")
    half = daemon_half(checked)
    known = [one for one in calibrations(checked).values() if one.measures == EXPECTED_ERROR]
    if not known:
        raise click.ClickException(
            f"{config}: no detector estimates whether an answer is wrong; add one of type "
            "expected_error"
        )
    if half.labels is None:
        raise click.ClickException(
            f"{config} has no section daemon.labels: its daemon keeps no predictions to hold "
            "labels against"
        )
    # The one whose expected errors are kept.
    old = known[0]
    with opened_store(config) as store:
        newest = store.newest_ns()
        since = max(newest - round(last * _SECOND), 0)
        judged = store.judged(checked.model.name, checked.model.version, since)
    if undo:
        if not old.is_set_right:
            raise click.ClickException(f"{old.detector}: the estimate is as it was fitted")
        made = dataclasses.replace(old, slope=1.0, offset=0.0)
        origin = "the estimate is that of the detector again"
    else:
        if len(judged) < half.labels.least_labels:
            raise click.ClickException(
                f"{len(judged)} labels of samples since {when(since)}; at least "
                f"{half.labels.least_labels} are needed (daemon.labels.least_labels)"
            )
        made, origin = _made(old, judged)
    by = f"{getpass.getuser()} at {when(time.time_ns())}"
    made = dataclasses.replace(made, origin=f"{origin}; by {by}")
    click.echo(f"{old.detector}: {origin}")
    if not yes:
        click.confirm("Take it?", abort=True)
    path = calibration_path(half.calibration.path, old.detector)
    with adopted([path], half.http.host, half.http.port):
        made.save(path)


def _made(old: Calibration, judged: Sequence[tuple[float, bool]]) -> tuple[Calibration, str]:
    """The calibration as labels have it, and what changed, in words."""
    import numpy as np

    from oodmon.labelling import set_right

    expected = np.array([error for error, _ in judged])
    wrong = np.array([answer for _, answer in judged])
    slope, offset = set_right(expected, wrong)
    made = dataclasses.replace(old, slope=slope, offset=offset)
    known = [1.0 - float(one.wrong_at(old.scores).mean()) for one in (old, made)]
    said = [1.0 - float(one.wrong_at(expected).mean()) for one in (old, made)]
    return made, (
        f"by {len(wrong)} labels the model is right in {1.0 - wrong.mean():.1%}; the estimate said "
        f"{said[0]:.1%} of these, and says {said[1]:.1%} now; of the "
        f"reference {known[0]:.1%}, now {known[1]:.1%} (log odds times {made.slope:.3g}, plus "
        f"{made.offset:.3g})"
    )
