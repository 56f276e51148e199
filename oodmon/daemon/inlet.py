"""The HTTP intake: score batches and raw outputs from servers that cannot run the agent.

POST ``/v1/batches`` takes a score batch (a wire frame, or JSON), POST ``/v1/outputs`` an answer of
a model as KServe's logger sends it; its logits are scored by a process of their own; POST
``/v1/labels`` true classes by sample id. What is answered with 2xx is in the spool and on the disk
(labels: in the store). Everything else was not taken: 4xx says what is
wrong with it, 429 and 503 say when to come again (``Retry-After``).

It has a port of its own. Nobody gets further than the headers without the token or a certificate.
One request is one connection, so that a slow client can be cut off after a fixed time.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from oodmon.admission import Admission
from oodmon.contracts import Clock
from oodmon.daemon.annex import Annex
from oodmon.daemon.bodies import labels_of, outputs_of, scores_of
from oodmon.daemon.listening import Listener
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.porter import Porter
from oodmon.errors import ConfigError, RetryLater, WireError
from oodmon.feeds.spool import Spool
from oodmon.feeds.spool.append import sync_folder
from oodmon.records import ScoreBatch

__all__ = ["Inlet"]

_SECOND: Final = 1_000_000_000
_REMEMBERED: Final = 10_000
"""Events whose repetition is recognised."""
_AHEAD_SECONDS: Final = 300.0
"""A time further in the future would close windows that are still to be filled."""


class Inlet:
    """The server, and its writer into the spool.

    Args:
        options: where and how.
        feed: the daemon's feed; what is accepted goes there and comes back through its reader.
        model, version: what may be posted.
        metrics: where requests are counted.
        clock: wall clock, ns UTC.
        keep_labels: where posted labels go; none: no prediction is kept to hold them against.
    """

    def __init__(
        self,
        options: Admission,
        feed: Spool,
        model: str,
        version: str,
        *,
        metrics: Metrics,
        clock: Clock = time.time_ns,
        keep_labels: Callable[[Mapping[str, int]], None] | None = None,
    ) -> None:
        self.options = options
        self._keep_labels = keep_labels
        self._feed = replace(feed, fsync_seconds=0.0)
        self._stamp = (model, version)
        self._metrics = metrics
        self._clock = clock
        self._source = f"http-{socket.gethostname()[:64]}-{secrets.token_hex(4)}"
        self._annex = (
            Annex(
                options.states_folder,
                options.detectors,
                queue=options.queue_requests,
                timeout_seconds=options.score_timeout_seconds,
            )
            if options.states_folder
            else None
        )
        self._writing = threading.Lock()
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._told: OrderedDict[str, None] = OrderedDict()
        self._tokens = options.requests_per_second
        self._filled_at = time.monotonic()
        self._listener: Listener[Porter] = Listener("intake", "daemon.intake")

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before `start`."""
        return self._listener.port

    def start(self) -> None:
        """Open the spool, start the scoring process, listen.

        Raises:
            ConfigError: the address or a certificate cannot be had.
            FeedError, StateError: the spool or the states cannot be used.
        """
        options = self.options
        context = _tls(options)
        self._writer = self._feed.writer("http")
        try:
            sync_folder(Path(self._feed.path))  # the writer's folder must survive a power loss
            if self._annex is not None:
                self._annex.start()
            self._listener.start(lambda: Porter(self, options, context), options.host, options.port)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Listen no more; what was accepted is in the spool. Safe twice."""
        self._listener.stop()
        if self._annex is not None:
            self._annex.stop()
        self._writer.close()

    # What requests ask for ------------------------------------------------------------------------

    def admit(self) -> float:
        """0 where one more request is within the rate, else how long to wait."""
        with self._writing:
            now = time.monotonic()
            rate = self.options.requests_per_second
            self._tokens = min(max(rate, 1.0), self._tokens + (now - self._filled_at) * rate)
            self._filled_at = now
            if self._tokens < 1.0:
                return (1.0 - self._tokens) / rate
            self._tokens -= 1.0
            return 0.0

    def take_batch(self, body: bytes, content_type: str) -> int:
        """Put a posted score batch into the spool: its rows.

        Raises:
            WireError: the batch is none, or not of this model.
            RetryLater: the spool takes nothing now.
        """
        batch, numbered = scores_of(body, content_type)
        now = self._clock()
        if (batch.model or self._stamp[0], batch.version or self._stamp[1]) != self._stamp:
            raise WireError(f"model: {_named(batch.model, batch.version)} is not watched here")
        if not batch.source:
            raise WireError("source: is required; it names who measured this")
        self._in_time(batch.observed_at, now)
        with self._writing:
            sequence = batch.sequence
            if not numbered:
                sequence = self._numbers.pop(batch.source, 0)
            source = batch.source if numbered else f"{batch.source}@{self._source}"
            self._put(
                replace(
                    batch,
                    model=self._stamp[0],
                    version=self._stamp[1],
                    source=source,
                    sequence=sequence,
                    observed_at=batch.observed_at or now,
                )
            )
            if not numbered:
                self._numbers[batch.source] = sequence + 1
                if len(self._numbers) > _REMEMBERED:
                    self._numbers.popitem(last=False)
        return batch.rows

    def take_outputs(self, body: bytes, headers: Mapping[str, str]) -> int:
        """Score posted outputs and put the scores into the spool: how many rows; as `take_batch`.

        An event that was taken already, or that holds no answer, is no row.
        """
        if self._annex is None:
            raise WireError(
                "raw outputs are not taken here: daemon.intake.states_folder is not set"
            )
        found = outputs_of(body, headers, self.options.output)
        if found is None:
            return 0
        now = self._clock()
        if found.model not in ("", self._stamp[0]):
            raise WireError(f"model: {_named(found.model, found.version)} is not watched here")
        self._in_time(found.observed_at, now)
        with self._writing:
            if found.id and found.id in self._told:
                return 0
        scores, digests = self._annex.score(found.logits)
        rows = len(found.logits)
        names: tuple[str, ...] = ()
        if found.name:
            names = tuple(f"{found.name}/{n}" if rows > 1 else found.name for n in range(rows))
        with self._writing:
            if found.id and found.id in self._told:
                return 0  # sent twice at the same time
            number = self._numbers.get("", 0)
            self._put(
                ScoreBatch(
                    model=self._stamp[0],
                    version=self._stamp[1],
                    source=self._source,
                    sequence=number,
                    observed_at=found.observed_at or now,
                    scores=scores,
                    digests=digests,
                    sample_ids=names,
                    predicted=found.logits.argmax(1).astype(np.int32),
                )
            )
            self._numbers[""] = number + 1
            if found.id:
                self._told[found.id] = None
                if len(self._told) > _REMEMBERED:
                    self._told.popitem(last=False)
        return rows

    def take_labels(self, body: bytes) -> int:
        """Put posted labels into the store: how many; `WireError`, or `StoreError` if it fails."""
        if self._keep_labels is None:
            raise WireError("labels are not taken here: there is no section daemon.labels")
        labels = labels_of(body)
        self._keep_labels(labels)
        return len(labels)

    def count(self, kind: str, status: int) -> None:
        """One more request with this answer."""
        self._metrics.add("oodmon_intake_requests_total", kind=kind, code=str(status))

    def _in_time(self, observed_at: int, now: int) -> None:
        if observed_at > now + _AHEAD_SECONDS * _SECOND:
            raise WireError(f"observed_at: more than {_AHEAD_SECONDS:g} s in the future")

    def _put(self, batch: ScoreBatch) -> None:
        self._writer.last_failure = ""
        accepted = self._writer.put(batch)
        # It may be in the file although it is not known to be on the disk; then it comes twice
        # under one number, and is counted once.
        if not accepted or self._writer.last_failure:
            why = self._writer.last_failure or "the spool is full"
            raise RetryLater(f"cannot be stored now: {why}", 1.0)


def _named(model: str, version: str) -> str:
    return repr(f"{model[:100]}/{version[:100]}")


def _tls(options: Admission) -> ssl.SSLContext | None:
    if not options.certificate_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.certificate_file, options.key_file)
        if options.client_ca_file:
            context.load_verify_locations(options.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"daemon.intake: certificates cannot be used: {error}"]) from None
    return context
