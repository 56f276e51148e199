"""Files: who may write them, and how much of them is believed."""

from __future__ import annotations

import json
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oodmon.calibration import Calibration
from oodmon.config.parse import loads
from oodmon.detectors import Scorer
from oodmon.errors import ConfigError, FeedError, OodmonError, StateError, WireError
from oodmon.feeds.spool import Spool
from oodmon.feeds.spool.segments import SEGMENT_HEADER
from oodmon.registry import detectors
from oodmon.store.events import Store
from oodmon.wire import decode_batch, unpack
from tests.fuzz.targets import batch_of


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    path = tmp_path / "msp.safetensors"
    Scorer(detectors.create("msp"), {}).save(path)
    return path


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "msp.calibration.safetensors"
    scores = np.arange(50, dtype=np.float32)
    Calibration.from_scores("msp", "0123456789abcdef", scores).save(path)
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_written_is_private(tmp_path: Path, scorer: Path, calibration: Path) -> None:
    before = os.umask(0)
    try:
        writer = Spool(str(tmp_path / "spool")).writer("a")
        assert writer.put(batch_of(0))
        writer.close()
        store = Store(f"sqlite:///{tmp_path / 'facts.db'}")
        store.open()
        store.append([], state=b"s", positions={})
        beside = {path.name: mode(path) for path in tmp_path.glob("facts.db*")}
        store.close()
        Scorer.load(scorer).save(tmp_path / "again")
        Calibration.load(calibration).save(tmp_path / "once-more")
    finally:
        os.umask(before)
    assert mode(tmp_path / "spool") == 0o700
    for path in (tmp_path / "spool").rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert list((tmp_path / "spool").rglob("*.seg"))
    for name in ("facts.db", "again", "once-more"):
        assert mode(tmp_path / name) == 0o600, name
    assert {"facts.db", "facts.db-wal"} <= set(beside), "the log holds facts too"
    assert set(beside.values()) == {0o600}, beside


READERS: dict[str, Callable[[Path], object]] = {
    "msp.safetensors": Scorer.load,
    "msp.calibration.safetensors": Calibration.load,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bits", [0o620, 0o602, 0o666])
def test_learnt_files_that_others_may_write_are_refused(
    tmp_path: Path, scorer: Path, calibration: Path, name: str, bits: int
) -> None:
    read = READERS[name]
    read(tmp_path / name)
    (tmp_path / name).chmod(bits)
    with pytest.raises(StateError, match=f"{bits:04o}.*chmod"):
        read(tmp_path / name)
    (tmp_path / name).chmod(0o644)  # readable is well
    read(tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_learnt_files_in_a_folder_that_others_may_write_are_refused(
    tmp_path: Path, scorer: Path, calibration: Path, name: str
) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StateError, match="folder"):
        READERS[name](tmp_path / name)
    tmp_path.chmod(0o1777)  # as /tmp: nobody can put another file in its place
    READERS[name](tmp_path / name)
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", READERS)
def test_learnt_files_of_somebody_else_are_refused(
    tmp_path: Path, scorer: Path, calibration: Path, name: str
) -> None:
    os.chown(tmp_path / name, 12_345, -1)
    with pytest.raises(StateError, match="owner"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777])
def test_a_spool_that_others_may_write_is_refused(tmp_path: Path, bits: int) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    folder.chmod(bits)
    for end in (Spool(str(folder)).reader, lambda: Spool(str(folder)).writer("a")):
        with pytest.raises(FeedError, match="other users"):
            end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_spool_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir(mode=0o700)
    for end in (Spool(str(folder)).reader, lambda: Spool(str(folder)).writer("a")):
        end().close()
        os.chown(folder, 12_345, -1)
        with pytest.raises(FeedError, match="user"):
            end()
        os.chown(folder, 0, -1)


def test_a_link_in_the_spool_is_not_followed(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "spool"))
    writer = spool.writer("a")
    assert writer.put(batch_of(0))
    writer.close()
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "spool").rename(elsewhere)
    (tmp_path / "spool").mkdir(mode=0o700)
    folder = next(path for path in elsewhere.iterdir() if path.is_dir())
    (tmp_path / "spool" / folder.name).symlink_to(folder)
    reader = spool.reader()
    try:
        assert not reader.poll(10, 0.05)
    finally:
        reader.close()


def small_peak(work: Callable[[], object], error: type[OodmonError], limit: int) -> None:
    """It fails as it should, and takes next to no memory before it does."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(error):
            work()
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    # What a native library takes is not traced; ru_maxrss is in kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200_000


LIES = [
    (1 << 63).to_bytes(8, "little") + b"{}",
    (1 << 40).to_bytes(8, "little") + b"{}",
    (99_000_000).to_bytes(8, "little") + b"{}",
]


def tensor_lie(shape: list[int], last: int) -> bytes:
    header = json.dumps(
        {
            "__metadata__": {"schema": "oodmon.scorer/1", "name": "msp", "options": "{}"},
            "scores": {"dtype": "F32", "shape": shape, "data_offsets": [0, last]},
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


LIES += [
    tensor_lie([1 << 40], 1 << 42),
    tensor_lie([1 << 31, 1 << 31], 8),
    tensor_lie([2], 1 << 50),
]


@pytest.mark.parametrize("data", LIES, ids=range(len(LIES)))
def test_a_header_that_lies_allocates_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "lie"
    path.write_bytes(data)
    path.chmod(0o600)
    small_peak(lambda: Scorer.load(path), StateError, 1 << 20)
    small_peak(lambda: Calibration.load(path), StateError, 1 << 20)
    small_peak(lambda: decode_batch(data), WireError, 1 << 20)
    small_peak(lambda: unpack(data), WireError, 1 << 20)


def test_a_spool_frame_that_lies_allocates_nothing(tmp_path: Path) -> None:
    import struct
    import zlib

    spool = Spool(str(tmp_path / "spool"))
    writer = spool.writer("a")
    assert writer.put(batch_of(0))
    writer.close()
    (segment,) = (tmp_path / "spool").rglob("*.seg")
    good = segment.read_bytes()[len(SEGMENT_HEADER) :]
    head = b"\xf5\xf8OM" + struct.pack("<II", (1 << 32) - 1, 7)
    lie = head + zlib.crc32(head).to_bytes(4, "little")
    segment.write_bytes(SEGMENT_HEADER + good + lie)
    reader = spool.reader()
    tracemalloc.start()
    try:
        assert len(reader.poll(10, 0.5)) == 1
        assert not reader.poll(10, 0.3)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
        reader.close()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"model: !!python/object/apply:os.system ['touch BAD']\n", "model"),
        (b"model: !!python/name:os.system\n", "model"),
        (b"a: &a [x]\nb: [" + b"*a," * 65 + b"]\n", "aliases"),
        (b"[" * 30 + b"]" * 30, "nested levels"),
        (b"a: [" + b"1," * 6000 + b"]\n", "values"),
        (b"a: &a [*a]\n", "alias"),
        (b"#" * ((1 << 18) + 1), "bytes"),
        (
            b"".join(
                b"l%d: &l%d [%s]\n" % (n, n, b"*l%d, *l%d, *l%d" % ((n - 1,) * 3) if n else b"x")
                for n in range(16)
            ),
            "unfold",
        ),
    ],
)
def test_yaml_is_read_safely_and_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=word):
        loads(text, environment={})
    assert not list(tmp_path.iterdir()), "the config was executed"
