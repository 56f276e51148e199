"""The states of all drift tests' streams, one per test, detector and segment."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.contracts import Arrays, DriftTest
from oodmon.records import ALL, DriftResult, Window

__all__ = ["Streams"]

_Key = tuple[str, str, str]  # test, detector, segment

_values: Final = attrgetter(*(field.name for field in fields(DriftResult)))


class Streams:
    """A fold: the windows of one span in, drift results out.

    Args:
        tests: id → drift test.
        references: detector → what it starts from.
    """

    def __init__(
        self, tests: Mapping[str, DriftTest[Any]], references: Mapping[str, Window]
    ) -> None:
        self._tests = tests
        self._references = references
        self._states: dict[_Key, Any] = {}
        self._latest: dict[_Key, DriftResult] = {}
        self._alarming: set[str] = set()

    def judge(self, windows: Sequence[Window], panes: Sequence[Window]) -> list[DriftResult]:
        """All results of one span; tests that count each sample once are given the panes."""
        results: list[DriftResult] = []
        for name, test in self._tests.items():
            results += self._judge(name, test, panes if test.disjoint else windows)
        return results

    def _judge(
        self, name: str, test: DriftTest[Any], windows: Sequence[Window]
    ) -> Sequence[DriftResult]:
        panes = [(window, detector) for window in windows for detector in window.detectors]
        keys = [(name, detector, window.segment) for window, detector in panes]
        states = [
            self._states[key] if key in self._states else test.start(self._references[key[1]])
            for key in keys
        ]
        seen = set(keys)
        others = [
            latest for key, latest in self._latest.items() if key[0] == name and key not in seen
        ]
        taken = test.step_all(
            states,
            *(zip(*panes, strict=True) if panes else ((), ())),
            sharing=len(keys) + len(others),
            alarming=name in self._alarming,
        )
        results = []
        for key, (state, result) in zip(keys, taken, strict=True):
            self._states[key] = state
            model, version, _, *rest = _values(result)
            results.append(DriftResult(model, version, name, *rest))
        for result in results:
            self._latest[name, result.detector, result.segment] = result
        combined = test.combine(results, others)
        if results:
            self._alarming.discard(name)
            if any(result.detector == ALL and result.drifted for result in combined):
                self._alarming.add(name)
        return combined

    def rearm(self, test: str, detector: str, segment: str, silent: Window) -> None:
        """An episode is over: its streams' evidence starts again from nothing.

        Args:
            test, detector, segment: of the episode; `ALL` stands for all.
            silent: an empty window of the span.
        """
        for key, state in list(self._states.items()):
            if key[0] == test and detector in (ALL, key[1]) and segment in (ALL, key[2]):
                mine = self._tests[test]
                fresh = mine.rearm(state, self._references[key[1]])
                # A stream that is silent from now on keeps its share of a promise that all share.
                _, result = mine.step(fresh, replace(silent, segment=key[2]), key[1])
                self._states[key], self._latest[key] = fresh, replace(result, test=test)

    def moved(self, result: DriftResult) -> Mapping[str, Any]:
        """What the test says of the stream of one result, beside it."""
        key = (result.test, result.detector, result.segment)
        return self._tests[result.test].moved(self._states[key]) if key in self._states else {}

    def measurements(self) -> Mapping[_Key, Mapping[str, float]]:
        """(test, detector, segment) → what the test measured about the traffic itself."""
        return {
            key: found
            for key, state in self._states.items()
            if (found := self._tests[key[0]].measurements(state))
        }

    def freeze(self) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Any]]:
        """Arrays, and plain JSON values that say which is whose.

        Streams of one test whose arrays are of one kind lie in one array, a row each: ten thousand
        streams are a few arrays, not sixty thousand.
        """
        mine: dict[str, list[_Key]] = {}
        for key in sorted(self._states):
            mine.setdefault(key[0], []).append(key)
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        streams: list[list[_Key]] = []
        for name, keys in mine.items():
            for rows, frozen in _frozen(self._tests[name], [self._states[key] for key in keys]):
                for field, array in frozen.items():
                    arrays[f"drift/{len(streams)}/{field}"] = array
                streams.append([keys[row] for row in rows])
        return arrays, {
            "tests": {name: repr(test) for name, test in self._tests.items()},
            "streams": streams,
            "latest": [_values(result) for result in self._latest.values()],
            "alarming": sorted(self._alarming),
        }

    def thaw(
        self,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        state: Mapping[str, Any],
        known: Collection[str],
    ) -> None:
        """Back from `freeze`, but for tests whose options changed.

        Args:
            arrays, state: of `freeze`.
            known: detectors whose reference is still the same; the streams of others start anew.
        """
        mine: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if kind == "drift":
                number, _, field = rest.partition("/")
                mine.setdefault(number, {})[field] = array
        self._states, self._latest = {}, {}
        for index, members in enumerate(state["streams"]):
            found = mine.get(str(index), {})
            for row, (name, detector, segment) in enumerate(members):
                test = self._tests.get(name)
                if test is not None and repr(test) == state["tests"][name] and detector in known:
                    self._states[name, detector, segment] = test.thaw(
                        self._references[detector],
                        # Copied, so that no stream keeps the others in memory.
                        {field: np.array(array[row]) for field, array in found.items()},
                    )
        self._alarming = {
            name
            for name in state["alarming"]
            if name in self._tests and repr(self._tests[name]) == state["tests"][name]
        }
        for values in state["latest"]:
            result = DriftResult(*values)
            key = (result.test, result.detector, result.segment)
            if key in self._states:
                self._latest[key] = result


def _frozen(test: DriftTest[Any], states: Sequence[Any]) -> list[tuple[list[int], Arrays]]:
    """Which states, and their arrays stacked: those of one kind together."""
    found = test.freeze_all(states)
    if found:
        return found
    alike: dict[tuple[Any, ...], tuple[list[int], list[Arrays]]] = {}
    for row, state in enumerate(states):
        frozen = test.freeze(state)
        kind = tuple((name, a.dtype.str, a.shape) for name, a in sorted(frozen.items()))
        rows, members = alike.setdefault(kind, ([], []))
        rows.append(row)
        members.append(frozen)
    return [
        (rows, {name: np.stack([frozen[name] for frozen in members]) for name in members[0]})
        for rows, members in alike.values()
    ]
