"""The outbox → one receiver: batches, backoff, dead letters, order per subject, a watched timeout.

Each receiver (a sink, or a trigger behind its guard) has a thread of its own, so none waits for
another. An event leaves the outbox only when the receiver has taken it: at least once, and
receivers drop repeats by id. How failures are treated:

- `RetryLater`: the receiver is unwell; the batch waits (exponential backoff with full jitter, or
  longer if the receiver says so) and nothing else is sent to it meanwhile.
- `Rejected`: the batch is cut in halves until the culprits are found; they become dead letters.
- Anything else is the sink's bug: logged once with its traceback, cut in halves in the same way,
  and what fails alone is retried, so that one event cannot hold up the others.
- No answer within the timeout: a thread cannot be ended from outside, so the call is left to
  itself, shown in the metrics, and not waited for at shutdown.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from oodmon.contracts import Clock
from oodmon.daemon.backoff import Backoff, Outbox, Receiver
from oodmon.daemon.metrics import Metrics
from oodmon.errors import Rejected, RetryLater, StoreError
from oodmon.store.events import OutboxRow

__all__ = ["Delivery"]

_log = logging.getLogger(__name__)

_SECOND: Final = 1_000_000_000
_IDLE_SECONDS: Final = 1.0
"""Look into the outbox so often even if nobody says that there is something."""

_MAX_WISH_SECONDS: Final = 3600.0
"""The longest ``Retry-After`` that is honoured."""


class Delivery:
    """The thread that serves one receiver.

    Args:
        name: the receiver in the outbox, such as ``sinks.kafka``.
        receiver: what is called; only ever from this thread.
        outbox: where events wait.
        backoff: options.
        clock: wall clock, ns UTC.
        metrics: where outcomes are counted.
        seed: of the jitter.
        monotonic: seconds, for durations.
    """

    def __init__(
        self,
        name: str,
        receiver: Receiver,
        outbox: Outbox,
        *,
        backoff: Backoff,
        clock: Clock,
        metrics: Metrics,
        seed: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.receiver = receiver
        self.backoff = backoff
        self._outbox = outbox
        self._clock = clock
        self._metrics = metrics
        self._monotonic = monotonic
        # Jitter, not cryptography.
        self._random = random.Random(f"{seed}/{name}")  # noqa: S311
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._opened = False
        self._failures = 0
        self._outbox_failures = 0
        self._first_failed: dict[int, float] = {}
        self._bugs: set[str] = set()
        self._unsettled: list[int] = []
        self._deadline: float | None = None
        self._calling_since: float | None = None
        self._told_stall = False
        self._told_failure = ""
        self._thread = threading.Thread(target=self._run, name=f"deliver {name}", daemon=True)
        for result in ("delivered", "retried", "rejected", "expired"):
            metrics.add("oodmon_sink_deliveries_total", 0, sink=name, result=result)
        metrics.add("oodmon_dead_letters_total", 0, sink=name)
        metrics.put("oodmon_sink_stalled", 0, sink=name)
        metrics.put("oodmon_sink_up", 1, sink=name)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There is something in the outbox."""
        self._wake.set()

    def stop(self, grace_seconds: float) -> None:
        """Deliver what can be delivered without a failure within the grace period, then end."""
        self._deadline = self._monotonic() + grace_seconds
        self._stop.set()
        self._wake.set()

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the end; False where a call hangs, which dies with the process."""
        if self._thread.ident is not None:
            self._thread.join(max(timeout_seconds, 0.0))
        return not self._thread.is_alive()

    @property
    def stalled(self) -> bool:
        """A call runs longer than its timeout. Also keeps the metric and tells the log once."""
        since = self._calling_since
        stalled = since is not None and self._monotonic() - since > self.backoff.timeout_seconds
        self._metrics.put("oodmon_sink_stalled", float(stalled), sink=self.name)
        if stalled and not self._told_stall:
            _log.error(
                "%s has not answered for %g s; its events wait in the outbox",
                self.name,
                self.backoff.timeout_seconds,
            )
        self._told_stall = stalled
        return stalled

    @property
    def failing(self) -> bool:
        """The last call failed, or the outbox could not be read."""
        return self._failures > 0 or self._outbox_failures > 0

    def _run(self) -> None:
        try:
            while not self._finished():
                self._wake.clear()
                wait = self._turn()
                if self._stop.is_set() and wait > 0:
                    break  # drained, or failing: what is left waits for the next start
                if wait > 0:
                    self._pause(wait)
        finally:
            self._close()

    def _finished(self) -> bool:
        deadline = self._deadline
        return self._stop.is_set() and deadline is not None and self._monotonic() >= deadline

    def _pause(self, seconds: float) -> None:
        if self._failures or self._outbox_failures:
            self._stop.wait(seconds)  # new events are no reason to try sooner
        else:
            self._wake.wait(seconds)

    def _turn(self) -> float:
        """Deliver one batch; the seconds to wait before the next, 0 when there may be more."""
        try:
            self._settle(())
            rows = self._outbox.pending(self.name, self._clock(), self.backoff.batch)
            self._outbox_failures = 0
            if not rows:
                return self._idle()
            error = self._open()
            if error is not None:
                return self._retry(rows, error)
            return self._deliver(rows)
        except StoreError as store_error:
            # The database's failure, not the receiver's: over as soon as the outbox can be read.
            _log.warning("%s: the outbox cannot be read or written: %s", self.name, store_error)
            self._outbox_failures += 1
            return self.backoff.wait(self._outbox_failures, self._random.random())
        except Exception:
            _log.exception("%s: delivery failed in a way that it should not", self.name)
            self._failures += 1
            return self._wait(0.0)

    def _idle(self) -> float:
        """Nothing waits: see that the receiver is there, so that the first alert is no surprise."""
        if not self._opened and not self._stop.is_set():
            error = self._open()
            if error is not None:
                return self._fail(error)
            self._recover()
        return _IDLE_SECONDS

    def _open(self) -> Exception | None:
        if self._opened:
            return None
        error = self._call(self.receiver.open)
        self._opened = error is None
        return error

    def _call(self, function: Callable[[], None]) -> Exception | None:
        """One watched call of the receiver: its exception, or none."""
        self._calling_since = began = self._monotonic()
        try:
            function()
        except Exception as error:
            return error
        else:
            return None
        finally:
            self._calling_since = None
            self._metrics.observe(
                "oodmon_sink_delivery_duration_seconds",
                self._monotonic() - began,
                sink=self.name,
            )

    def _deliver(self, rows: Sequence[OutboxRow]) -> float:
        """Send, cutting the batch in halves where the failure is one event's own."""
        work: list[Sequence[OutboxRow]] = [rows]
        held: set[str] = set()  # subjects whose next event must not overtake a failed one
        sent = False
        bugs = 0
        wait = 0.0
        while work:
            part = [row for row in work.pop() if row.event.subject not in held]
            if not part:
                continue
            events = [row.event for row in part]
            error = self._call(partial(self.receiver.send, events))
            if error is None:
                sent = True
                self._recover()
                self._count("delivered", len(part))
                self._settle(part)
                self._forget(part)
            elif isinstance(error, RetryLater):
                rest = [*part, *(row for later in reversed(work) for row in later)]
                return self._retry([row for row in rest if row.event.subject not in held], error)
            elif len(part) > 1:
                self._tell_bug(error)
                half = len(part) // 2
                work += [part[half:], part[:half]]
            elif isinstance(error, Rejected):
                self._bury(part, f"rejected: {error}", "rejected")
            else:
                self._tell_bug(error)
                bugs += 1
                held.add(part[0].event.subject)
                wait = self._retry(part, error)
                if bugs > 1 and not sent:
                    # Nothing goes through: it is the receiver, not an event.
                    rest = [row for later in reversed(work) for row in later]
                    rest = [row for row in rest if row.event.subject not in held]
                    return self._retry(rest, error) if rest else wait
        # One event's own failure holds up nobody else.
        return 0.0 if sent else wait

    def _settle(self, rows: Sequence[OutboxRow]) -> None:
        """These were taken, and so were those that the store did not take note of before.

        What a full disk keeps from being noted is not sent again, unless the process ends.
        """
        self._unsettled += [row.seq for row in rows]
        if self._unsettled:
            self._outbox.settle(self.name, self._unsettled)
            self._unsettled = []

    def _retry(self, rows: Sequence[OutboxRow], error: Exception) -> float:
        """Put rows off, or give up on those that have failed for too long."""
        wait = self._fail(error)
        now = self._clock()
        why = str(error) or type(error).__name__
        # By the monotonic clock: a wall clock that is set on must not make dead letters.
        tried_at = self._monotonic()
        oldest = tried_at - self.backoff.max_age_seconds
        young: list[OutboxRow] = []
        old: list[OutboxRow] = []
        for row in rows:
            first = self._first_failed.setdefault(row.seq, tried_at)
            (old if first <= oldest else young).append(row)
        if old:
            self._bury(old, f"gave up after {self.backoff.max_age_seconds:g} s: {why}", "expired")
        if young:
            self._count("retried", len(young))
            due = now + round(wait * _SECOND)
            self._outbox.defer(self.name, [row.seq for row in young], due, why)
        return wait

    def _fail(self, error: Exception) -> float:
        """Note a failure, and tell the log when it is a new one; the seconds to wait."""
        self._failures += 1
        self._metrics.put("oodmon_sink_up", 0, sink=self.name)
        why = str(error) or type(error).__name__
        if why != self._told_failure:
            _log.warning("%s fails, its events wait in the outbox: %s", self.name, why)
        self._told_failure = why
        return self._wait(error.after_seconds if isinstance(error, RetryLater) else 0.0)

    def _recover(self) -> None:
        if self._told_failure:
            _log.warning("%s works again", self.name)
        self._told_failure = ""
        self._failures = 0
        self._metrics.put("oodmon_sink_up", 1, sink=self.name)

    def _wait(self, wish_seconds: float) -> float:
        drawn = self.backoff.wait(self._failures, self._random.random())
        return max(drawn, min(wish_seconds, _MAX_WISH_SECONDS))

    def _bury(self, rows: Sequence[OutboxRow], why: str, result: str) -> None:
        _log.error("%s: %d event(s) become dead letters: %s", self.name, len(rows), why)
        self._count(result, len(rows))
        self._metrics.add("oodmon_dead_letters_total", len(rows), sink=self.name)
        self._outbox.bury(self.name, [row.seq for row in rows], why)
        self._forget(rows)

    def _forget(self, rows: Sequence[OutboxRow]) -> None:
        for row in rows:
            self._first_failed.pop(row.seq, None)

    def _count(self, result: str, events: int) -> None:
        self._metrics.add("oodmon_sink_deliveries_total", events, sink=self.name, result=result)

    def _tell_bug(self, error: Exception) -> None:
        kind = type(error).__name__
        if isinstance(error, Rejected) or kind in self._bugs:
            return
        self._bugs.add(kind)
        _log.error("%s raised what a sink must not raise", self.name, exc_info=error)

    def _close(self) -> None:
        error = self._call(self.receiver.close)
        if error is not None:
            _log.warning("%s could not be closed: %s", self.name, error)
