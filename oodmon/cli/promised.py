"""What ``oodmon fit`` tells of drift tests: their thresholds, promises and outlooks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from oodmon.calibration import Calibration
    from oodmon.config.schema import Config
    from oodmon.drift.thresholds import Threshold
    from oodmon.fitting import Fitting

__all__ = ["promise", "renewed"]

_SAMPLES: Final = 256
"""In a window, where no threshold was found before."""


def promise(path: str, fitting: Fitting, samples: int, *, in_order: bool, seed: int) -> None:
    """Find the thresholds that are to be found, and say what the calibration supports.

    Args:
        path: of the config; its daemon half may be elsewhere, and then there is less to say.
        fitting: what was just fitted.
        samples: in a window, about.
        in_order: the data was in the order as served.
        seed: of the resampling.
    """
    from oodmon.config import build
    from oodmon.config.parse import load
    from oodmon.errors import ConfigError

    calibrations = {name: fitted.calibration for name, fitted in fitting.detectors.items()}
    least = min(len(calibration) for calibration in calibrations.values())
    click.echo(
        f"{least} calibration samples: the smallest tail probability is {1 / (least + 1):.2g}"
    )
    try:
        config = load(path, "daemon")
    except ConfigError:
        return  # the daemon's half is elsewhere, or `oodmon check` tells what is wrong with it
    daemon = config.daemon
    if daemon is None:
        return
    needed = math.ceil(1 / daemon.flag_level) - 1
    if least < needed:
        click.echo(
            f"flag_level {daemon.flag_level:g} needs {needed} of them; until then only samples "
            "above the whole calibration are flagged"
        )
    _find(config, fitting, samples, in_order=in_order, seed=seed)
    for name, test in build.drift_tests(config, calibrations).items():
        told = test.promise(build.window_seconds(config, test))
        if told:
            click.echo(f"drift test {name}: {told}")
        outlooks: dict[str, list[str]] = {}
        for detector, calibration in calibrations.items():
            outlook = test.outlook(calibration.reference(config.model.name, config.model.version))
            outlooks.setdefault(outlook, []).append(detector)
        for outlook, detectors in outlooks.items():
            if outlook:
                click.echo(f"drift test {name}, {', '.join(detectors)}: {outlook}")


def _find(config: Config, fitting: Fitting, samples: int, *, in_order: bool, seed: int) -> None:
    """Find and store the threshold of every test that has a promise to be tuned to."""
    from oodmon.config import build
    from oodmon.drift.resampling import Held, block_length
    from oodmon.drift.thresholds import tune
    from oodmon.drift.tuned import Tunable

    half = build.daemon_half(config)
    context = half.calibration.ranked_within
    held = None
    for name, entity in half.drift.items():
        test = entity.component
        if not (isinstance(test, Tunable) and test.false_alarms):
            continue
        if held is None:
            held = {
                detector: Held(
                    fitted.calibration,
                    fitted.scores,
                    fitted.predicted,
                    block_length(fitted.scores) if in_order else 1,
                )
                for detector, fitted in fitting.detectors.items()
            }
            if context:
                held = {d: one.within(context, in_order=in_order) for d, one in held.items()}
        begun = time.monotonic()
        found = tune(test, held, samples, build.window_seconds(config, test), seed, context)
        found.save(build.threshold_path(half.calibration.path, name))
        blocks = max(one.block for one in held.values())
        click.echo(
            f"drift test {name}: threshold found in {time.monotonic() - begun:.0f} s on windows "
            f"of {samples} samples, drawn in blocks of {blocks}; run lengths up to "
            f"{found.longest:,.0f} windows were measured"
        )


def renewed(config: Config, known: Mapping[str, Calibration]) -> dict[Path, Threshold]:
    """File → its threshold, for every test that has a promise, found for other calibrations.

    Scores that were drawn from traffic are in no order, so that they tell nothing of neighbours: no
    threshold is laxer than the one before, which may have been found on blocks of them.
    """
    from dataclasses import replace

    from oodmon.config import build
    from oodmon.drift.resampling import Held
    from oodmon.drift.thresholds import Threshold, tune
    from oodmon.drift.tuned import Tunable
    from oodmon.errors import StateError

    half = build.daemon_half(config)
    context = half.calibration.ranked_within
    made = {}
    for name, entity in half.drift.items():
        test = entity.component
        if not (isinstance(test, Tunable) and test.false_alarms):
            continue
        path = build.threshold_path(half.calibration.path, name)
        try:
            before = Threshold.load(path)
            samples, least = before.samples, before.nominal
        except StateError:
            samples, least = _SAMPLES, 1.0
        held = {}
        for detector, one in known.items():
            complete = len(one.predicted) and one.predicted.min() >= 0
            mine = Held(one, one.scores, one.predicted.astype("int64")[: None if complete else 0])
            held[detector] = mine.within(context, in_order=False) if context else mine
        click.echo(f"drift test {name}: its threshold is found anew")
        found = tune(test, held, samples, build.window_seconds(config, test), 0, context)
        made[path] = replace(found, nominal=max(found.nominal, least))
    return made
