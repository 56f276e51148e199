"""The page on the store names every column, and its queries run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import Table

from oodmon.store import retention, tables
from oodmon.store.database import Database
from oodmon.store.events import Store
from tests.unit import store_facts as made

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text()


@pytest.mark.parametrize("table", tables.metadata.sorted_tables, ids=lambda table: table.name)
def test_every_column_is_explained(table: Table) -> None:
    after = PAGE[PAGE.index("## Tables") :]
    section = after[after.index(table.name) :]
    for column in table.columns:
        if column.name != "pipeline":
            assert f"`{column.name}`" in section, f"{table.name}.{column.name}"


def test_every_kind_that_can_be_pruned_is_named() -> None:
    for kind in retention.KINDS:
        assert f"`{kind}`" in PAGE


def test_queries_run(store_url: str) -> None:
    store = Store(store_url)
    store.open()
    store.append(
        [*made.facts(0), made.alert(0, ended=1)],
        state=b"",
        positions={},
        outbox=[("sinks.log", made.event("e"))],
    )
    store.close()
    database = Database(store_url)
    database.open()
    blocks = re.findall(r"```sql ?(\w*)\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 8
    for dialect, query in blocks:
        if dialect in ("", database.dialect):
            with database.read() as connection:
                connection.exec_driver_sql(query).all()
    with database.read() as connection:
        [(rule, _, sample, _)] = connection.exec_driver_sql(blocks[4][1]).all()
    assert (rule, sample) == ("novelty", "sample-0")
    database.close()
