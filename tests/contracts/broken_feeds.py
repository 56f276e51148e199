"""Feeds that break one promise each, so that the checks can be seen to notice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from oodmon.checks import feeds as checks
from oodmon.contracts import Delivery, Feed, Reader, Writer
from oodmon.feeds.memory import Memory
from oodmon.records import ScoreBatch


class ThroughWriter(Writer):
    """Passes on to a sound writer."""

    def __init__(self, inner: Writer) -> None:
        self.inner = inner

    def put(self, batch: ScoreBatch) -> bool:
        return self.inner.put(batch)

    def close(self) -> None:
        self.inner.close()


class ThroughReader(Reader):
    """Passes on to a sound reader."""

    def __init__(self, inner: Reader) -> None:
        self.inner = inner

    def seek(self, positions: Mapping[str, str]) -> None:
        self.inner.seek(positions)

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        return self.inner.poll(limit, timeout_seconds)

    def settle(self, positions: Mapping[str, str]) -> None:
        self.inner.settle(positions)

    def backlog_bytes(self) -> int:
        return self.inner.backlog_bytes()

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Broken(Feed):
    """A memory feed with one end replaced."""

    name: ClassVar[str] = "broken"
    writes: Callable[[Writer], Writer] = ThroughWriter
    reads: Callable[[Reader], Reader] = ThroughReader
    inner: Memory = field(default_factory=lambda: Memory(capacity_batches=64))

    def writer(self, source: str) -> Writer:
        return self.writes(self.inner.writer(source))

    def reader(self) -> Reader:
        return self.reads(self.inner.reader())


class Loses(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        return True if batch.sequence == 7 else super().put(batch)


class Repeats(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        return super().put(batch) and (batch.sequence != 7 or super().put(batch))


class Rounds(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        rounded = {name: column.round(-1) for name, column in batch.scores.items()}
        return super().put(dataclasses.replace(batch, scores=rounded))


class Swaps(ThroughReader):
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        return super().poll(limit, timeout_seconds)[::-1]


class OnePartition(ThroughReader):
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        found = super().poll(limit, timeout_seconds)
        return [dataclasses.replace(delivery, partition="all") for delivery in found]


class Generous(ThroughReader):
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        return super().poll(limit + 1, timeout_seconds)


class Hasty(ThroughReader):
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        return super().poll(limit, timeout_seconds / 10)


class Sleepy(ThroughReader):
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        found = super().poll(limit, timeout_seconds)
        if timeout_seconds > 1:
            time.sleep(timeout_seconds / 2)
        return found


class SeeksOneBefore(ThroughReader):
    def seek(self, positions: Mapping[str, str]) -> None:
        super().seek({name: str(max(0, int(text) - 1)) for name, text in positions.items()})


class SeeksNot(ThroughReader):
    def seek(self, positions: Mapping[str, str]) -> None:
        """Stays where it is."""


class SettlesOneMore(ThroughReader):
    def settle(self, positions: Mapping[str, str]) -> None:
        super().settle({name: str(int(text) + 1) for name, text in positions.items()})


class SettlesBack(ThroughReader):
    def settle(self, positions: Mapping[str, str]) -> None:
        super().settle(positions)
        super().seek(positions)


class NoBacklog(ThroughReader):
    def backlog_bytes(self) -> int:
        return 0


class CountsRead(ThroughReader):
    read = 0

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        found = super().poll(limit, timeout_seconds)
        self.read += len(found)
        return found

    def backlog_bytes(self) -> int:
        return super().backlog_bytes() + self.read


class ClosesOnce(ThroughReader):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise AssertionError("closed twice")
        self.closed = True
        super().close()


class WritesWhenClosed(ThroughWriter):
    def close(self) -> None:
        """Stays open."""


class RaisesWhenFull(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        if not super().put(batch):
            raise AssertionError("full")
        return True


class AnswersNothing(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        super().put(batch)
        return None  # type: ignore[return-value]  # the mistake that the check is for


class ClaimsWhenFull(ThroughWriter):
    def put(self, batch: ScoreBatch) -> bool:
        super().put(batch)
        return True


class ByPartition(ThroughReader):
    """One writer's batches first, then the other's."""

    def __init__(self, inner: Reader) -> None:
        super().__init__(inner)
        self.waiting: list[Delivery] = []

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        if not self.waiting:
            found = super().poll(1000, timeout_seconds)
            self.waiting = sorted(found, key=lambda d: (d.partition, d.batch.sequence))
        out, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return out


class ByCall(ThroughReader):
    """Each call turns around what it gives, so the order hangs on the limit."""

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        found = super().poll(limit, timeout_seconds)
        return sorted(found, key=lambda d: -d.batch.observed_at) if limit < 10 else found


BROKEN: Mapping[Callable[[Feed], None], Sequence[Feed]] = {
    checks.check_what_is_accepted_is_delivered_once: [
        Broken(writes=Loses),
        Broken(writes=Repeats),
        Broken(writes=Rounds),
    ],
    checks.check_order_is_kept_per_source: [Broken(reads=Swaps)],
    checks.check_writers_do_not_mix: [Broken(reads=OnePartition), Broken(writes=Rounds)],
    checks.check_poll_keeps_to_limit_and_timeout: [
        Broken(reads=Generous),
        Broken(reads=Hasty),
        Broken(reads=Sleepy),
    ],
    checks.check_seek_goes_on_exactly_after: [
        Broken(reads=SeeksOneBefore),
        Broken(reads=SeeksNot),
    ],
    checks.check_settle_is_idempotent: [Broken(reads=SettlesOneMore), Broken(reads=SettlesBack)],
    checks.check_backlog_is_what_is_not_settled: [
        Broken(reads=NoBacklog),
        Broken(reads=CountsRead),
    ],
    checks.check_close_is_safe_twice: [Broken(reads=ClosesOnce), Broken(writes=WritesWhenClosed)],
    checks.check_full_feed_sheds: [
        Broken(writes=RaisesWhenFull),
        Broken(writes=AnswersNothing),
        Broken(writes=ClaimsWhenFull),
    ],
    checks.check_order_is_the_same_whatever_the_calls: [
        Broken(reads=ByPartition),
        Broken(reads=ByCall),
    ],
}
"""Check → feeds that it must reject."""
