"""The schema: migrations say what the tables say, old and new releases, files, secrets."""

from __future__ import annotations

import stat
import sys
import threading
import traceback
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from oodmon.errors import StoreError
from oodmon.secret import Secret
from oodmon.store import schema, tables
from oodmon.store.database import Database
from oodmon.store.events import Store
from tests.waiting import PATIENCE_SECONDS


def test_migrations_make_exactly_the_tables(store_url: str) -> None:
    store = Store(store_url)
    store.open()
    database = Database(store_url)
    database.open()
    with database.write() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, tables.metadata) == []
        inspector = inspect(connection)
        for table in tables.metadata.sorted_tables:
            key = inspector.get_pk_constraint(table.name)
            assert key["constrained_columns"] == [column.name for column in table.primary_key]
            nullable = {
                found["name"]: found["nullable"] for found in inspector.get_columns(table.name)
            }
            assert nullable == {column.name: column.nullable for column in table.c}
    database.close()
    store.close()


def test_revisions_are_those_of_the_folder() -> None:
    config = Config()
    folder = Path(schema.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == schema.REVISIONS


def test_opening_again_changes_nothing(store_url: str) -> None:
    for _ in range(2):
        store = Store(store_url)
        store.open()
        store.open()
        store.append([], state=b"s", positions={})
        store.close()
        store.close()
    store.open()
    snapshot = store.load()
    assert snapshot is not None
    assert snapshot.state == b"s"
    store.close()


def test_a_newer_schema_is_refused(store_url: str) -> None:
    store = Store(store_url)
    store.open()
    store.close()
    database = Database(store_url)
    database.open()
    with database.write() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0099'"))
    database.close()
    with pytest.raises(
        StoreError, match=r"schema '0099' is newer .* install a newer oodmon"
    ) as found:
        store.open()
    assert not found.value.retryable
    with pytest.raises(StoreError, match="is not open"):
        store.load()


def test_a_failed_upgrade_leaves_no_table(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(schema, "views", lambda _dialect: {"bad": "SELECT nonsense here FROM"})
        with pytest.raises(StoreError, match=r"incomplete input|syntax error"):
            Store(store_url).open()
    database = Database(store_url)
    database.open()
    with database.read() as connection:
        assert inspect(connection).get_table_names() == []
    database.close()
    store = Store(store_url)
    store.open()
    store.close()


def test_several_open_a_new_database_at_once(store_url: str) -> None:
    failures: list[BaseException] = []

    def open_and_close() -> None:
        try:
            store = Store(store_url)
            store.open()
            store.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert failures == []


def test_other_applications_tables_are_left_alone(store_url: str) -> None:
    database = Database(store_url)
    database.open()
    with database.write() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('theirs')"))
    store = Store(store_url)
    store.open()
    store.close()
    with database.read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == (
            "theirs"
        )
    database.close()


def test_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "100%.db"
    store = Store(f"sqlite:///{path}")
    store.open()
    store.append([], state=b"", positions={})
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes) == {"100%.db", "100%.db-wal", "100%.db-shm"}
    assert set(modes.values()) == {0o600}
    store.close()


def test_sqlite_is_durable_and_concurrent(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    database.open()
    with database.read() as connection:
        ask = connection.exec_driver_sql
        assert ask("PRAGMA journal_mode").scalar() == "wal"
        assert ask("PRAGMA synchronous").scalar() == 2  # FULL
        assert ask("PRAGMA busy_timeout").scalar() == 30_000
        assert ask("PRAGMA foreign_keys").scalar() == 1
    database.close()


def test_memory_works_for_tests() -> None:
    store = Store("sqlite://")
    store.open()
    store.append([], state=b"s", positions={"p": "1"})
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(len(store.positions())))
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert seen == [1]
    store.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite:////proc/none/x.db", "No such file or directory"),
        ("mysql://u:geheim@h/db", "neither sqlite nor postgresql"),
        ("nonsense", "cannot be read"),
        ("postgresql://u:geheim@h:port/db", "cannot be read"),
        ("postgresql://u:geheim@127.0.0.1:1/db", "refused"),
        ("postgresql://u@127.0.0.1:1/db?password=geheim&connect_timeout=geheim", "store"),
        ("postgresql://u:geheim@127.0.0.1:1/db?wrong=geheim", "store"),
    ],
)
def test_unusable_urls(url: str, why: str) -> None:
    with pytest.raises(StoreError, match=why) as caught:
        Store(Secret(url)).open()
    assert "geheim" not in "".join(traceback.format_exception(caught.value))
    assert "geheim" not in repr(caught.value)


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and precious\n" * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a database"):
        Store(f"sqlite:///{path}").open()
    assert path.read_bytes() == before


def test_repr_and_errors_hide_the_password() -> None:
    store = Store("postgresql://user:p%40ss@db.example:5432/oodmon?sslpassword=other")
    assert repr(store) == "Store('postgresql://db.example:5432/oodmon', 'default')"
    with pytest.raises(StoreError) as caught:
        store.load()
    assert "p@ss" not in str(caught.value)
    assert "p%40ss" not in str(caught.value)


def test_missing_driver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'oodmon\[postgres\]'"):
        Store("postgresql://h/db").open()


def test_a_schema_of_its_own_in_a_shared_database(postgres_url: str) -> None:
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA ours")
        connection.execute("CREATE TABLE windows (theirs INTEGER)")
    join = "&" if "?" in postgres_url else "?"
    url = f"{postgres_url}{join}options=-csearch_path%3Dours".replace("postgresql:", "postgres:")
    for _ in range(2):
        store = Store(url)
        store.open()
        store.append([], state=b"s", positions={})
        assert store.windows() == []
        store.close()
