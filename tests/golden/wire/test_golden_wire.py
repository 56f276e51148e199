"""Frames that earlier releases wrote are read for good, to the same records."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from oodmon.wire import decode_batch, encode_batch, pack, unpack
from tests.golden.wire.cases import BATCHES, STATES
from tests.wire_records import assert_same_batch

_FOLDER = Path(__file__).parent


def _sums() -> dict[str, str]:
    lines = (_FOLDER / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_golden_frames_are_the_ones_that_were_written() -> None:
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _FOLDER.glob("*.frame")
    }
    assert found == _sums(), "golden frames are added to, never edited"
    assert {Path(name).stem for name in found} == {*BATCHES, *STATES}


@pytest.mark.parametrize("name", BATCHES)
def test_golden_batch_decodes_to_its_record(name: str) -> None:
    batch = decode_batch((_FOLDER / f"{name}.frame").read_bytes())
    assert_same_batch(batch, BATCHES[name])
    assert_same_batch(decode_batch(encode_batch(batch)), BATCHES[name])


@pytest.mark.parametrize("name", STATES)
def test_golden_state_unpacks_to_its_arrays(name: str) -> None:
    arrays, meta = unpack((_FOLDER / f"{name}.frame").read_bytes())
    expected, texts = STATES[name]
    assert meta == texts
    assert arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(arrays[key], array, strict=True)
    assert unpack(pack(arrays, meta))[1] == texts
