"""What an alert tells a person: plain values from the results behind it, and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from oodmon.records import ALL, DriftResult, Exceedance
from oodmon.wire import rfc3339

__all__ = ["evidence", "leading"]

_NAMED: Final = 0.005
"""Share from which one says "at least so many percent"."""
_MOST: Final = 10
"""Streams and samples that are named; the rest is in the store."""

Moved = Mapping[str, Any]


def leading(result: DriftResult, results: Sequence[DriftResult]) -> list[DriftResult]:
    """The streams of the same test with the most evidence, the greatest first."""
    streams = [r for r in results if r.test == result.test and r.detector != ALL]
    return sorted(streams, key=lambda stream: -stream.statistic)[:_MOST]


def evidence(
    result: DriftResult,
    streams: Sequence[tuple[DriftResult, Moved]],
    movements: Mapping[str, Sequence[Moved]],
    novel: Sequence[Exceedance],
    promise: str,
) -> Mapping[str, Any]:
    """The numbers of a decision, the streams that it rests on, and the most novel samples.

    Args:
        result: what the rule decided on.
        streams: those with the most evidence, and what the test says of each (`DriftTest.moved`).
        movements: "classes", "segments" → those that moved most (`Movements.told`); "accuracy" →
            the estimates (`Accuracy.told`).
        novel: flagged samples of late, most novel first.
        promise: how often the test may be wrong, in words.
    """
    return {
        "summary": " ".join(_sentences(result, streams, movements)),
        "statistic": result.statistic,
        "threshold": result.threshold,
        "effect": result.effect,
        "p_value": result.p_value,
        "since": rfc3339(result.since) if result.since else None,
        "window_start": rfc3339(result.start),
        "window_end": rfc3339(result.end),
        "promise": promise,
        "streams": [
            {
                "detector": stream.detector,
                "segment": stream.segment,
                "statistic": stream.statistic,
                "effect": stream.effect,
                "drifted": stream.drifted,
                **moved,
            }
            for stream, moved in streams
        ],
        **movements,
        "novel": list(dict.fromkeys(sample.sample_id for sample in novel))[:_MOST],
    }


def _sentences(
    result: DriftResult,
    streams: Sequence[tuple[DriftResult, Moved]],
    movements: Mapping[str, Sequence[Moved]],
) -> list[str]:
    """What moved, in plain words."""
    told = []
    if result.since:
        at = rfc3339(result.since).replace("T", " ").replace("Z", " UTC")
        told.append(f"The change began at about {at}.")
    changed = [pair for pair in streams if "changed_fraction" in pair[1]]
    if changed:
        # Evidence is bounded, so that in a great change many streams have as much: of those that
        # drifted, the one that changed most.
        stream, moved = max(
            [pair for pair in changed if pair[0].drifted] or changed[:1],
            key=lambda pair: float(pair[1]["changed_fraction_at_least"]),
        )
        where = stream.detector + (f" in segment {stream.segment}" if stream.segment else "")
        least = f"; with 95 % certainty at least {moved['changed_fraction_at_least']:.0%}"
        told.append(
            f"It shows most in {where}: about {moved['changed_fraction']:.0%} of the traffic "
            f"since is different ({moved['samples']} samples"
            f"{least if moved['changed_fraction_at_least'] >= _NAMED else ''})."
        )
        band = max(
            moved["bins"],
            key=lambda b: abs(b["found"] - b["expected"]) / max(b["expected"], 1.0) ** 0.5,
        )
        few = "Only " if band["found"] < band["expected"] else ""
        told.append(
            f"{few}{band['found']} of them are among the most novel "
            f"{100.0 * band['p_at_most']:.3g} % of the reference, where {band['expected']:.3g} "
            "were expected."
        )
    told += [_accuracy(row) for row in movements.get("accuracy", ())[:1]]
    for kind, one in (("classes", "Predicted class"), ("segments", "Segment")):
        if movements.get(kind):
            row = movements[kind][0]
            told.append(
                f"{one} {row['name'] or 'without a name'} went from {row['share_before']:.1%} of "
                f"the traffic to {row['share_since']:.1%}."
            )
    return told


def _accuracy(row: Moved) -> str:
    """Whether it matters, as far as can be told without labels."""
    before, now, error = row["before"], row["now"], row["uncertainty"]
    since = f"± {error:.1%} in {row['samples']} samples since"
    if abs(now - before) <= error:
        return (
            f"The estimated accuracy is {now:.1%} ({since}), {before:.1%} before: no more than "
            "chance explains. It does not see errors of which the model is sure."
        )
    way = "fell" if now < before else "rose"
    return f"The estimated accuracy {way} from {before:.1%} to {now:.1%} ({since})."
