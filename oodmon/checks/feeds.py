"""What every feed has to hold to: nothing lost, nothing twice, one order, never in the way.

A check may be run on a feed that earlier checks have used: it begins by settling what is left.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from oodmon.checks import examples_of
from oodmon.contracts import Delivery, Feed, Reader, Writer
from oodmon.records import ScoreBatch

__all__ = ["CHECKS", "cases"]

_PATIENCE_SECONDS = 60.0  # for what has to come, from a server behind the feed, on a busy machine
_POLL_SECONDS = 60.0  # a poll that waits to its end although there is something is found out
_ENOUGH: Final = 3000  # batches after which a feed that is not full yet is taken as large
_START: Final = 1_700_000_000_000_000_000
_numbers = itertools.count()


def cases(cls: type[Feed], address: str = "") -> list[Feed]:
    """Instances with the options of `cls.examples()`; a `path` is filled with a new folder.

    Options may hold ``{address}`` where a server is needed. Without an `address`, a feed that needs
    one gives no case.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made = []
    for chosen in examples_of(cls):
        if "{address}" in str(chosen) and not address:
            continue
        arguments = {name: _filled(value, address) for name, value in chosen.items()}
        if "path" in fields and "path" not in arguments:
            folder = tempfile.mkdtemp(prefix="oodmon-check-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            arguments["path"] = str(Path(folder) / "feed")
        made.append(cls(**arguments))
    return made


def _filled(value: Any, address: str) -> Any:
    if isinstance(value, str):
        return value.replace("{address}", address)
    if isinstance(value, tuple):
        return tuple(_filled(item, address) for item in value)
    return value


def check_what_is_accepted_is_delivered_once(feed: Feed) -> None:
    """Every batch that `put` took comes out once, with the values that went in."""
    with _reading(feed) as reader, _writing(feed) as (source, writer):
        sent = [_batch(source, n, rows=n % 4) for n in range(20)]
        for batch in sent:
            _accept(writer, batch)
        got = _collect(reader, len(sent))
        assert len(got) == len(sent), f"{len(sent)} batches were accepted, {len(got)} delivered"
        for before, delivery in zip(sent, got, strict=True):
            _same(before, delivery.batch)
        assert not reader.poll(10, 0.1), "something was delivered twice"


def check_order_is_kept_per_source(feed: Feed) -> None:
    """The batches of one writer come out in the order in which they went in."""
    with _reading(feed) as reader, _writing(feed) as (source, writer):
        for n in range(30):
            _accept(writer, _batch(source, n))
        got = [delivery.batch.sequence for delivery in _collect(reader, 30)]
        assert got == list(range(30)), f"put in order 0..29, delivered as {got}"


def check_writers_do_not_mix(feed: Feed) -> None:
    """Two writers have partitions of their own, and each batch keeps its source and values."""
    with _reading(feed) as reader, _writing(feed) as (one, first), _writing(feed) as (two, second):
        for n in range(10):
            _accept(first, _batch(one, n))
            _accept(second, _batch(two, n, shift=1))
        got = _collect(reader, 20)
        partitions = {one: set[str](), two: set[str]()}
        for source, shift in ((one, 0), (two, 1)):
            mine = [d for d in got if d.batch.source == source]
            partitions[source] = {d.partition for d in mine}
            assert [d.batch.sequence for d in mine] == list(range(10)), (
                f"of two writers, {source!r} put 0..9 and {[d.batch.sequence for d in mine]} came"
            )
            for delivery in mine:
                _same(_batch(source, delivery.batch.sequence, shift=shift), delivery.batch)
        shared = partitions[one] & partitions[two]
        assert not shared, f"two writers share the partitions {sorted(shared)}"


def check_poll_keeps_to_limit_and_timeout(feed: Feed) -> None:
    """`poll` gives at most `limit`, waits for the timeout when empty, and ends early when not."""
    with _reading(feed) as reader, _writing(feed) as (source, writer):
        begun = time.monotonic()
        assert not reader.poll(5, 0.2), "an empty feed delivered something"
        took = time.monotonic() - begun
        assert 0.15 <= took < _POLL_SECONDS / 2, (
            f"poll of an empty feed for 0.2 s took {took:.3f} s"
        )
        for n in range(12):
            _accept(writer, _batch(source, n))
        begun = time.monotonic()
        got = list(reader.poll(5, _POLL_SECONDS))
        assert time.monotonic() - begun < _POLL_SECONDS / 2, "poll waited although there was one"
        assert 1 <= len(got) <= 5, f"poll(5) delivered {len(got)}"
        while len(got) < 12:
            more = reader.poll(5, _POLL_SECONDS)
            assert 1 <= len(more) <= 5, f"poll(5) delivered {len(more)}"
            got.extend(more)
        assert [d.batch.sequence for d in got] == list(range(12)), "short polls lost the order"


def check_seek_goes_on_exactly_after(feed: Feed) -> None:
    """A new reader continues behind the committed position; without one it begins again."""
    with _writing(feed) as (source, writer):
        with _reading(feed) as reader:
            for n in range(12):
                _accept(writer, _batch(source, n))
            first = _collect(reader, 12)
        for kept in (0, 5, 12):
            positions = {d.partition: d.position for d in first[:kept]}
            with _reading(feed, drain=False) as reader:
                reader.seek(positions)
                got = [d.batch.sequence for d in _collect(reader, 12 - kept, source)]
                assert got == list(range(kept, 12)), (
                    f"after the position of batch {kept - 1} came {got}"
                )
                if kept < 12:
                    reader.seek(positions)  # as after a commit that failed
                    again = [d.batch.sequence for d in _collect(reader, 12 - kept, source)]
                    assert again == got, f"a second seek delivered {again}, the first {got}"


def check_settle_is_idempotent(feed: Feed) -> None:
    """Settling twice, or an older position again, changes nothing of what is to come."""
    with _reading(feed) as reader, _writing(feed) as (source, writer):
        for n in range(12):
            _accept(writer, _batch(source, n))
        got = _collect(reader, 12)[:8]
        for upto in (4, 8, 8, 4):
            reader.settle({d.partition: d.position for d in got[:upto]})
        reader.settle({})
        assert not reader.poll(5, 0.1), "settling delivered something again"
        reader.seek({d.partition: d.position for d in got})
        rest = [d.batch.sequence for d in _collect(reader, 4)]
        assert rest == [8, 9, 10, 11], f"after settling up to batch 7 came {rest}"


def check_backlog_is_what_is_not_settled(feed: Feed) -> None:
    """`backlog_bytes` grows with what is accepted, not with reading, and ends when settled."""
    with _reading(feed) as reader:
        empty = reader.backlog_bytes()
        with _writing(feed) as (source, writer):  # closing it flushes
            for n in range(10):
                _accept(writer, _batch(source, n))
        full = reader.backlog_bytes()
        assert full > empty >= 0, f"backlog of {empty} bytes, and of {full} after ten batches"
        got = _collect(reader, 10)
        assert reader.backlog_bytes() == full, "reading alone changed the backlog"
        reader.settle({d.partition: d.position for d in got})
        left = reader.backlog_bytes()
        assert left <= empty, f"backlog of {left} bytes after all is settled"


def check_close_is_safe_twice(feed: Feed) -> None:
    """Both ends close twice; a closed writer sheds; what it wrote stays for the next reader."""
    with _reading(feed):
        pass
    source = _source()
    writer = feed.writer(source)
    for n in range(5):
        _accept(writer, _batch(source, n))
    writer.close()
    writer.close()
    assert writer.put(_batch(source, 5)) is False, "a closed writer took a batch"
    reader = feed.reader()
    reader.close()
    reader.close()
    with _reading(feed, drain=False) as reader:
        got = _collect(reader, 5, source)
        assert len(got) == 5, f"5 batches were put before close, {len(got)} came out"


def check_full_feed_sheds(feed: Feed) -> None:
    """When full, `put` says False at once; what it took comes out, and room comes back."""
    with _reading(feed) as reader, _writing(feed) as (source, writer):
        taken: list[int] = []
        for n in range(_ENOUGH):
            begun = time.monotonic()
            answer = writer.put(_batch(source, n, rows=64))
            took = time.monotonic() - begun
            assert answer is True or answer is False, f"put answered {answer!r}, not True or False"
            assert took < _POLL_SECONDS / 2, f"put waited for {took:.1f} s"
            if not answer:
                break
            taken.append(n)
        got = _collect(reader, len(taken))
        assert [d.batch.sequence for d in got] == taken, "what was accepted is not what came out"
        reader.settle({d.partition: d.position for d in got})
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not writer.put(_batch(source, _ENOUGH)):
            assert time.monotonic() < deadline, "all is settled, and the feed is full for good"
            assert not reader.poll(1, 0.05), "a batch that was shed came out"


def check_order_is_the_same_whatever_the_calls(feed: Feed) -> None:
    """What is there comes by event time then partition, in small polls as in large ones."""
    with _reading(feed):
        pass
    with _writing(feed) as (one, first), _writing(feed) as (two, second):  # closing flushes
        for n in range(10):
            _accept(first, _batch(one, n, observed_at=_START + 3 * n))
            _accept(second, _batch(two, n, observed_at=_START + 2 * n))
    orders = []
    for limit in (3, 100):
        with _reading(feed, drain=False) as reader:
            reader.seek({})
            got = [d for d in _collect(reader, 20, limit=limit) if d.batch.source in (one, two)]
            orders.append([(d.batch.observed_at, d.partition) for d in got])
    assert len(orders[0]) == 20, f"20 batches were accepted, {len(orders[0])} delivered"
    assert orders[0] == orders[1], "small polls gave another order than one large poll"
    assert orders[1] == sorted(orders[1]), "not by event time, then partition"


CHECKS: Final[tuple[Callable[[Feed], None], ...]] = (
    check_what_is_accepted_is_delivered_once,
    check_order_is_kept_per_source,
    check_writers_do_not_mix,
    check_poll_keeps_to_limit_and_timeout,
    check_seek_goes_on_exactly_after,
    check_settle_is_idempotent,
    check_backlog_is_what_is_not_settled,
    check_close_is_safe_twice,
    check_full_feed_sheds,
    check_order_is_the_same_whatever_the_calls,
)


def _source() -> str:
    return f"check-{next(_numbers)}"


@contextmanager
def _writing(feed: Feed) -> Iterator[tuple[str, Writer]]:
    source = _source()
    writer = feed.writer(source)
    try:
        yield source, writer
    finally:
        writer.close()


@contextmanager
def _reading(feed: Feed, *, drain: bool = True) -> Iterator[Reader]:
    reader = feed.reader()
    try:
        while drain and (left := reader.poll(256, 0.1)):
            reader.settle({d.partition: d.position for d in left})
        yield reader
    finally:
        reader.close()


def _batch(
    source: str, sequence: int, *, rows: int = 3, shift: int = 0, observed_at: int = 0
) -> ScoreBatch:
    scores = np.arange(rows, dtype=np.float32) + np.float32(sequence + 1000 * shift)
    if rows > 2:
        scores[1] = np.nan
    return ScoreBatch(
        model="check",
        version="1",
        source=source,
        sequence=sequence,
        observed_at=observed_at or _START + sequence,
        scores={"a": scores, "b": -scores},
        digests={"a": "0123456789abcdef"},
        sample_ids=tuple(f"{source}-{sequence}-{row}" for row in range(rows)),
        segment=np.zeros(rows, np.int32),
        segments=("all",),
        predicted=np.full(rows, sequence, np.int32),
        dropped=sequence,
        sampled_fraction=0.5,
        notices=(f"notice {sequence}",),
    )


def _accept(writer: Writer, batch: ScoreBatch) -> None:
    assert writer.put(batch) is True, f"an empty feed refused batch {batch.sequence}"


def _collect(reader: Reader, count: int, source: str = "", *, limit: int = 256) -> list[Delivery]:
    """The next `count` deliveries (of one source), or fewer when patience ends."""
    got: list[Delivery] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(got) < count and time.monotonic() < deadline:
        found = reader.poll(limit, min(0.5, _PATIENCE_SECONDS))
        got.extend(d for d in found if source in ("", d.batch.source))
    return got


def _same(before: ScoreBatch, after: ScoreBatch) -> None:
    """Every field equal, scores bit for bit."""
    for field in dataclasses.fields(ScoreBatch):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.name == "scores":
            equal = list(old) == list(new) and all(
                old[name].tobytes() == new[name].tobytes() for name in old
            )
        elif isinstance(old, np.ndarray):
            equal = old.tobytes() == new.tobytes()
        else:
            equal = old == new
        assert equal, f"batch {before.sequence}: {field.name} went in as {old!r}, came as {new!r}"
