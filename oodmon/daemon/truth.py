"""What labels that came late say of the loss: the same test as on the estimate, on what is true.

A fold beside the pipeline: outcomes in the order in which they became known, facts out. Its state
is committed with the labels that it rests on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from oodmon.calibration import NORMAL_SCORES
from oodmon.drift.accuracy_loss import AccuracyLoss
from oodmon.labelling import LABELS, Labelling
from oodmon.pipeline.evidence import evidence
from oodmon.records import ALL, Alert, DriftResult, Fact, Histogram, Window
from oodmon.rules import Rule, Rules, Transition
from oodmon.store.outcomes import Outcome
from oodmon.wire import rfc3339

__all__ = ["STEPS", "Truth"]

STEPS: Final = 4
"""Steps of the fold in one round of the daemon's upkeep, at most."""
_SECOND: Final = 1_000_000_000
_MILLIONTHS: Final = 1_000_000
_RIGHT: Final = 40
_WRONG: Final = 20
"""Bins in which right and wrong answers are counted: two different ones, so that how alike
neighbours are is reckoned as it is for scores."""
_JUMP: Final = (
    int(np.rint(1000.0 * NORMAL_SCORES[_WRONG])) - int(np.rint(1000.0 * NORMAL_SCORES[_RIGHT]))
) ** 2
_CERTAIN: Final = 10**9
"""Samples that a stated accuracy counts for: so many that nothing is added for chance."""


class Truth:
    """The e-detector of `accuracy_loss` on true losses.

    Every answer that is found to be wrong is a loss of 1, every right one of 0: the sums stand in
    the place of expected errors, and the promise is the same. The expected time to a false alarm is
    at least the one asked for while each labelled sample, given those labelled before, is wrong
    with a probability of at most the reference's (as high as its samples allow) plus what is
    tolerated, or one less the accuracy that was stated. It needs that who is labelled, and when,
    does not depend on whether the answer was right.

    Args:
        labelling: the promise and what is tolerated.
        reference: labelled samples that were held out of the fit, and the wrong ones among them.
        rules: id → rule; all are on `LABELS`.
        model, version: what is served.
        round_seconds: at least so long between two rounds of at most `STEPS` steps.
    """

    def __init__(
        self,
        labelling: Labelling,
        reference: tuple[int, int],
        rules: Mapping[str, Rule],
        model: str,
        version: str,
        round_seconds: float = 60.0,
    ) -> None:
        judged, wrong = reference
        tolerated = labelling.tolerated_loss
        if labelling.least_accuracy:
            judged, tolerated = _CERTAIN, 0.0
            wrong = round(_CERTAIN * (1.0 - labelling.least_accuracy))
        self.model, self.version = model, version
        self._test = AccuracyLoss(labelling.false_alarms, tolerated)
        self._span = round_seconds / STEPS
        known = _histogram(judged, wrong)
        self._reference = Window(model, version, "", 0, 0, judged, detectors={LABELS: known})
        self._rules = rules
        self._for = f"{self._test} {judged} {wrong}"

    @property
    def promise(self) -> str:
        """How often it may be wrong, in words."""
        return self._test.promise(self._span).replace("estimated accuracy", "true accuracy")

    def judge(self, state: str, outcomes: Sequence[Outcome]) -> tuple[str, list[Fact]]:
        """Take what became known at one time, by time of observation: the state then, and facts.

        A state that was made with other options or another reference is begun anew; its episodes
        go on.
        """
        before: Mapping[str, Any] = json.loads(state) if state else {}
        rules = Rules(self._rules, {"model": self.model, "version": self.version})
        rules.thaw(before.get("episodes", []))
        stand = self._test.start(self._reference)
        if before.get("for") == self._for:
            arrays = {name: np.array(values) for name, values in before["arrays"].items()}
            stand = self._test.thaw(self._reference, arrays)
        seen = before.get("seen", 0) + len(outcomes)
        first = outcomes[0].observed_at
        end = max(outcomes[-1].observed_at + 1, before.get("until", 0) + 1)
        losses = np.array([outcome.wrong for outcome in outcomes], np.int64)
        found = replace(
            _histogram(len(losses), int(losses.sum())),
            pairs=len(losses) - 1,
            jumps=int(np.abs(np.diff(losses)).sum()) * _JUMP,
        )
        window = Window(
            self.model,
            self.version,
            "",
            first,
            first + round(self._span * _SECOND),
            len(losses),
            detectors={LABELS: found},
        )
        stand, result = self._test.step(stand, window, LABELS)
        # Ends only grow, so that each step has a row of its own.
        result = replace(result, test=LABELS, start=min(first, end - 1), end=end)
        results = list(self._test.combine([result]))
        facts: list[Fact] = [*results]
        for transition in rules.step(results):
            facts.append(self._alert(transition, results, self._test.moved(stand), seen, end))
            if transition.resolved:
                stand = self._test.rearm(stand, self._reference)
        after = {
            "for": self._for,
            "arrays": {name: array.tolist() for name, array in self._test.freeze(stand).items()},
            "episodes": rules.freeze(),
            "seen": seen,
            "until": end,
        }
        return json.dumps(after), facts

    def _alert(
        self,
        transition: Transition,
        results: Sequence[DriftResult],
        moved: Mapping[str, Any],
        seen: int,
        end: int,
    ) -> Alert:
        result = transition.result
        told: dict[str, Any] = {"samples": seen}
        if result is not None:
            streams = [(one, moved) for one in results if one.detector != ALL]
            told |= evidence(result, streams, {}, (), self.promise)
            told["summary"] = _summary(result, moved, resolved=transition.resolved)
        return transition.alert(end, told)


def _histogram(judged: int, wrong: int) -> Histogram:
    none = Histogram.empty()
    counts = none.counts.copy()
    counts[_RIGHT], counts[_WRONG] = judged - wrong, wrong
    return replace(none, counts=counts, judged=judged, errors=wrong * _MILLIONTHS)


def _summary(result: DriftResult, moved: Mapping[str, Any], *, resolved: bool) -> str:
    """In plain words."""
    if resolved:
        return "Labels that came since show no loss of accuracy any more."
    if not moved:
        return "Labels that came late show a loss of accuracy."
    since = f" of samples since about {rfc3339(result.since)}" if result.since else ""
    return (
        f"By {moved['samples']} labels{since} the accuracy is {moved['accuracy_since']:.1%}, not "
        f"{moved['accuracy_reference']:.1%} as in the reference."
    )
