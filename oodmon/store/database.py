"""One database, SQLite or PostgreSQL: connections, transactions, and what a failure means.

Everything that goes wrong surfaces as `StoreError`, whose `retryable` says whether the same call
may work later (server gone, disk full, lock held) or not. No message shows the password.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from oodmon.errors import StoreError
from oodmon.secret import Secret

__all__ = ["Database"]

_BUSY_SECONDS: Final = 30
"""How long a SQLite writer waits for another one (or for a migration) before it gives up."""

_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""The write-ahead log is cut back to this size after a checkpoint."""

_CONNECTIONS: Final = 5
_MORE_CONNECTIONS: Final = 15
"""Kept, and opened beyond that while many receivers deliver at once."""

_POSTGRES_DEFAULTS: Final = {
    "application_name": "oodmon",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""libpq's words; what the URL says goes before. Without them a lost peer is noticed after hours."""

_WRITES: Final = "oodmon_writes"

_RETRYABLE = (OperationalError, InterfaceError, InternalError, PoolTimeout)


class Database:
    """Connections to one database; safe to use from several threads.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or
            ``postgresql://user:password@host:port/name``.
    """

    def __init__(self, url: str | Secret) -> None:
        self._url = _parse(url.reveal() if isinstance(url, Secret) else url)
        self._engine: Engine | None = None

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._url.get_backend_name()

    def __str__(self) -> str:
        """Where it is, without the password and without the query part, which may hold one too."""
        if self.dialect == "sqlite":
            return f"sqlite:///{self._url.database or ''}"
        port = f":{self._url.port}" if self._url.port else ""
        return f"postgresql://{self._url.host or ''}{port}/{self._url.database or ''}"

    @property
    def folder(self) -> str:
        """Where SQLite's file is; "" for a server and for a database in memory."""
        path = self._url.database or ""
        in_a_file = self.dialect == "sqlite" and path not in ("", ":memory:")
        return str(Path(path).parent) if in_a_file else ""

    def log_bytes(self) -> int:
        """Size of SQLite's write-ahead log."""
        try:
            return Path(f"{self._url.database}-wal").stat().st_size
        except OSError:
            return 0

    def open(self) -> None:
        """Make the engine and try one connection. Safe twice."""
        if self._engine is not None:
            return
        engine = self._sqlite() if self.dialect == "sqlite" else self._postgresql()
        event.listen(engine, "begin", _begin)
        self._engine = engine
        try:
            with self.read():
                pass
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Give every connection back. Safe twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that only reads."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: all of it is committed, or nothing."""
        with self._transaction(writes=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        if self._engine is None:
            raise StoreError(f"store {self} is not open")
        try:
            with self._engine.execution_options(**{_WRITES: writes}).begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            # The driver's text may quote the connection string: the chain ends here.
            raise self._failure(error) from None
        except (OverflowError, UnicodeError) as error:
            # The drivers' own, for values that no column takes.
            raise StoreError(f"store {self}: {error}") from error

    def _failure(self, error: SQLAlchemyError) -> StoreError:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
        why = " ".join(str(cause).split()) or type(cause).__name__
        for secret in self._secrets():
            why = why.replace(secret, "****")
        return StoreError(f"store {self}: {why}", retryable=isinstance(error, _RETRYABLE))

    def _secrets(self) -> Iterator[str]:
        if self._url.password:
            yield str(self._url.password)
        for name, value in self._url.query.items():
            if "password" in name:
                yield from (value,) if isinstance(value, str) else value

    def _sqlite(self) -> Engine:
        path = self._url.database or ""
        memory = path in ("", ":memory:")
        if not memory and not path.startswith("file:"):
            _make_private(Path(path), str(self))
        # In memory the database is the connection: one, and the threads take turns.
        sizes = (1, 0) if memory else (_CONNECTIONS, _MORE_CONNECTIONS)
        engine = create_engine(
            self._url,
            poolclass=QueuePool,
            pool_size=sizes[0],
            max_overflow=sizes[1],
            connect_args={"check_same_thread": False, "timeout": _BUSY_SECONDS},
            hide_parameters=True,
        )
        event.listen(engine, "connect", _prepare_sqlite)
        return engine

    def _postgresql(self) -> Engine:
        given = {
            name: value for name, value in _POSTGRES_DEFAULTS.items() if name not in self._url.query
        }
        try:
            return create_engine(
                self._url,
                pool_pre_ping=True,
                pool_size=_CONNECTIONS,
                max_overflow=_MORE_CONNECTIONS,
                connect_args=given,
                hide_parameters=True,
            )
        except ImportError as error:
            raise StoreError(
                f"store {self}: PostgreSQL needs psycopg, which cannot be imported ({error}); "
                "pip install 'oodmon[postgres]'"
            ) from None


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        # Neither the text nor the parser's message: both may hold the password.
        raise StoreError(
            "store url cannot be read; expected sqlite:///file.db or "
            "postgresql://user:password@host:port/name"
        ) from None
    if backend == "postgres":
        backend = "postgresql"
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"store url: {backend!r} is neither sqlite nor postgresql")
    return url.set(drivername="postgresql+psycopg") if backend == "postgresql" else url


def _make_private(path: Path, shown: str) -> None:
    """The file exists and only its owner reads it: sample ids may name people's requests.

    SQLite gives the files beside it (-wal, -shm) the same mode.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"store {shown}: {error.strerror or error}") from error


def _prepare_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    del record
    # The module must not begin transactions by itself: `_begin` does.
    connection.isolation_level = None
    for pragma in (
        # Before the first table, or it has no effect: lets `retention` give space back.
        "auto_vacuum = INCREMENTAL",
        "journal_mode = WAL",
        # FULL: once `append` has returned, the feed forgets what it delivered, so the commit has to
        # outlive a loss of power. NORMAL would outlive kill -9 only.
        "synchronous = FULL",
        "foreign_keys = ON",
        f"journal_size_limit = {_WAL_LIMIT_BYTES}",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":
        return
    # A reader that becomes a writer half-way fails at once when another writer was first; whoever
    # takes the write lock at the start waits for its turn instead.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
