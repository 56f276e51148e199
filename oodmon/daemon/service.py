"""The daemon: startup, main loop, shutdown.

The loop is: poll the feed, fold the batches, commit facts, state, positions and outbox rows in one
transaction, settle the feed. Everything that waits on the world (sinks, triggers, HTTP) has threads
of its own and reads what was committed. Signals and requests only set flags.

It fails fast before it is ready and does not end by itself afterwards: a store that fails stops
consumption and turns readiness off until it works again; a sink that fails waits in the outbox; a
batch that the pipeline refuses is counted; a configuration that cannot be built is not taken.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from typing import Final

from oodmon.contracts import Clock, Delivery, Reader
from oodmon.daemon.asked import Asked
from oodmon.daemon.backoff import Backoff
from oodmon.daemon.commits import Commits
from oodmon.daemon.couriers import Couriers
from oodmon.daemon.health import Health
from oodmon.daemon.http import VERSION, Management, Readiness
from oodmon.daemon.intake import Fold, Intake
from oodmon.daemon.late import Late
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.daemon.parts import Pace, Parts
from oodmon.daemon.resume import emit, rebuilt, thaw
from oodmon.daemon.signals import Signals
from oodmon.daemon.steady import SteadyClock
from oodmon.daemon.tenure import Tenure
from oodmon.daemon.upkeep import Retention, Upkeep
from oodmon.errors import OodmonError, StoreError, Superseded
from oodmon.store.events import Store

__all__ = ["Service"]

_log = logging.getLogger(__name__)
_SECOND: Final = 1_000_000_000
_STEP_DOWN_SECONDS: Final = 2.0  # how long a replaced daemon waits for calls of its sinks
_FORCED: Final = 130  # exit status after a second interrupt, as a shell gives it


class Service:
    """One daemon.

    Args:
        parts: what the configuration made.
        reader: opens the daemon's end of the feed; called once this daemon is the one that works.
        store: not yet opened; the service opens and closes it.
        http: (host, port) of the management port; none for no port.
        clock: wall clock, ns UTC; it may jump.
        rebuild: read the configuration again; raises what is wrong with it. None: no reload.
        pace, backoff: options.
        retention: what is kept in the store.
        monotonic: seconds, for durations.
        seed: of the jitter.
    """

    def __init__(
        self,
        *,
        parts: Parts,
        reader: Callable[[], Reader],
        store: Store,
        http: tuple[str, int] | None = None,
        clock: Clock = time.time_ns,
        rebuild: Callable[[], Parts] | None = None,
        pace: Pace | None = None,
        backoff: Backoff | None = None,
        retention: Retention | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        self.metrics = Metrics()
        self._parts = parts
        self._open_reader = reader
        self._reader: Reader | None = None
        self._store = store
        self._clock = clock = SteadyClock(clock, monotonic)
        self._rebuild = rebuild
        self._pace = pace or Pace()
        self._monotonic = monotonic
        self._observer = Observer(self.metrics)
        self._health = Health(self.metrics, self._pace.retry_seconds, self._pace.max_retry_seconds)
        self._couriers = Couriers(
            store,
            backoff=backoff or Backoff(),
            clock=clock,
            metrics=self.metrics,
            seed=seed,
            monotonic=monotonic,
        )
        self._asked = Asked()
        self._blank = parts.pipeline.freeze()
        self._tenure = Tenure(store, self._health, self.metrics, self._asked, monotonic)
        self._late = Late(store, self.metrics, self._observer, self._couriers, lambda: self._parts)
        self._upkeep = Upkeep(
            store, self.metrics, retention or Retention(), self._pace.upkeep_seconds, self._late
        )
        self._commits = Commits(
            store,
            health=self._health,
            metrics=self.metrics,
            observer=self._observer,
            couriers=self._couriers,
            asked=self._asked,
            clock=clock,
            monotonic=monotonic,
        )
        self._group_since = self._advanced = self._sampled = 0.0
        self._http = http and Management(
            *http,
            readiness=self.readiness,
            metrics=self.metrics.render,
            reload=self._asked.reload,
        )

    # --- what signals, requests and the command line call -----------------------------------------

    def run(self) -> int:
        """Startup, loop, shutdown with signals handled: the exit status.

        Before it is ready, what fails is raised (`ConfigError`, `StoreError`, `FeedError`, …).
        """
        with Signals(self._asked):
            self.startup()
            try:
                self.main_loop()
            except BaseException:
                # What is in memory may be half done; a restart begins at the last transaction.
                self._close()
                raise
            self.shutdown()
        return _FORCED if self._asked.forced else 0

    def stop(self, *, force: bool = False) -> None:
        """Ask the loop to end; forced: without waiting for deliveries."""
        self._asked.stop(force=force)

    def reload(self, timeout_seconds: float = 60.0) -> str | None:
        """Ask the loop to reload and wait: none when it took effect, else why it did not."""
        return self._asked.reload(timeout_seconds)

    def readiness(self) -> Readiness:
        """What ``/readyz`` says: sinks, triggers and labels are shown, and do not decide."""
        beside = self._couriers.states() | self._late.states()
        return Readiness(self._health.ready, self._health.parts() | beside)

    @property
    def port(self) -> int:
        """The management port; 0 where there is none."""
        return self._http.port if self._http else 0

    def startup(self) -> None:
        """Open everything and go to where the last transaction left off; raise what fails."""
        try:
            if self._http:
                self._http.start()
            self._store.open()
            put = self.metrics.put
            put("oodmon_build_info", 1, version=VERSION, python=platform.python_version())
            put("oodmon_store_up", 1)
            self._configured()
            self._take_over()
        except BaseException:
            self._close()
            raise

    def _take_over(self) -> None:
        """Wait for the lease, then go to where the last transaction left off.

        What fails is raised, unless this daemon has stood by: then the one before may need a
        moment to let go of the feed, and this one waits on.
        """
        while self._tenure.win():
            try:
                self._reader = self._open_reader()
                self._resume(self._reader)
            except Superseded:
                self._let_go()
            except OodmonError as error:
                self._let_go()
                if not self._tenure.waited:
                    raise
                part = "store" if isinstance(error, StoreError) else "feed"
                self._asked.wait(self._health.fail(part, error))
            else:
                self._health.mend("feed")
                self._couriers.serve(self._parts.receivers, self._pace.grace_seconds)
                self._upkeep.start(self._reader)
                self._health.stage = "ok"
                self._asked.open()
                self._sample()
                _log.info("ready")
                return

    def _step_down(self, error: Superseded) -> None:
        """Another daemon works now: forget what was not committed and stand by."""
        self._tenure.lose(error)
        self._couriers.stop(0.0, lambda: self._asked.forced, _STEP_DOWN_SECONDS)
        self._let_go()
        self._take_over()

    def _let_go(self) -> None:
        self._upkeep.stop()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _resume(self, reader: Reader) -> None:
        snapshot = self._store.load()
        self._parts.pipeline.thaw(self._blank)
        if snapshot is not None and snapshot.state:
            self._thaw(self._parts.pipeline, snapshot.state)
        reader.seek({} if snapshot is None else snapshot.positions)
        parts, agents = self._parts, self._store.agents_seen()
        self._intake = Intake(parts.pipeline, agents, self.metrics, parts.labelling)
        self._observer.episodes(self._store.alerts(status="firing"))

    def _thaw(self, pipeline: Fold, state: bytes) -> None:
        discarded = thaw(pipeline, state)
        if discarded is not None:
            self._emit("state_discarded", discarded)

    def _configured(self) -> None:
        parts, put = self._parts, self.metrics.put
        self._observer.configured(parts.pipeline, parts.flag_level, parts.calibrated)
        put("oodmon_config_last_reload_successful", 1)
        put("oodmon_config_last_reload_success_timestamp_seconds", self._clock() / _SECOND)

    def main_loop(self) -> None:
        """Until someone asks for the end."""
        while not self._asked.stopping:
            try:
                self._turn(self._reader)
            except Superseded as error:
                self._step_down(error)

    def _turn(self, reader: Reader | None) -> None:
        if reader is None:
            return  # the end was asked for while this daemon stood by
        self._tenure.keep()
        self._heed()
        room = self._pace.group_batches - self._intake.group.batches
        batches = self._poll(reader, max(room, 1))
        if batches and not self._intake.group:
            self._group_since = self._monotonic()
        for batch in batches:
            self._intake.take(batch)
        if not batches:
            self._advance()
        if self._due(drained=not batches):
            self._commit()

    def _poll(self, reader: Reader, limit: int) -> Sequence[Delivery]:
        try:
            batches = reader.poll(limit, self._pace.poll_seconds)
        except MemoryError:
            raise  # a restart takes the same batches again
        except Exception as error:
            self.metrics.add("oodmon_feed_failures_total")
            self._asked.wait(self._health.fail("feed", error))
            return ()
        self._health.mend("feed")
        return batches

    def _advance(self) -> None:
        """The feed is drained: time alone may close windows."""
        now = self._monotonic()
        # Before the first batch there is nothing to close, and old batches may still come.
        idle = self._intake.pipeline.watermark and not self._health.fails("feed")
        if idle and now - self._advanced >= self._pace.advance_seconds:
            self._advanced = now
            self._intake.advance(self._clock())

    def _due(self, *, drained: bool) -> bool:
        group = self._intake.group
        full = drained or group.batches >= self._pace.group_batches
        late = self._monotonic() - self._group_since >= self._pace.group_seconds
        return bool(group) and (full or late) and self._commits.rested

    def _commit(self) -> bool:
        reader = self._reader
        return reader is not None and self._commits.commit(self._intake, self._parts.routes, reader)

    def _heed(self) -> None:
        """Do what was asked for, and keep the gauges."""
        asked, waiting = self._asked.reloads()
        if asked:
            outcome: str | None = "another daemon works for this pipeline"
            try:
                outcome = self._reload()
            finally:
                for future in waiting:
                    future.set_result(outcome)
        if self._monotonic() - self._sampled >= self._pace.sample_seconds:
            self._sample()

    def _reload(self) -> str | None:
        """Swap in what the configuration makes now, whole or not at all: why not, or none."""
        if self._rebuild is None:
            return "this daemon was started without a configuration to read again"
        if self._intake.group and not self._commit():
            return "the store does not take the open group"
        parts = rebuilt(self._rebuild, self._parts.pipeline)
        if isinstance(parts, Exception):
            self.metrics.put("oodmon_config_last_reload_successful", 0)
            self._emit("reload_failed", parts)
            return str(parts) or type(parts).__name__
        self._blank = parts.pipeline.freeze()
        self._thaw(parts.pipeline, self._parts.pipeline.freeze())
        self._intake.swap(parts.pipeline, parts.labelling)
        self._parts = parts
        self._couriers.serve(parts.receivers, self._pace.grace_seconds)
        self._configured()
        _log.info("reloaded")
        return None

    def _emit(self, what: str, error: Exception) -> None:
        """An event of the daemon's own, to the sinks that take notices."""
        watchers = self._parts.routes.watchers
        emit(self._store, watchers, self._parts.pipeline, what, error, self._clock())
        self._couriers.wake(watchers)

    def _sample(self) -> None:
        """Gauges that are read, not counted."""
        self._sampled = self._monotonic()
        self._observer.pipeline(self._parts.pipeline)
        self._observer.agents(self._intake.agents.values(), self._clock())
        self._couriers.states()
        if self._reader is not None:
            self._observer.queues(self._reader, self._health, self._store, self._parts.receivers)

    def shutdown(self) -> None:
        """Commit what was taken, deliver what can be delivered in time, close everything."""
        self._asked.stop()
        self._health.stage = "stopping"
        try:
            if self._reader is not None and self._intake.group:
                self._commit()
        except Superseded as error:
            _log.warning("what was taken last was not committed: %s", error)
        self._close()
        _log.info("ended")

    def _close(self) -> None:
        self._asked.close()
        self._couriers.stop(self._pace.grace_seconds, lambda: self._asked.forced)
        if self._http:
            self._http.stop()
        self._let_go()
        self._tenure.end()
        self._store.close()
