"""What the golden frames hold: records in, by name. Frames are added to, never edited."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from oodmon.records import ScoreBatch

_AT = 1_767_225_600_123_456_789

BATCHES: Mapping[str, ScoreBatch] = {
    "score_batch_1_plain": ScoreBatch(
        model="digits",
        version="1",
        source="host-4711-a1b2",
        sequence=0,
        observed_at=_AT,
        scores={"msp": np.array([-0.99, -0.5, -0.25, -0.1], np.float32)},
        digests={"msp": "00112233445566aa"},
    ),
    "score_batch_1_full": ScoreBatch(
        model="Modèle/größe",
        version="2026.1 β",
        source="pod-7",
        sequence=9_007_199_254_740_993,
        observed_at=_AT + 1,
        scores={
            "msp": np.array([0.0, -0.0, np.nan], np.float32),
            "gram": np.array([np.inf, -np.inf, 1e-45], np.float32),
        },
        digests={"msp": "00112233445566aa", "gram": "ffeeddccbbaa9988"},
        sample_ids=("request/1", "line\nbreak \\n and \\ backslash", ""),
        segment=np.array([1, 0, 1], np.int32),
        segments=("eu-west", ""),
        predicted=np.array([3, -1, 2_147_483_647], np.int32),
        dropped=17,
        sampled_fraction=0.125,
        notices=("breaker of `duq` opened: shape mismatch", "ζ"),
    ),
    "score_batch_1_no_rows": ScoreBatch(
        model="digits",
        version="1",
        source="host",
        sequence=3,
        observed_at=0,
        scores={"msp": np.empty(0, np.float32)},
        dropped=2,
    ),
    "score_batch_1_no_detectors": ScoreBatch(
        model="digits",
        version="1",
        source="host",
        sequence=4,
        observed_at=_AT,
        scores={},
        notices=("attached; nothing is scored yet",),
    ),
}

_Arrays = Mapping[str, npt.NDArray[np.generic]]

STATES: Mapping[str, tuple[_Arrays, Mapping[str, str]]] = {
    "arrays_1": (
        {
            "flag": np.array([True, False]),
            "counts": np.arange(6, dtype=np.int64).reshape(2, 3),
            "keys": np.array([0, 2**64 - 1], np.uint64),
            "log_evidence": np.array([-np.inf, 0.5, np.nan]),
            "scalar": np.array(7.25),
            "empty": np.empty((0, 4), np.float32),
        },
        {"model": "digits", "note": "Zeile\n2"},
    ),
}
