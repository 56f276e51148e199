"""A private PostgreSQL server for the tests, and a fresh database in it for each test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.processes import free_port, up
from tests.waiting import PATIENCE_SECONDS

_ENVIRONMENT = "OODMON_TEST_POSTGRES"
_HOW = (
    "install PostgreSQL (Debian: apt-get install postgresql) and psycopg, "
    f"or set {_ENVIRONMENT} to the URL of a server on which databases may be created"
)


class PostgresServer:
    """A cluster in a temporary folder on a free loopback port, run by a user that is not root.

    Args:
        binaries: folder with ``initdb`` and ``postgres``.
        folder: for its data and its log.
    """

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._data = folder / "data"
        self._log = folder / "log"
        self._user = _other_user()
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        self._run("initdb", "--username=oodmon", "--auth=trust", "--encoding=UTF8", "--no-locale")

    @property
    def url(self) -> str:
        """The database that every cluster has."""
        return f"postgresql://oodmon@127.0.0.1:{self._port}/postgres"

    @property
    def runs(self) -> bool:
        """Started, and not stopped."""
        return self._process is not None

    def start(self) -> None:
        """Start and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres",
                    *("-D", self._data, "-p", str(self._port), "-k", ""),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=60"),
                ],
                stdout=log,
                stderr=log,
                cwd="/",
                user=self._user,
            )
        up(self._process, self._answers, lambda: self._log.read_text()[-2000:])

    def stop(self) -> None:
        """Cut every connection and end (SIGINT is PostgreSQL's fast shutdown)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=10).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / command, "-D", self._data, *arguments],
            capture_output=True,
            cwd="/",
            user=self._user,
            timeout=PATIENCE_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{done.stderr.decode(errors='replace')}")


def _other_user() -> str | None:
    """Whom to run it as; PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    names = {account.pw_name for account in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def postgres_binaries() -> Path | None:
    """The folder with the server's programs, the newest one; none where there is none."""
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)
    )
    found = shutil.which("postgres")
    # Links such as /usr/local/bin/postgres: it looks for its library beside the real file.
    folders = [*reversed(installed), *([Path(found).resolve().parent] if found else [])]
    return next((path for path in folders if (path / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's own server, which a test may stop and start again."""
    if _ENVIRONMENT in os.environ:
        pytest.skip(f"only a server of the tests' own may be stopped, and {_ENVIRONMENT} is set")
    pytest.importorskip("psycopg", reason=_HOW)
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip(f"no PostgreSQL here: {_HOW}")
    # Not pytest's folder: the other user must be able to enter it.
    folder = Path(tempfile.mkdtemp(prefix="oodmon-postgres-"))
    server = None
    try:
        server = PostgresServer(binaries, folder)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh, empty database, ``postgresql://…``; dropped after the test."""
    given = os.environ.get(_ENVIRONMENT)
    if given is None:
        given = request.getfixturevalue("postgres_server").url
    psycopg = pytest.importorskip("psycopg", reason=_HOW)
    name = f"oodmon_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(given, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    server, _, query = given.partition("?")
    url = f"{server.rpartition('/')[0]}/{name}"
    yield f"{url}?{query}" if query else url
    with psycopg.connect(given, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, once in SQLite and once in PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'oodmon.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
