"""Which threshold keeps a promise: found on windows that are resampled from the reference.

For tests that can be tuned (`oodmon.drift.tuned`). `tune` runs a test over windows in which nothing
changed, at several of its textbook run lengths, and takes the one whose measured run length is the
promised one. Beyond what can be simulated the line through the logarithms of both goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import Calibration
from oodmon.contexts import Context
from oodmon.contracts import DriftTest
from oodmon.drift.judged import Judged
from oodmon.drift.resampling import Held, resampled
from oodmon.drift.tuned import Tunable, Tuned
from oodmon.errors import StateError
from oodmon.promises import Promise
from oodmon.trust import write_private

__all__ = ["Threshold", "tune", "tuned"]

_SCHEMA: Final = "oodmon.threshold/1"
WINDOWS: Final = 40_000
"""Windows that a test which judges them one by one is tuned on, per detector."""
EACH: Final = 24_000
"""Windows for each nominal run length of the other tests, at most."""
TOLD: Final = 40
"""Alarms after which a nominal run length needs no further windows."""
STRETCH: Final = 250
"""Windows between two draws of the reference: its own chance is part of the run length."""
FIRST: Final = 2.0
STEPS: Final = 50
"""Nominal run lengths that are tried at most: FIRST · 2^k, or from where they make a difference."""
_LONGEST: Final = 1e9
_HALVINGS: Final = 30
LEAST_ALARMS: Final = 12
"""Below so many a measured run length is not used."""
_FLATTEST: Final = 0.5
"""Least slope of ln(run length) over ln(nominal one) that is believed beyond the simulation."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """What was found for one test, and what it is bound to.

    Attributes:
        test: the options that it was found for.
        window_seconds: length of the windows that the test is given.
        samples: in each of them, about.
        nominal: textbook run length, in windows, at which the promise is kept.
        longest: windows of the longest run length that was measured; the promise may be longer.
        calibrations: detector → digest of its calibration scores.
        context: what scores are ranked within, as `Context` writes itself; "" for nothing.
    """

    test: str
    window_seconds: float
    samples: int
    nominal: float
    longest: float
    calibrations: Mapping[str, str]
    context: str = ""

    def save(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all."""
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1)
        write_private(path, text.encode())

    @staticmethod
    def load(path: Path | str) -> Threshold:
        """Read what `save` wrote; `StateError` names the file and what is wrong with it."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StateError(f"{path}: no such file; `oodmon fit` makes it") from None
        except (OSError, ValueError) as error:
            raise StateError(f"{path}: not a threshold: {error}") from None
        schema = found.pop("schema", "none") if isinstance(found, dict) else "none"
        if schema != _SCHEMA:
            raise StateError(f"{path}: schema is {schema}, expected {_SCHEMA}")
        try:
            made = Threshold(**found)
            usable = made.nominal >= 1.0 and bool(made.calibrations)
        except TypeError as error:
            raise StateError(f"{path}: not a threshold: {error}") from None
        if not usable:
            raise StateError(f"{path}: not a threshold: nominal {made.nominal}")
        return made


def tune(
    test: Tunable[Any],
    held: Mapping[str, Held],
    samples: int,
    window_seconds: float,
    seed: int = 0,
    context: Context | None = None,
) -> Threshold:
    """Find the threshold of one test for all detectors.

    Args:
        test: with `false_alarms`.
        held: detector id → its held-out scores; the promise is shared among them.
        samples: in a window, about.
        window_seconds: length of the windows that the test will be given.
        seed: of the draws.
        context: what `held` is ranked within, if anything.
    """
    wanted = Promise.parse(test.false_alarms).windows(window_seconds) * len(held)
    nominal, longest = 1.0, math.inf
    for index, one in enumerate(held.values()):
        rng = np.random.default_rng([seed, index])
        lengths, measured = _measured(test, one, samples, rng, wanted)
        nominal = max(nominal, _matching(lengths, measured, wanted))
        longest = min(longest, measured[-1])
    return Threshold(
        repr(test),
        window_seconds,
        samples,
        nominal,
        longest,
        {name: _fingerprint(one.calibration) for name, one in held.items()},
        repr(context) if context else "",
    )


def _measured(
    test: Tunable[Any], held: Held, samples: int, rng: np.random.Generator, wanted: float
) -> tuple[list[float], list[float]]:
    """Nominal run lengths, and the ones that were measured at them; both rising."""
    lengths: list[float] = []
    measured: list[float] = []
    p_values = _p_values(test, held, samples, rng) if isinstance(test, Judged) else None
    first, tried = _first(test), None
    for step in range(STEPS):
        nominal = first * 2.0**step
        one = test.nominal(nominal)
        if one == tried:
            break  # as strict as it can be
        tried = one
        if p_values is not None:
            total, alarms = len(p_values), int((p_values <= 1.0 / nominal).sum())
        else:
            total, alarms = _alarms(one, held, samples, rng, EACH)
        if lengths and alarms < LEAST_ALARMS:
            break
        # Lowered by two standard errors; one alarm more, so that none has a finite length.
        found = total / (alarms + 2.0 * math.sqrt(alarms) + 1.0)
        lengths.append(nominal)
        measured.append(max([found, *measured]))
        if found >= wanted:
            break
    return lengths, measured


def _first(test: Tunable[Any]) -> float:
    """The longest nominal run length at which the test is what it is at `FIRST`."""
    shortest = test.nominal(FIRST)
    low, high = FIRST, 2.0 * FIRST
    while high < _LONGEST and test.nominal(high) == shortest:
        low, high = high, 2.0 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if test.nominal(middle) == shortest else (low, middle)
    return low


def _p_values(
    test: Judged, held: Held, samples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Of windows without a change: such a test remembers nothing, so all levels share them."""
    found = []
    free = test.nominal(FIRST)
    name = held.calibration.detector
    for _ in range(WINDOWS // STRETCH):
        reference, windows = resampled(held, samples, STRETCH, rng)
        state = free.start(reference)
        for window in windows:
            _, result = free.step(state, window, name)
            found.append(1.0 if result.p_value is None else result.p_value)
    return np.array(found)


def _alarms(
    test: Tunable[Any], held: Held, samples: int, rng: np.random.Generator, most: int
) -> tuple[int, int]:
    """Windows at risk and alarms among them; every stretch begins with a fresh state."""
    total = alarms = 0
    name = held.calibration.detector
    # Tests that learn from the stream first need longer stretches than those that do not.
    stretch = most // 16
    for done in range(16):
        if done >= 4 and alarms >= TOLD:
            break
        reference, windows = resampled(held, samples, stretch, rng)
        state = test.start(reference)
        for window in windows:
            state, result = test.step(state, window, name)
            total += 1
            alarms += result.drifted
    return total, alarms


def _matching(lengths: list[float], measured: list[float], wanted: float) -> float:
    """The nominal length at which the measured one is the wanted one."""
    x, y = np.log(lengths), np.log(measured)
    goal = math.log(wanted)
    if goal <= y[-1]:
        return float(np.exp(np.interp(goal, y, x)))
    back = min(4, len(x) - 1)
    slope = (y[-1] - y[-1 - back]) / (x[-1] - x[-1 - back]) if back else 1.0
    return float(np.exp(x[-1] + (goal - y[-1]) / min(max(slope, _FLATTEST), 1.0)))


def _fingerprint(calibration: Calibration) -> str:
    told = f"{calibration.detector}\0{calibration.digest}\0".encode()
    return hashlib.blake2b(told + calibration.scores.tobytes(), digest_size=16).hexdigest()


def tuned(
    test: DriftTest[Any],
    threshold: Threshold,
    calibrations: Mapping[str, Calibration],
    window_seconds: float,
    context: Context | None = None,
) -> Tuned[Any]:
    """The test at the threshold that was found; `StateError` where it was found for another."""
    if not isinstance(test, Tunable):
        raise StateError(f"{test!r} is no test that is tuned")
    if threshold.test != repr(test):
        raise StateError(f"it was found for {threshold.test}, the config says {test!r}")
    if threshold.window_seconds != window_seconds:
        raise StateError(
            f"it was found for windows of {threshold.window_seconds:g} s, the config cuts "
            f"{window_seconds:g} s"
        )
    if threshold.context != (repr(context) if context else ""):
        raise StateError(
            f"it was found for ranks within {threshold.context or 'nothing'}, the config says "
            f"{context or 'nothing'}"
        )
    known = {name: _fingerprint(calibration) for name, calibration in calibrations.items()}
    if known != dict(threshold.calibrations):
        other = sorted(
            name
            for name in known.keys() | threshold.calibrations.keys()
            if known.get(name) != threshold.calibrations.get(name)
        )
        raise StateError(f"it was found with other calibrations of {', '.join(other)}")
    return Tuned(test.nominal(threshold.nominal), test.false_alarms, len(known), threshold.samples)
