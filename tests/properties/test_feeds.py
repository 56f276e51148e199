"""Whatever lies in a spool, reading it ends, raises nothing and repeats nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from oodmon.feeds.spool import Spool
from oodmon.feeds.spool.segments import SEGMENT_HEADER, frame_of, segment_path
from oodmon.wire import encode_batch
from tests.unit.spool_process import batch

_FRAMES = [frame_of(encode_batch(batch("agent", n, rows=2))) for n in range(6)]
_PIECES = st.one_of(
    st.sampled_from(_FRAMES),
    st.builds(lambda frame, n: frame[:n], st.sampled_from(_FRAMES), st.integers(0, 400)),
    st.binary(max_size=60),
    st.just(frame_of(b"no record")),
    st.just(frame_of(b"")),
    st.just(SEGMENT_HEADER),
)


@contextmanager
def spool_of(segments: list[bytes]) -> Iterator[Spool]:
    root = Path(tempfile.mkdtemp())
    try:
        spool = Spool(str(root / "spool"))
        writer = spool.writer("agent")
        for number, data in enumerate(segments):
            segment_path(writer.folder, number).write_bytes(data)
        writer.close()
        yield spool
    finally:
        shutil.rmtree(root)


def _read(spool: Spool, limit: int, settle: bool) -> list[str]:
    reader = spool.reader()
    out = []
    for _ in range(1000):
        found = reader.poll(limit, 0)
        if not found:
            break
        out += [delivery.position for delivery in found]
        if settle:
            reader.settle({found[-1].partition: found[-1].position})
    else:
        raise AssertionError("reading does not end")
    reader.close()
    return out


@settings(max_examples=60)
@given(st.lists(st.lists(_PIECES, max_size=8), max_size=3), st.integers(1, 4))
def test_any_segments_are_read_to_their_end(content: list[list[bytes]], limit: int) -> None:
    with spool_of([SEGMENT_HEADER + b"".join(pieces) for pieces in content]) as spool:
        first = _read(spool, 64, settle=False)
        places = [tuple(map(int, position.split(":"))) for position in first]
        assert places == sorted(set(places)), "delivered twice or out of order"
        assert _read(spool, limit, settle=True) == first
        assert _read(spool, limit, settle=True) == []


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_any_file_is_read_to_its_end(data: bytes) -> None:
    with spool_of([data]) as spool:
        assert _read(spool, 4, settle=True) == []


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.binary(max_size=40))
def test_whole_frames_survive_what_lies_between_them(kept: list[bool], noise: bytes) -> None:
    """Each frame is found again behind any noise that is not a frame head itself."""
    data = SEGMENT_HEADER
    for keep, frame in zip(kept, _FRAMES, strict=True):
        data += frame if keep else noise
    with spool_of([data]) as spool:
        assert len(_read(spool, 64, settle=True)) == sum(kept)
