"""``oodmon labels``: true classes that became known later, by sample id."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import click

from oodmon.cli.options import config_argument

__all__ = ["labels"]

_AT_ONCE = 5_000
_GREATEST = 2**31 - 1


@click.command()
@config_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def labels(config: str, file: str) -> None:
    """Hand the labels in FILE (CSV: sample_id,label; `-`: standard input) to CONFIG's daemon.

    A label is the number of the true class. A first line `sample_id,label` is passed over. Within a
    minute the daemon holds them against the predictions that it kept (`daemon.labels`). The same
    label twice does no harm; another one for the same sample takes the place of the first.
    """
    from oodmon.cli.opened import opened_store
    from oodmon.config.build import daemon_half
    from oodmon.config.parse import load

    if daemon_half(load(config, "daemon")).labels is None:
        raise click.ClickException(
            f"{config} has no section daemon.labels: its daemon keeps no predictions to hold "
            "labels against"
        )
    given = 0
    with opened_store(config) as store:
        with sys.stdin if file == "-" else Path(file).open(encoding="utf-8", newline="") as lines:
            # All of it is read before any of it is written: a bad line leaves nothing half done.
            found = iter(dict(_read(lines, file)).items())
        while some := dict(islice(found, _AT_ONCE)):
            store.add_labels(some)
            given += len(some)
    click.echo(f"{given} labels handed over")


def _read(lines: Iterable[str], file: str) -> Iterator[tuple[str, int]]:
    for number, row in enumerate(csv.reader(lines), 1):
        if not row or (number == 1 and row == ["sample_id", "label"]):
            continue
        where = f"{file}:{number}"
        if len(row) != 2 or not row[0]:
            raise click.ClickException(f"{where}: expected sample_id,label; found {','.join(row)}")
        try:
            label = int(row[1])
        except ValueError:
            label = -1
        if not 0 <= label <= _GREATEST:
            raise click.ClickException(
                f"{where}: the label is the number of a class, 0 or more; found {row[1]!r}"
            )
        yield row[0], label
