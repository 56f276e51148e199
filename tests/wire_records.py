"""Score batches compared field by field, scores bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np

from oodmon.records import ScoreBatch


def assert_same_batch(found: ScoreBatch, expected: ScoreBatch) -> None:
    """`AssertionError` names the field that differs."""
    for field in dataclasses.fields(ScoreBatch):
        old, new = getattr(expected, field.name), getattr(found, field.name)
        if field.name == "scores":
            assert list(old) == list(new)
            for name in old:
                assert old[name].dtype == new[name].dtype == np.float32
                assert old[name].tobytes() == new[name].tobytes(), name
        elif isinstance(old, np.ndarray):
            assert old.dtype == new.dtype, field.name
            assert old.tolist() == new.tolist(), field.name
        else:
            assert type(old) is type(new), field.name
            assert old == new, field.name
