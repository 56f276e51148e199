"""The whole of oodmon without IO: score batches in, facts out.

A fold: the facts depend on the batches alone, in their order, and on what `advance` is told. No
clock, no randomness. `freeze` and `thaw` carry it over a restart as if nothing had happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.cells import Cells
from oodmon.contexts import Context
from oodmon.contracts import DriftTest
from oodmon.errors import ContractError, StateError
from oodmon.pipeline.accuracy import Accuracy
from oodmon.pipeline.evidence import evidence, leading
from oodmon.pipeline.flagged import Flagged, most_novel
from oodmon.pipeline.movements import Movements, is_suspicious
from oodmon.pipeline.streams import Streams
from oodmon.records import (
    Alert,
    DriftResult,
    Exceedance,
    Fact,
    Notice,
    ScoreBatch,
    Window,
)
from oodmon.rules import Rule, Rules, Transition
from oodmon.windows import Closed, Windowing, Windows
from oodmon.wire import pack, unpack

__all__ = ["Pipeline", "promises"]

_SCHEMA: Final = "oodmon.pipeline/1"
_MAX_NOTICES: Final = 1024
_SECOND: Final = 1_000_000_000


def promises(windowing: Windowing, tests: Mapping[str, DriftTest[Any]]) -> Mapping[str, str]:
    """Drift test → how often it may be wrong, in words."""
    return {name: test.promise(_span_seconds(windowing, test)) for name, test in tests.items()}


def _span_seconds(windowing: Windowing, test: DriftTest[Any]) -> float:
    return (windowing.step if test.disjoint else windowing.length) / _SECOND


class Pipeline:
    """Calibrate → windows → drift → rules, for one model version.

    Args:
        model, version: what is served; batches of anything else raise `ContractError`.
        calibrations: detector id → calibration. Columns of other detectors are left out.
        windows: how event time is cut.
        tests: id → drift test; each sees every detector in every segment.
        rules: id → rule.
        flag_level: samples with a tail probability of at most this become `Exceedance` facts.
        flag_fdr: where above 0, instead as many as the traffic allows while at most this share of
            them is in-distribution, in expectation.
        context: windows count ranks within it (`oodmon.cells`), so that another mix of traffic is
            no change. Flags are among all reference scores.
    """

    def __init__(
        self,
        model: str,
        version: str,
        calibrations: Mapping[str, Calibration],
        windows: Windowing,
        tests: Mapping[str, DriftTest[Any]],
        rules: Mapping[str, Rule],
        flag_level: float = 0.001,
        flag_fdr: float = 0.0,
        context: Context = Context(),  # noqa: B008  # frozen
    ) -> None:
        if not 0.0 < flag_level < 1.0:
            raise ContractError(f"flag_level: {flag_level} is not in (0, 1)")
        if not 0.0 <= flag_fdr < 1.0:
            raise ContractError(f"flag_fdr: {flag_fdr} is not in [0, 1)")
        for name, rule in rules.items():
            if rule.drift not in tests:
                raise ContractError(f"rules.{name}.drift: there is no drift test {rule.drift!r}")
        self.model = model
        self.version = version
        self.calibrations = dict(calibrations)
        self.windowing = windows
        self.tests = dict(tests)
        self.context = context
        ranked = {d: Cells(c, context) if context else c for d, c in self.calibrations.items()}
        self._cells = {d: cells for d, cells in ranked.items() if isinstance(cells, Cells)}
        self._references = {d: c.reference(model, version) for d, c in ranked.items()}
        judging = {d: c for d, c in self.calibrations.items() if c.measures == EXPECTED_ERROR}
        self._windows = Windows(model, version, windows, judging)
        self._flagged = Flagged(flag_level, flag_fdr)
        self._rules = Rules(rules, {"model": model, "version": version})
        self._streams = Streams(self.tests, self._references)
        self._movements = Movements()
        self._accuracy = Accuracy({d: w.histogram(d) for d, w in self._references.items()})
        self._novel: list[Exceedance] = []
        self._told: dict[str, None] = {}
        self._pending: list[Notice] = []
        self.samples = 0
        self.windows_closed = 0

    # --- the fold -----------------------------------------------------------------------------

    def step(self, batch: ScoreBatch) -> list[Fact]:
        """Take one batch; the facts that it gives rise to, in order."""
        if (batch.model, batch.version) != (self.model, self.version):
            raise ContractError(
                f"batch {batch.sequence} of {batch.source!r} is of {batch.model}/{batch.version}, "
                f"this pipeline watches {self.model}/{self.version}"
            )
        usable = self._usable(batch)
        self._windows.add(
            batch,
            {
                name: self._bins(batch, name) if usable[name] else np.full(batch.rows, -1, np.int64)
                for name in self.calibrations
                if name in batch.scores
            },
        )
        self._tell_strangers(batch)
        step = self.windowing.step
        pane = batch.observed_at - batch.observed_at % step
        if pane + step > self._windows.closed_until:
            scored = {n: self.calibrations[n] for n, good in usable.items() if good}
            self._flagged.add(batch, scored, pane)
        notices: list[Fact] = [
            self._notice(batch, f"{batch.sequence}/{index}", text)
            for index, text in enumerate(batch.notices)
        ]
        notices += self._pending
        self._pending = []
        return notices + self._conclude(self._windows.close())

    def advance(self, now: int) -> list[Fact]:
        """Nothing came although time passed: close what is due at `now`, ns UTC.

        To be called when the feed is drained, or batches that wait in it would be late.
        """
        return self._conclude(self._windows.advance(now))

    def _bins(self, batch: ScoreBatch, name: str) -> npt.NDArray[np.int64]:
        if name in self._cells:
            return self._cells[name].bins(batch)
        return self.calibrations[name].bins(batch.scores[name])

    def _usable(self, batch: ScoreBatch) -> dict[str, bool]:
        """Detector → whether its column may be calibrated: made by the scorer that was."""
        usable = {}
        for name in batch.scores:
            calibration = self.calibrations.get(name)
            digest = batch.digests.get(name, "")
            if calibration is None:
                text = f"detector {name!r} has no calibration here; its scores are left out"
            elif digest != calibration.digest:
                text = (
                    f"detector {name!r} was scored by {digest or 'an unnamed scorer'}, the "
                    f"calibration is of {calibration.digest}: counted as invalid; run `oodmon fit`"
                )
            else:
                usable[name] = True
                continue
            if calibration is not None:
                usable[name] = False
            key = f"{name}/{digest}"
            if key not in self._told and len(self._told) < _MAX_NOTICES:
                self._told[key] = None
                self._pending.append(self._notice(batch, key, text))
        return usable

    def _tell_strangers(self, batch: ScoreBatch) -> None:
        for cells in self._cells.values():
            for what in cells.strangers(batch):
                key = f"context/{what}"
                if key not in self._told and len(self._told) < _MAX_NOTICES:
                    self._told[key] = None
                    text = (
                        f"{what} has too few reference scores to be ranked among: its samples are "
                        "ranked among those of all rare contexts; run `oodmon fit` on data that "
                        "has it, or `oodmon accept`"
                    )
                    self._pending.append(self._notice(batch, key, text))

    def _notice(self, batch: ScoreBatch, key: str, text: str) -> Notice:
        return Notice(self.model, self.version, batch.source, batch.observed_at, key, text)

    def _conclude(self, closings: Iterator[Closed]) -> list[Fact]:
        facts: list[Fact] = []
        for _, group in groupby(closings, key=lambda closed: closed.pane.end):
            facts += self._conclude_span(list(group))
        return facts

    def _conclude_span(self, closings: Sequence[Closed]) -> list[Fact]:
        end = closings[0].pane.end
        windows = [closed.window for closed in closings]
        self.windows_closed += 1
        # Of closed panes alone: what has arrived by now depends on the order of arrival.
        self.samples += sum(closed.pane.samples for closed in closings)
        counts: dict[str, npt.NDArray[np.int64]] = {}
        for closed in closings:
            for name, histogram in closed.pane.detectors.items():
                counts[name] = counts.get(name, 0) + histogram.counts
        flagged = self._flagged.close(self.model, self.version, end, counts)
        panes = [closed.pane for closed in closings]
        results = self._streams.judge(windows, panes)
        moving = [result for result in results if is_suspicious(result)]
        began = [result.since or result.start for result in moving]
        self._novel = most_novel(
            [*self._novel, *flagged], min([*began, end - self.windowing.length])
        )
        suspicious = bool(moving)
        self._movements.take(panes, suspicious=suspicious)
        self._accuracy.take(panes, suspicious=suspicious)
        alerts = [self._alert(transition, results, end) for transition in self._rules.step(results)]
        silent = Window(self.model, self.version, "", end - self.windowing.step, end)
        for alert in alerts:
            if alert.status == "resolved":
                test, detector, segment = (alert.labels[k] for k in ("test", "detector", "segment"))
                self._streams.rearm(test, detector, segment, silent)
        return [*windows, *flagged, *results, *alerts]

    # --- alerts -------------------------------------------------------------------------------

    def _alert(self, transition: Transition, results: Sequence[DriftResult], end: int) -> Alert:
        result = transition.result
        told: dict[str, Any] = {"samples": self.samples, "windows": self.windows_closed}
        if result is not None:
            told |= evidence(
                result,
                [(stream, self._streams.moved(stream)) for stream in leading(result, results)],
                {**self._movements.told(), **self._accuracy.told()},
                self._novel,
                self.promises().get(result.test, ""),
            )
        return transition.alert(end, told)

    def promises(self) -> Mapping[str, str]:
        """Drift test → how often it may be wrong, in words."""
        return promises(self.windowing, self.tests)

    def run_lengths(self) -> Mapping[str, float]:
        """Drift test → expected windows between false alarms, at least; 0 without a promise."""
        return {
            name: test.run_length(_span_seconds(self.windowing, test))
            for name, test in self.tests.items()
        }

    def measurements(self) -> Mapping[tuple[str, str, str], Mapping[str, float]]:
        """(test, detector, segment) → what the test measured about the traffic itself."""
        return self._streams.measurements()

    @property
    def watermark(self) -> int:
        """How far event time has been seen, ns UTC."""
        return self._windows.watermark

    # --- storage ------------------------------------------------------------------------------

    def freeze(self) -> bytes:
        """Everything that the next fact depends on."""
        arrays, cells = self._windows.freeze()
        drift, streams = self._streams.freeze()
        state = {
            "windowing": repr((self.windowing, self.context)),
            "watermark": self._windows.watermark,
            "closed_until": self._windows.closed_until,
            "segments": list(self._windows.segments),
            "last": self._windows.last,
            "cells": cells,
            "streams": streams,
            "movements": self._movements.freeze(),
            "accuracy": self._accuracy.freeze(),
            "references": {name: c.fingerprint for name, c in self.calibrations.items()},
            "flagged": self._flagged.freeze(),
            "novel": [asdict(exceedance) for exceedance in self._novel],
            "episodes": self._rules.freeze(),
            "told": list(self._told),
            "samples": self.samples,
            "windows_closed": self.windows_closed,
        }
        return pack(arrays | drift, {"schema": _SCHEMA, "state": json.dumps(state)})

    def thaw(self, data: bytes) -> None:
        """Back from `freeze`, before the first batch.

        What a changed configuration makes meaningless is left behind: drift states of tests whose
        options changed and of detectors that were calibrated anew, and open windows where the
        windows are cut otherwise now; the next facts begin with a notice about samples so lost.
        """
        arrays, meta = unpack(data)
        if meta.get("schema") != _SCHEMA:
            raise StateError(
                f"pipeline state has schema {meta.get('schema')!r}, expected {_SCHEMA!r}"
            )
        state = json.loads(meta["state"])
        self.samples, self.windows_closed = state["samples"], state["windows_closed"]
        self._told = dict.fromkeys(state["told"])
        self._windows.segments = dict.fromkeys(state["segments"])
        self._windows.last = dict(state["last"])
        before = state["references"]
        known = {n for n, c in self.calibrations.items() if c.fingerprint == before.get(n)}
        self._adopted(state)
        if state["windowing"] == repr((self.windowing, self.context)):
            cells = state["cells"]
            self._flagged.thaw(state["flagged"])
        else:
            cells = []
            known = set()
            self._lost(state)
        self._windows.thaw(state["watermark"], self._aligned(state["closed_until"]), arrays, cells)
        self._streams.thaw(arrays, state["streams"], known)
        self._movements.thaw(state["movements"])
        self._accuracy.thaw(state["accuracy"])
        self._novel = [Exceedance(**row) for row in state["novel"]]
        self._rules.thaw(state["episodes"])

    def _aligned(self, closed_until: int) -> int:
        """Up to the next pane that no closed one overlaps, should panes be cut otherwise now."""
        step = self.windowing.step
        return -(-closed_until // step) * step

    def _adopted(self, state: Mapping[str, Any]) -> None:
        """Tell of references that were accepted anew since (`oodmon accept`)."""
        before, at = state["references"], int(state["watermark"])
        for name, calibration in self.calibrations.items():
            if calibration.origin and calibration.fingerprint != before.get(name):
                key = f"reference/{name}/{calibration.fingerprint}"
                text = f"detector {name!r} has a new reference: {calibration.origin}"
                self._pending.append(Notice(self.model, self.version, "daemon", at, key, text))

    def _lost(self, state: Mapping[str, Any]) -> None:
        samples = sum(cell["samples"] for cell in state["cells"] if not cell["closed"])
        if samples:
            at = int(state["watermark"])
            text = f"windows are cut otherwise now: {samples} samples of open windows were left out"
            self._pending.append(
                Notice(self.model, self.version, "daemon", at, f"windowing/{at}", text)
            )
