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
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.daemon.parts import Pace, Parts
from oodmon.daemon.signals import Signals
from oodmon.errors import ContractError, OodmonError, StoreError
from oodmon.records import Event
from oodmon.store.events import Store
from oodmon.wire import event_source

__all__ = ["Service"]

_log = logging.getLogger(__name__)

_SECOND: Final = 1_000_000_000
_FORCED: Final = 130
"""Exit status after a second interrupt, as a shell gives it."""


class Service:
    """One daemon.

    Args:
        parts: what the configuration made.
        reader: the daemon's end of the feed.
        store: not yet opened; the service opens and closes it.
        http: (host, port) of the management port; none for no port.
        clock: wall clock, ns UTC.
        rebuild: read the configuration again; raises what is wrong with it. None: no reload.
        pace, backoff: options.
        monotonic: seconds, for durations.
        seed: of the jitter.
    """

    def __init__(
        self,
        *,
        parts: Parts,
        reader: Reader,
        store: Store,
        http: tuple[str, int] | None = None,
        clock: Clock = time.time_ns,
        rebuild: Callable[[], Parts] | None = None,
        pace: Pace | None = None,
        backoff: Backoff | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        self.metrics = Metrics()
        self._parts = parts
        self._reader = reader
        self._store = store
        self._clock = clock
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
        self._commits = Commits(
            store,
            reader,
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
        """What ``/readyz`` says: sinks and triggers are shown, and do not decide."""
        return Readiness(self._health.ready, self._health.parts() | self._couriers.states())

    @property
    def port(self) -> int:
        """The management port; 0 where there is none."""
        return self._http.port if self._http else 0

    # --- startup ----------------------------------------------------------------------------------

    def startup(self) -> None:
        """Open everything and go to where the last transaction left off; raise what fails."""
        try:
            if self._http:
                self._http.start()
            self._store.open()
            self._resume()
            self._couriers.serve(self._parts.receivers, self._pace.grace_seconds)
        except BaseException:
            self._close()
            raise
        put = self.metrics.put
        put("oodmon_build_info", 1, version=VERSION, python=platform.python_version())
        put("oodmon_store_up", 1)
        self._configured()
        self._health.stage = "ok"
        self._asked.open()
        self._sample()
        _log.info("ready")

    def _resume(self) -> None:
        snapshot = self._store.load()
        if snapshot is not None and snapshot.state:
            self._thaw(self._parts.pipeline, snapshot.state)
        self._reader.seek({} if snapshot is None else snapshot.positions)
        self._intake = Intake(self._parts.pipeline, self._store.agents_seen(), self.metrics)
        self._observer.episodes(self._store.alerts(status="firing"))

    def _thaw(self, pipeline: Fold, state: bytes) -> None:
        """Go on from a state, or begin anew where it cannot be read any more."""
        fresh = pipeline.freeze()
        try:
            pipeline.thaw(state)
        except Exception as error:
            pipeline.thaw(fresh)
            _log.warning("the pipeline begins anew: its state does not fit", exc_info=True)
            self._emit("state_discarded", error)

    def _configured(self) -> None:
        parts, put = self._parts, self.metrics.put
        self._observer.configured(parts.pipeline, parts.flag_level, parts.calibrated)
        put("oodmon_config_last_reload_successful", 1)
        put("oodmon_config_last_reload_success_timestamp_seconds", self._clock() / _SECOND)

    # --- the loop ---------------------------------------------------------------------------------

    def main_loop(self) -> None:
        """Until someone asks for the end."""
        while not self._asked.stopping:
            self._heed()
            room = self._pace.group_batches - self._intake.group.batches
            batches = self._poll(max(room, 1))
            if batches and not self._intake.group:
                self._group_since = self._monotonic()
            for batch in batches:
                self._intake.take(batch)
            if not batches:
                self._advance()
            if self._due(drained=not batches):
                self._commit()

    def _poll(self, limit: int) -> Sequence[Delivery]:
        try:
            batches = self._reader.poll(limit, self._pace.poll_seconds)
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
        return bool(group) and (
            drained
            or group.batches >= self._pace.group_batches
            or self._monotonic() - self._group_since >= self._pace.group_seconds
        )

    def _commit(self) -> bool:
        return self._commits.commit(self._intake, self._parts.routes)

    # --- between groups ---------------------------------------------------------------------------

    def _heed(self) -> None:
        """Do what was asked for, and keep the gauges."""
        asked, waiting = self._asked.reloads()
        if asked:
            outcome = self._reload()
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
        try:
            parts = self._rebuild()
            self._same_model(parts.pipeline)
        except Exception as error:
            expected = isinstance(error, OodmonError)
            _log.error(  # a traceback only for what is not the user's mistake
                "reload failed, the configuration in force stays: %s",
                error,
                exc_info=not expected,
            )
            self.metrics.put("oodmon_config_last_reload_successful", 0)
            self._emit("reload_failed", error)
            return str(error) or type(error).__name__
        self._thaw(parts.pipeline, self._parts.pipeline.freeze())
        self._intake.swap(parts.pipeline)
        self._parts = parts
        self._couriers.serve(parts.receivers, self._pace.grace_seconds)
        self._configured()
        _log.info("reloaded")
        return None

    def _same_model(self, pipeline: Fold) -> None:
        mine, new = self._parts.pipeline, pipeline
        if (new.model, new.version) != (mine.model, mine.version):
            raise ContractError(
                f"this daemon watches {mine.model}/{mine.version}, the configuration says "
                f"{new.model}/{new.version}: another model needs a restart"
            )

    def _emit(self, what: str, error: Exception) -> None:
        """An event of the daemon's own, to the sinks that take notices."""
        pipeline, now = self._parts.pipeline, self._clock()
        source = event_source(pipeline.model, pipeline.version)
        event = Event(
            id=f"{what}-{pipeline.model}-{pipeline.version}-{now}",
            type=f"oodmon.daemon.{what}.v1",
            source=source,
            subject=source,
            time=now,
            data={"model": pipeline.model, "version": pipeline.version, "error": str(error)},
        )
        watchers = self._parts.routes.watchers
        try:
            self._store.emit([(receiver, event) for receiver in watchers])
        except StoreError as failure:
            _log.warning("%s could not be told: %s", event.type, failure)
        self._couriers.wake(watchers)

    def _sample(self) -> None:
        """Gauges that are read, not counted."""
        self._sampled = self._monotonic()
        self._observer.pipeline(self._parts.pipeline)
        self._observer.agents(self._intake.agents.values(), self._clock())
        self._couriers.states()
        try:
            self.metrics.put("oodmon_feed_backlog_bytes", self._reader.backlog_bytes())
            self._observer.depths(self._store.depths(), self._parts.receivers)
        except Exception as error:
            _log.debug("backlog or outbox cannot be counted: %s", error)

    # --- shutdown ---------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Commit what was taken, deliver what can be delivered in time, close everything."""
        self._asked.stop()
        self._health.stage = "stopping"
        if self._intake.group:
            self._commit()
        self._close()
        _log.info("ended")

    def _close(self) -> None:
        self._asked.close()
        self._couriers.stop(self._pace.grace_seconds, lambda: self._asked.forced)
        if self._http:
            self._http.stop()
        self._reader.close()
        self._store.close()
