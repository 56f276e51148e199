"""The spool against what happens to it: kills, torn tails, flipped bits, full disks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from oodmon.contracts import Delivery
from oodmon.errors import ContractError, FeedError
from oodmon.feeds.spool import Spool, SpoolReader
from oodmon.feeds.spool.segments import (
    FRAME_HEAD_BYTES,
    SEGMENT_HEADER_BYTES,
    frame_of,
    segment_numbers,
    segment_path,
)
from oodmon.wire import encode_batch
from tests.unit.spool_process import batch
from tests.waiting import PATIENCE_SECONDS

SMALL = {"max_bytes": 1 << 20, "segment_bytes": 1 << 13}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "spool")


def start(path: str, **options: object) -> subprocess.Popen[str]:
    arguments = json.dumps({"path": path, "source": "agent", "count": 10, **options})
    command = [sys.executable, "-m", "tests.unit.spool_process", arguments]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def run(path: str, **options: object) -> list[str]:
    process = start(path, **options)
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    return out.splitlines()


def read_all(reader: SpoolReader, limit: int = 64) -> list[Delivery]:
    out: list[Delivery] = []
    while found := reader.poll(limit, 0):
        out.extend(found)
    return out


def sequences(found: Sequence[Delivery]) -> list[int]:
    return [delivery.batch.sequence for delivery in found]


def fill(path: str, count: int, *, source: str = "agent", small: bool = False) -> Path:
    """A writer's folder with so many batches, the writer gone."""
    writer = Spool(path, **(SMALL if small else {})).writer(source)
    for n in range(count):
        assert writer.put(batch(source, n))
    writer.close()
    return writer.folder


@pytest.fixture
def reader(path: str) -> Iterator[SpoolReader]:
    reader = Spool(path).reader()
    yield reader
    reader.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_loses_nothing_that_it_accepted(path: str, seed: int) -> None:
    process = start(path, count=1_000_000, rows=2000, segment_bytes=1 << 16, fsync_seconds=0.01)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(20)]
    time.sleep(random.Random(seed).uniform(0, 0.05))
    process.kill()
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait(PATIENCE_SECONDS) < 0
    lines += rest.splitlines(keepends=True)
    told = [int(line) for line in lines if line.endswith("\n")]
    assert told == list(range(len(told)))
    reader = Spool(path).reader()
    found = sequences(read_all(reader))
    # One more may be whole in the file although the kill came before it was told.
    assert found == list(range(len(found)))
    assert len(told) <= len(found) <= len(told) + 1
    assert reader.damaged_frames == 0
    assert reader.damage.torn <= 1
    reader.close()


def test_segments_roll_and_are_deleted_when_settled(path: str, reader: SpoolReader) -> None:
    folder = fill(path, 60, small=True)
    before = segment_numbers(folder)
    assert len(before) > 3
    found = read_all(reader)
    assert sequences(found) == list(range(60))
    middle = next(d for d in found if d.position.startswith("2:"))
    reader.settle({middle.partition: middle.position})
    assert segment_numbers(folder) == before[2:]
    reader.settle({found[-1].partition: found[-1].position})
    assert not folder.exists(), "the folder of a dead writer stays although all is settled"
    assert reader.backlog_bytes() == 0


def test_the_folder_of_a_living_writer_stays(path: str, reader: SpoolReader) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    found = read_all(reader)
    reader.settle({found[0].partition: found[0].position})
    assert writer.folder.exists()
    writer.put(batch("agent", 1))
    assert sequences(reader.poll(5, 1)) == [1]
    writer.close()


def test_a_writer_that_never_wrote_leaves_nothing(path: str, reader: SpoolReader) -> None:
    folder = fill(path, 0)
    assert not reader.poll(5, 0)
    assert not folder.exists()


@pytest.mark.parametrize("kept", [1, FRAME_HEAD_BYTES - 1, FRAME_HEAD_BYTES, 100])
def test_the_torn_tail_of_a_dead_writer_is_skipped(
    path: str, reader: SpoolReader, kept: int
) -> None:
    folder = fill(path, 3)
    with segment_path(folder, 0).open("ab") as file:
        file.write(frame_of(encode_batch(batch("agent", 3)))[:kept])
    found = read_all(reader)
    assert sequences(found) == [0, 1, 2]
    assert (reader.damage.torn, reader.damaged_frames) == (1, 0)
    reader.settle({found[-1].partition: found[-1].position})
    reader.poll(1, 0)
    assert not folder.exists()


def test_the_tail_of_a_living_writer_is_waited_for(path: str, reader: SpoolReader) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    frame = frame_of(encode_batch(batch("agent", 1)))
    assert sequences(read_all(reader)) == [0]
    with segment_path(writer.folder, 0).open("ab", buffering=0) as file:
        for piece in (frame[:5], frame[5:20], frame[20:-1]):
            file.write(piece)
            assert not reader.poll(1, 0.03)
        file.write(frame[-1:])
    assert sequences(reader.poll(5, 1)) == [1]
    assert (reader.damage.torn, reader.damaged_frames) == (0, 0)
    writer.close()


def test_a_partial_frame_that_is_replaced_is_read_as_it_is_now(
    path: str, reader: SpoolReader
) -> None:
    """The writer cuts a partial frame off when the disk is full, and puts another there later."""
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    file = segment_path(writer.folder, 0)
    size = file.stat().st_size
    partial = frame_of(encode_batch(batch("agent", 1, rows=500)))[:900]
    with file.open("ab", buffering=0) as raw:
        raw.write(partial)
    assert sequences(read_all(reader)) == [0]
    os.truncate(file, size)
    for n in range(2, 5):
        writer.put(batch("agent", n))
    assert sequences(read_all(reader)) == [2, 3, 4]
    assert (reader.damage.torn, reader.damaged_frames) == (0, 0)
    writer.close()


def test_a_torn_segment_before_a_later_one_is_left(path: str, reader: SpoolReader) -> None:
    writer = Spool(path, **SMALL).writer("agent")
    for n in range(40):
        writer.put(batch("agent", n))
    first = segment_path(writer.folder, 0)
    os.truncate(first, first.stat().st_size - 10)
    found = sequences(read_all(reader))
    lost = sorted(set(range(40)) - set(found))
    assert len(lost) == 1
    assert reader.damage.torn == 1
    writer.close()


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_costs_one_batch(path: str, seed: int) -> None:
    folder = fill(path, 20)
    file = segment_path(folder, 0)
    data = bytearray(file.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << (seed % 8)
    file.write_bytes(data)
    reader = Spool(path).reader()
    found = sequences(read_all(reader))
    lost = set(range(20)) - set(found)
    assert found == sorted(found)
    assert reader.damaged_frames == 1
    assert len(lost) == (0 if place < SEGMENT_HEADER_BYTES else 1), lost
    reader.close()


def test_zeros_and_noise_in_the_middle_are_passed_over(path: str, reader: SpoolReader) -> None:
    folder = fill(path, 200)
    file = segment_path(folder, 0)
    data = bytearray(file.read_bytes())
    third = len(data) // 3
    data[third : third + 3000] = bytes(3000)
    data[2 * third : 2 * third + 3000] = random.Random(0).randbytes(3000)
    file.write_bytes(data)
    found = sequences(read_all(reader))
    assert found == sorted(found)
    assert 180 <= len(found) < 200
    assert found[-1] == 199
    assert reader.damaged_frames >= 2
    assert reader.damage.bytes >= 6000


def test_damage_at_the_end_of_a_dead_writer_does_not_hold_the_reader(
    path: str, reader: SpoolReader
) -> None:
    folder = fill(path, 3)
    with segment_path(folder, 0).open("ab") as file:
        file.write(bytes(600_000))  # as a power loss leaves them; longer than one read
    found = read_all(reader)
    assert sequences(found) == [0, 1, 2]
    assert reader.damage.bytes == 600_000
    reader.settle({found[-1].partition: found[-1].position})
    assert not folder.exists()


def test_a_lying_length_is_never_allocated(path: str) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    writer.put(batch("agent", 1, rows=4000))
    writer.put(batch("agent", 2))
    writer.close()
    reader = Spool(path, max_frame_bytes=2000).reader()
    assert sequences(read_all(reader)) == [0, 2]
    assert reader.damaged_frames == 1
    reader.close()


def test_an_unfinished_long_frame_is_waited_for_and_then_left(path: str) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    with segment_path(writer.folder, 0).open("ab") as file:
        file.write(frame_of(bytes(900_000))[:700_000])
    reader = Spool(path, max_frame_bytes=2000).reader()
    assert sequences(read_all(reader)) == [0]
    assert not reader.poll(1, 0.05)
    writer.close()
    time.sleep(0.3)  # until the reader asks again whether the writer lives
    assert not reader.poll(1, 0)
    assert (reader.damage.torn, reader.damaged_frames) == (1, 0)
    reader.close()


def test_a_newer_release_is_waited_for_and_not_skipped(path: str, reader: SpoolReader) -> None:
    folder = fill(path, 1)
    other = fill(path, 2, source="other")
    newer = encode_batch(batch("agent", 1)).replace(b"score_batch/1", b"score_batch/7")
    newer = newer.replace(b"0.1.0", b"7.0.0")
    with segment_path(folder, 0).open("ab") as file:
        file.write(frame_of(newer) + frame_of(encode_batch(batch("agent", 2))))
    found = read_all(reader)
    assert sorted(sequences(found)) == [0, 0, 1]
    assert re.search(r"agent-[0-9a-f]{8} at 0:\d+: .*install oodmon 7\.0\.0", reader.problems()[0])
    reader.settle({d.partition: d.position for d in found})
    assert folder.exists()
    assert not other.exists()


def test_a_full_file_is_a_counted_drop(path: str, reader: SpoolReader) -> None:
    """RLIMIT_FSIZE makes write(2) fail half-way, as a full disk does."""
    lines = run(path, count=40, file_limit_bytes=5000)
    taken = [int(line) for line in lines if not line.startswith("shed")]
    shed = [line for line in lines if line.startswith("shed")]
    assert shed
    assert taken
    assert all("File too large" in line for line in shed)
    assert sequences(read_all(reader)) == taken
    assert (reader.damage.torn, reader.damaged_frames) == (0, 0)


def test_a_disk_without_room_for_a_header_sheds(path: str, reader: SpoolReader) -> None:
    lines = run(path, count=3, file_limit_bytes=10)
    assert [line.split()[0] for line in lines] == ["shed"] * 3
    assert not reader.poll(5, 0)


def test_a_full_spool_sheds_and_recovers(path: str) -> None:
    spool = Spool(path, max_bytes=1 << 15, segment_bytes=1 << 13)
    writer, reader = spool.writer("agent"), spool.reader()
    taken = [n for n in range(200) if writer.put(batch("agent", n))]
    assert len(taken) < 200
    assert writer.shed == 200 - len(taken)
    assert sum(f.stat().st_size for f in Path(path).rglob("*.seg")) <= 1 << 15
    time.sleep(0.11)  # the writer looks again, finds it still full and starts a new segment
    assert not writer.put(batch("agent", 200))
    found = read_all(reader)
    assert sequences(found) == taken
    reader.settle({d.partition: d.position for d in found})
    reader.poll(1, 0)
    assert reader.backlog_bytes() == 0
    time.sleep(0.11)
    assert writer.put(batch("agent", 201))
    assert sequences(reader.poll(5, PATIENCE_SECONDS)) == [201]
    writer.close()
    reader.close()


def test_a_batch_that_no_frame_can_hold_is_shed(path: str) -> None:
    writer = Spool(path, max_frame_bytes=2000).writer("agent")
    assert not writer.put(batch("agent", 0, rows=2000))
    assert "max_frame_bytes" in writer.last_failure
    assert not writer.put(batch("agent", 2**63))
    assert "64 bits" in writer.last_failure
    assert writer.put(batch("agent", 1))
    assert writer.shed == 2
    writer.close()


def test_a_cleared_spool_is_begun_anew(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    for file in writer.folder.iterdir():
        file.unlink()
    writer.folder.rmdir()
    monkeypatch.setattr("oodmon.feeds.spool.append._COUNT_SECONDS", 0.0)
    assert writer.put(batch("agent", 1))
    reader = Spool(path).reader()
    assert sequences(reader.poll(5, 1)) == [1]
    reader.close()
    writer.close()


def test_a_forked_child_does_not_write(path: str, reader: SpoolReader) -> None:
    writer = Spool(path).writer("agent")
    writer.put(batch("agent", 0))
    child = os.fork()
    if child == 0:
        refused = not writer.put(batch("agent", 1))
        writer.close()
        os._exit(0 if refused else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert writer.put(batch("agent", 2)), "the child's close reached the parent"
    assert sequences(read_all(reader)) == [0, 2]
    writer.close()


def test_a_process_that_is_being_started_holds_no_lock(path: str) -> None:
    """Between fork and exec a child shares every open file, and with it every flock."""
    writer, reader = Spool(path).writer("agent"), Spool(path).reader()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        reader.close()  # of the child's own: must not let a second reader in
        os.write(tell, b"closed")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(told, 6) == b"closed"
        with pytest.raises(FeedError, match="already read"):
            Spool(path).reader()
        reader.close()
        writer.close()
        again = Spool(path).reader()
        assert not again.poll(1, 0)
        assert not writer.folder.exists(), "the closed writer still looks alive"
        again.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


def test_a_fixed_spool_replays_in_one_order_whatever_the_kills(path: str) -> None:
    rng = random.Random(1)
    for source in ("a", "b", "c"):
        writer = Spool(path, **SMALL).writer(source)
        at = 0
        for n in range(50):
            at += rng.randrange(3)  # ties between writers, too
            fresh = batch(source, n)
            object.__setattr__(fresh, "observed_at", at)
            assert writer.put(fresh)
        writer.close()
    reader = Spool(path).reader()
    whole = [(d.partition, d.position) for d in read_all(reader)]
    reader.close()
    assert len(whole) == 150
    pieces: list[tuple[str, str]] = []
    positions: dict[str, str] = {}
    while len(pieces) < 150:
        reader = Spool(path).reader()
        reader.seek(positions)
        committed = reader.poll(rng.randrange(1, 12), 0)
        pieces += [(d.partition, d.position) for d in committed]
        positions |= {d.partition: d.position for d in committed}
        reader.poll(rng.randrange(1, 12), 0)  # delivered and lost with the killed daemon
        if rng.random() < 0.5 and positions:
            reader.settle(positions)
        reader.close()
    assert pieces == whole


def test_segments_that_cannot_be_deleted_do_not_cost_a_delivery(
    path: str, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(path, 40, small=True)
    first = reader.poll(1, 0)
    reader.settle({first[0].partition: first[0].position})

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        found = read_all(reader)
        assert sequences(found) == list(range(1, 40))
        reader.settle({found[-2].partition: found[-2].position})
    assert "settled segments stay" in reader.problems()[0]
    reader.settle({found[-1].partition: found[-1].position})
    assert not folder.exists()
    assert not reader.problems()


def test_new_writers_are_found_while_polling(path: str, reader: SpoolReader) -> None:
    assert not reader.poll(5, 0.05)
    begun: list[float] = []

    def late() -> None:
        time.sleep(0.1)
        writer = Spool(path).writer("late")
        begun.append(time.monotonic())
        writer.put(batch("late", 0))
        writer.close()

    thread = threading.Thread(target=late)
    thread.start()
    found = reader.poll(5, PATIENCE_SECONDS)
    delay = time.monotonic() - begun[0]
    thread.join()
    assert sequences(found) == [0]
    assert delay < PATIENCE_SECONDS / 2, "only the end of the poll found it"


def test_close_from_another_thread_ends_a_poll(path: str) -> None:
    reader = Spool(path).reader()
    timer = threading.Timer(0.1, reader.close)
    timer.start()
    begun = time.monotonic()
    assert not reader.poll(5, PATIENCE_SECONDS)
    assert time.monotonic() - begun < PATIENCE_SECONDS / 2
    timer.join()
    with pytest.raises(FeedError, match="closed"):
        reader.poll(5, 0)


def test_only_one_reader(path: str, reader: SpoolReader) -> None:
    with pytest.raises(FeedError, match=rf"already read by process {os.getpid()} on "):
        Spool(path).reader()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(path: str, mode: int) -> None:
    Path(path).mkdir()
    Path(path).chmod(mode)
    for end in (Spool(path).reader, lambda: Spool(path).writer("agent")):
        with pytest.raises(FeedError, match=rf"expected mode 0700, found {mode:04o}"):
            end()


def test_nobody_else_can_read_or_write_what_is_made(path: str) -> None:
    folder = fill(path, 1)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (Path(path), folder, *folder.iterdir())}
    assert set(modes.values()) == {0o700, 0o600}
    assert modes["spool"] == modes[folder.name] == 0o700


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FeedError, match="spool folder"):
            Spool(str(path)).writer("agent")


@pytest.mark.parametrize("source", ["../../etc", "", ".", "a/b\0c", "é" * 300])
def test_any_source_gives_a_folder_within_the_spool(path: str, source: str) -> None:
    writer = Spool(path).writer(source)
    assert writer.folder.resolve().parent == Path(path).resolve()
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{8,90}", writer.folder.name)
    writer.close()


@pytest.mark.parametrize("position", ["", "1", "1:", "a:b", "-1:0", "1:2:3", "1" * 20 + ":0"])
def test_a_position_that_is_none_is_refused(reader: SpoolReader, position: str) -> None:
    with pytest.raises(FeedError, match="position"):
        reader.seek({"agent": position})


@pytest.mark.parametrize(
    "options",
    [
        {"segment_bytes": 100},
        {"max_frame_bytes": 10},
        {"max_bytes": 1 << 20},
        {"fsync_seconds": -1.0},
        {"fsync_seconds": float("nan")},
    ],
)
def test_options_that_cannot_work_are_refused(path: str, options: dict[str, float]) -> None:
    with pytest.raises(ContractError, match=rf"feeds\.spool\.{next(iter(options))}"):
        Spool(path, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_idle_polling_costs_little(path: str, reader: SpoolReader) -> None:
    writers = [Spool(path).writer(f"agent{n}") for n in range(8)]
    for writer in writers:
        writer.put(batch("agent", 0))
    assert len(read_all(reader)) == 8
    before = time.process_time()
    assert not reader.poll(1, 1.0)
    assert time.process_time() - before < 0.3
    for writer in writers:
        writer.close()
