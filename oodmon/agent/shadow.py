"""The shadow worker: detectors that need further passes, over some of the passes, out of the way.

ODIN, MC dropout and ensembles run the model several times per sample, so they cannot sit beside the
tap. The gate hands a fraction of the passes that it reads to a second, small queue; this thread
scores them on a private twin of the model and writes batches of its own, ``<source>/shadow``, that
repeat the samples (`ScoreBatch.repeats`): windows count their columns, and no sample twice.

It steps back for serving: the highest nice value, one thread, few rows at once, rest after work, a
stream of its own on CUDA, and a fraction that its budget decides.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from oodmon.agent.passes import Pass, Passes
from oodmon.agent.sampling import Sampler
from oodmon.agent.scoring import Limits, ScorerLike, Scoring
from oodmon.contracts import Writer
from oodmon.records import Activations
from oodmon.taps.twin import Twin

__all__ = ["FIRST", "Shadow"]

log = logging.getLogger(__name__)

FIRST: Final = 0.01
"""Fraction of the passes before it is known what one costs: several times what the tap's does."""

_NICE: Final = 19
_LONGEST_REST_SECONDS: Final = 5.0

_DIFFERENT: Final = 0.05
"""Mean difference of logits, as a share of their spread, from which the twin is another model."""


class Shadow(Scoring):
    """Scores on a twin what the gate hands over; everything else is as in `Scoring`.

    Args:
        twin: further passes through the model.
    """

    thread_name = "oodmon-shadow"

    def __init__(
        self,
        queue: Passes,
        scorers: Mapping[str, ScorerLike],
        open_writer: Callable[[], Writer],
        stamp: tuple[str, str, str],
        sampler: Sampler,
        limits: Limits,
        clock: Callable[[], int],
        twin: Twin,
        *,
        repeats: bool,
        weights: Callable[[], str] = lambda: "",
    ) -> None:
        nice = _NICE if limits.nice else 0
        modest = dataclasses.replace(limits, batch_rows=limits.shadow_rows, nice=nice)
        super().__init__(
            queue,
            scorers,
            open_writer,
            stamp,
            sampler,
            modest,
            clock,
            repeats=repeats,
            weights=weights,
        )
        self._twin = twin
        self._compared = 0
        self._until = float("inf")

    @staticmethod
    def queue(limits: Limits) -> Passes:
        """The small queue that it works from."""
        return Passes(limits.shadow_passes, limits.queue_bytes, limits.shadow_rows)

    def stop(self, timeout_seconds: float) -> bool:
        """Score what waits as far as the time allows, shed and count the rest, close the writer."""
        self._until = time.monotonic() + 0.8 * timeout_seconds
        return super().stop(timeout_seconds)

    def _next(self) -> list[Pass]:
        if time.monotonic() > self._until:
            self._queue.expire(2**63 - 1)
        elif not self._stopping.is_set():
            age = round(self._limits.shadow_age_seconds * 1e9)
            self._queue.expire(self._clock() - age)
        return super()._next()

    def _ready(self, acts: Activations) -> Activations:
        self._compare(acts)
        return dataclasses.replace(acts, probe=self._twin)

    def _rest(self, worked_seconds: float) -> None:
        duty = self._limits.shadow_duty
        rest = min(worked_seconds * (1.0 / duty - 1.0), _LONGEST_REST_SECONDS)
        self._stopping.wait(rest)

    def _compare(self, acts: Activations) -> None:
        """Once per twin: does it answer as the served model did? If not, say so."""
        if acts.inputs is None or acts.logits is None or self._compared == self._twin.builds != 0:
            return
        try:
            found = self._twin.run(acts.inputs).logits
        except Exception:
            # The scorers meet the same, and their breakers tell it.
            log.debug("the twin could not be run", exc_info=True)
            return
        self._compared = self._twin.builds
        if found is None or found.shape != acts.logits.shape:
            return
        served = acts.logits.float()
        gap = (found.float() - served).abs().nanmean()
        spread = (served - served.nanmean()).abs().nanmean()
        if bool(gap > _DIFFERENT * spread):
            self._outlet.tell(
                "further passes answer otherwise than the served model did (mean difference of "
                f"logits {float(gap):.3g}, their spread {float(spread):.3g}): it is in train mode, "
                "under autocast, changed by hooks or called with more than one tensor; shadow "
                "scores are of the model in evaluation mode and its first tensor alone"
            )
