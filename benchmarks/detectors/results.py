"""What the table of the detectors' benchmark ends with: means per batch size, and the goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.detectors.frame import JOINT_GOAL, Joint, Line

__all__ = ["results", "text"]

GOAL: Final = 10.0
"""Geometric mean to reach over all methods that both have."""

LARGE: Final = 64
"""A batch of at least so many samples is a large one."""


def results(lines: Sequence[Line], joints: Sequence[Joint]) -> dict[str, Any]:
    """Geometric means of peer's time / ours: a method's settings are averaged before methods are.

    `batches` has a row for each batch size, one for all large ones and one for all; `below` names
    the lines that are slower than the peer, `goals` what the project has set itself, and whether it
    was reached.
    """
    compared = [line for line in lines if not math.isnan(line.ratio)]
    sizes = sorted({line.rows for line in compared})
    groups = {str(size): [line for line in compared if line.rows == size] for size in sizes}
    groups[f"{LARGE} and more"] = [line for line in compared if line.rows >= LARGE]
    groups["all"] = compared
    batches = [_batch(name, of) for name, of in groups.items() if of]
    return {
        "batches": batches,
        "below": [_named(line) for line in compared if line.ratio < 1.0],
        "ranks": [_named(line) for line in compared if line.strays],
        "goals": [*_goals(batches, compared), *_joint(joints)],
    }


def _named(line: Line) -> dict[str, Any]:
    return {"method": line.method, "what": line.what, "ratio": line.ratio}


def _batch(name: str, lines: Sequence[Line]) -> dict[str, Any]:
    per_method: dict[str, list[float]] = {}
    for line in lines:
        per_method.setdefault(line.method, []).append(math.log(line.ratio))
    return {
        "batch": name,
        "methods": len(per_method),
        "lines": len(lines),
        "geometric_mean": math.exp(statistics.fmean(map(statistics.fmean, per_method.values()))),
        "minimum": min(line.ratio for line in lines),
        "below": sum(line.ratio < 1.0 for line in lines),
    }


def _goals(batches: Sequence[Mapping[str, Any]], lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    for batch in batches[-2:]:
        found = batch["geometric_mean"]
        what = f"geometric mean, batch sizes: {batch['batch']}"
        yield {"what": what, "goal": f">= {GOAL:g}x", "found": found, "reached": found >= GOAL}
    least = min(lines, key=lambda line: line.ratio, default=None)
    if least is not None:
        what = f"none below 1x; least: {least.method} {least.what}"
        yield {"what": what, "goal": ">= 1x", "found": least.ratio, "reached": least.ratio >= 1.0}
    for line in lines:
        if line.goal:
            what, reached = f"{line.method} {line.what}", line.ratio >= line.goal
            goal = f">= {line.goal:g}x"
            yield {"what": what, "goal": goal, "found": line.ratio, "reached": reached}


def _joint(joints: Sequence[Joint]) -> Iterator[dict[str, Any]]:
    for joint in joints:
        what = f"{' + '.join(joint.methods)} at {joint.what}, to the dearest alone"
        goal = f"<= {JOINT_GOAL:g}x"
        yield {"what": what, "goal": goal, "found": joint.ratio, "reached": joint.met}


def text(found: Mapping[str, Any]) -> str:
    """The results as a table for the terminal."""
    lines = ["", "peer's time / ours, geometric mean: settings of a method first, then methods"]
    lines.append(
        f"{'batch size':16}{'methods':>9}{'lines':>7}{'mean':>9}{'least':>9}{'below 1x':>10}"
    )
    lines += [
        f"{row['batch']:16}{row['methods']:9}{row['lines']:7}{row['geometric_mean']:8.2f}x"
        f"{row['minimum']:8.2f}x{row['below']:10}"
        for row in found["batches"]
    ]
    for title, key in (("below 1x", "below"), ("rank agreement below 0.9999", "ranks")):
        names = [f"{row['method']} {row['what']} ({row['ratio']:.2f}x)" for row in found[key]]
        lines += ["", f"{title}: {'; '.join(names) or 'none'}"]
    lines += ["", f"{'goal':78}{'':9}{'found':>10}"]
    lines += [
        f"{row['what']:78}{row['goal']:9}{row['found']:9.2f}x"
        f"  {'reached' if row['reached'] else 'NOT REACHED'}"
        for row in found["goals"]
    ]
    return "\n".join(lines)
