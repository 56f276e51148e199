"""Which threshold keeps a promise: found on windows that are resampled from the reference.

For tests that can be tuned (`oodmon.tuned`). `tune` runs a test over windows in which nothing
changed, at several of its textbook run lengths, and takes the one whose measured run length is the
promised one. Beyond what can be simulated the line through the logarithms of both goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import EXPECTED_ERROR, Calibration, expected_errors
from oodmon.contracts import DriftTest
from oodmon.errors import StateError
from oodmon.judged import Judged
from oodmon.promises import Promise
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, Window
from oodmon.tuned import Tunable, Tuned

__all__ = ["Held", "Threshold", "block_length", "resampled", "tune", "tuned"]

_SCHEMA: Final = "oodmon.threshold/1"
_SECOND: Final = 1_000_000_000

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
_BLOCKS: Final = 80.0
"""A block of b breaks about a share 2 φ / (b (1 - φ²)) of the correlation: a fortieth here."""
_FLATTEST: Final = 0.5
"""Least slope of ln(run length) over ln(nominal one) that is believed beyond the simulation."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The held-out scores of one detector as they came.

    Attributes:
        calibration: made of them.
        scores: float32 (n,) in the order of the data.
        predicted: int64 (n,) their predicted classes, or empty.
        block: neighbours that are drawn together; 1 draws one by one.
    """

    calibration: Calibration
    scores: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]
    block: int = 1


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
    """

    test: str
    window_seconds: float
    samples: int
    nominal: float
    longest: float
    calibrations: Mapping[str, str]

    def save(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1))
        partial.replace(target)

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


def block_length(scores: npt.NDArray[np.float32]) -> int:
    """Neighbours to draw together, from the lag-one correlation of the scores' ranks in order.

    80 φ / (1 - φ²): long enough to keep nearly all of the correlation, so short that a window is
    made of several, or it could only be one that was seen. At most a tenth of the scores, 1 where φ
    is within three standard errors of zero.
    """
    n = len(scores)
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable").astype(np.float64)
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    phi = float(ranks[1:] @ ranks[:-1]) / power if power else 0.0
    if phi < 3.0 / math.sqrt(n):
        return 1
    phi = min(phi, 0.99)
    return max(min(math.ceil(_BLOCKS * phi / (1.0 - phi**2)), n // 10), 1)


def _drawn(n: int, block: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """(count,) of n places, in blocks of neighbours (Künsch's moving blocks)."""
    blocks = -(-count // block)
    starts = rng.integers(0, n - block + 1, blocks)
    places: npt.NDArray[np.int64] = (starts[:, None] + np.arange(block)).ravel()[:count]
    return places


def resampled(
    held: Held, samples: int, windows: int, rng: np.random.Generator, window_seconds: float = 1.0
) -> tuple[Window, Iterator[Window]]:
    """A reference and so many windows of `samples` samples, all drawn from the held-out scores."""
    n = len(held.scores)
    own = _drawn(n, held.block, n, rng)
    predicted = held.predicted[own] if len(held.predicted) else None
    name = held.calibration.detector
    measures, digest = held.calibration.measures, held.calibration.digest
    drawn = Calibration.from_scores(name, digest, held.scores[own], predicted, measures)
    span = round(window_seconds * _SECOND)
    places = _drawn(n, held.block, windows * samples, rng)
    bins = len(BIN_EDGES) - 1
    found = drawn.bins(held.scores[places]).reshape(windows, samples)
    offsets = found + bins * np.arange(windows)[:, None]
    counts = np.bincount(offsets.ravel(), minlength=windows * bins).reshape(windows, bins)
    keys = np.arange(min(samples, SAMPLE_SIZE), dtype=np.uint64)

    def closed() -> Iterator[Window]:
        for index in range(windows):
            rows = places[index * samples : (index + 1) * samples]
            classes = {}
            if len(held.predicted):
                seen = np.bincount(held.predicted[rows])
                classes = {int(label): int(seen[label]) for label in seen.nonzero()[0]}
            judged = samples if measures == EXPECTED_ERROR else 0
            errors = expected_errors(held.scores[rows]) if judged else 0
            histogram = Histogram(
                counts[index],
                0,
                keys,
                held.scores[rows[: len(keys)]],
                judged=judged,
                errors=errors,
            )
            yield Window(
                "",
                "",
                "",
                index * span,
                (index + 1) * span,
                samples,
                detectors={name: histogram},
                predicted=classes,
            )

    return drawn.reference(), closed()


def tune(
    test: Tunable[Any], held: Mapping[str, Held], samples: int, window_seconds: float, seed: int = 0
) -> Threshold:
    """Find the threshold of one test for all detectors.

    Args:
        test: with `false_alarms`.
        held: detector id → its held-out scores; the promise is shared among them.
        samples: in a window, about.
        window_seconds: length of the windows that the test will be given.
        seed: of the draws.
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
    known = {name: _fingerprint(calibration) for name, calibration in calibrations.items()}
    if known != dict(threshold.calibrations):
        other = sorted(
            name
            for name in known.keys() | threshold.calibrations.keys()
            if known.get(name) != threshold.calibrations.get(name)
        )
        raise StateError(f"it was found with other calibrations of {', '.join(other)}")
    return Tuned(test.nominal(threshold.nominal), test.false_alarms, len(known), threshold.samples)
