"""``oodmon plan``: what a config's drift tests promise, what they cost, and what is possible."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oodmon.cli.options import config_argument

if TYPE_CHECKING:
    from oodmon.planning import Change, Outcome, Quiet

__all__ = ["plan"]

Outcomes = list[tuple["Change", Mapping[str, "Outcome"]]]


@click.command()
@config_argument
@click.option(
    "--window-samples",
    default=0,
    type=click.IntRange(0, 100_000),
    help="Samples in a base window; 0 derives it from --rate.",
)
@click.option("--rate", default=10.0, show_default=True, help="Samples per second.")
@click.option("--seconds", default=20.0, show_default=True, help="Of processor time, about.")
@click.option("--seed", default=0, show_default=True, help="Of the simulation.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write a figure (PNG or SVG) too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def plan(
    config: str,
    window_samples: int,
    rate: float,
    seconds: float,
    seed: int,
    plot: str | None,
    as_json: bool,
) -> None:
    """Simulate CONFIG's drift tests on its calibrations, before they are switched on.

    Tells how often each may be wrong, how many false alarms came in the simulation, and how long a
    few named changes would go unnoticed: beside it the least delay that any detector could have at
    that run length, which is the CUSUM's that knows the change. σ is the spread of the normal
    score; novel samples lie three of them above. Samples are independent, and every detector sees
    the change; correlated traffic takes longer. Calibrations come from `oodmon fit`.
    """
    from oodmon.cells import Cells
    from oodmon.config import build
    from oodmon.config.parse import load
    from oodmon.planning import Plan, simulate

    if not (rate > 0.0 and seconds > 0.0):
        raise click.UsageError("--rate and --seconds must be above 0")
    checked = load(config, "daemon")
    half = build.daemon_half(checked)
    if not half.drift:
        raise click.UsageError("the config has no drift test: there is nothing to plan")
    known = build.calibrations(checked)
    tests = build.drift_tests(checked, known)
    span = half.windows.step / 1e9
    samples = window_samples or max(round(rate * span), 1)
    context = half.calibration.ranked_within
    if context:
        # Within every context the law is the same: evenly among the smallest cell's places.
        known = {name: Cells(ranked, context).evenly() for name, ranked in known.items()}
    planned = Plan(known, half.windows, tests, samples, seed)
    quiet: Mapping[str, Any] = {}
    outcomes: Outcomes = []
    for change, found in simulate(planned, seconds=seconds):
        if change is None:
            quiet = found
        else:
            outcomes.append((change, found))  # type: ignore[arg-type]
    if as_json:
        _json(quiet, outcomes, samples, span)
    else:
        promises = {
            name: test.promise(build.window_seconds(checked, test)) for name, test in tests.items()
        }
        outlooks = {
            name: sorted({test.outlook(one.reference()) for one in known.values()} - {""})
            for name, test in tests.items()
        }
        _tell(quiet, outcomes, promises, outlooks, samples, span)
    if plot:
        _draw(Path(plot), quiet, outcomes, samples, span)
        click.echo(f"written to {plot}", err=as_json)


def _tell(
    quiet: Mapping[str, Quiet],
    outcomes: Outcomes,
    promises: Mapping[str, str],
    outlooks: Mapping[str, Sequence[str]],
    samples: int,
    span: float,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"windows of {span:g} s with {samples} samples")
    for name, rest in quiet.items():
        console.print(
            f"\n{name}: {promises[name] or 'nothing is promised'}", markup=False, soft_wrap=True
        )
        for outlook in outlooks[name]:
            console.print(f"  {outlook}", markup=False, soft_wrap=True)
        console.print(f"  without a change: {rest.alarms} alarms in {rest.windows:,} windows")
        table = Table("change", "delay", "windows", "missed", "best possible", "ratio", box=None)
        for change, found in outcomes:
            one = found[name]
            missed = f"{one.runs - one.found} of {one.runs}"
            if one.found:
                ratio = f"{one.windows / one.best:.1f}"
                row = [_duration(one.windows * span), f"{one.windows:,.1f}", missed]
            else:
                ratio, row = "-", [f"over {_duration(one.within * span)}", "-", missed]
            table.add_row(change.name, *row, _duration(one.best * span), ratio)
        console.print(table)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2.0 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.2g} s" if seconds < 10.0 else f"{seconds:,.0f} s"


def _json(quiet: Mapping[str, Quiet], outcomes: Outcomes, samples: int, span: float) -> None:
    for name, rest in quiet.items():
        for change, found in outcomes:
            one = found[name]
            row = {
                "test": name,
                "change": change.name,
                "window_seconds": span,
                "window_samples": samples,
                "promised_windows": rest.promised,
                "quiet_windows": rest.windows,
                "quiet_alarms": rest.alarms,
                "delay_windows": one.windows if math.isfinite(one.windows) else None,
                "found": one.found,
                "runs": one.runs,
                "followed_windows": one.within,
                "best_windows": one.best,
            }
            click.echo(json.dumps(row))


def _draw(
    path: Path, quiet: Mapping[str, Quiet], outcomes: Outcomes, samples: int, span: float
) -> None:
    """The least delay over the run length for every change, and where the tests stand."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'oodmon[report]'") from None
    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from oodmon.planning import best

    longest = max(rest.run_length for rest in quiet.values())
    unit, length = ("days", 86400.0) if longest * span >= 2 * 86400.0 else ("hours", 3600.0)
    lengths = np.geomspace(10.0, max(10.0 * longest, 1e4), 60)
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(3.2 * len(outcomes), 3.8), sharey=True, squeeze=False
    )
    for axis, (change, found) in zip(axes[0], outcomes, strict=True):
        yardstick = best(change)
        least = [max(yardstick.delay(at * samples) / samples, 1.0) * span for at in lengths]
        axis.plot(lengths * span / length, least, "k--", lw=1, label="best possible")
        for place, (name, rest) in enumerate(quiet.items()):
            one = found[name]
            at, color = rest.run_length * span / length, f"C{place}"
            if one.found > one.runs // 2:
                axis.plot(at, one.windows * span, "o", color=color, label=name)
            else:
                missed = f"{name}: missed for at least"
                axis.plot(at, one.within * span, "^", color=color, mfc="none", label=missed)
        axis.set(xscale="log", yscale="log", title=change.name)
        axis.set_xlabel(f"{unit} between false alarms")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds to the alarm")
    _legend(figure, axes[0])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="lower center", ncols=6)
