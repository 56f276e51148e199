"""``oodmon events``: what could not be delivered, and how it gets another chance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from oodmon.cli.options import config_argument, when

if TYPE_CHECKING:
    from oodmon.store.events import OutboxRow, Store

__all__ = ["events"]

_PAGE = 1_000

_receiver = click.option(
    "--receiver", "-r", default="", help="One receiver, such as sinks.kafka; else all."
)


@click.group()
def events() -> None:
    """Look at events that could not be delivered, and replay them."""


@events.command()
@config_argument
@_receiver
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="A receiver.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with the event.")
def dead(config: str, receiver: str, limit: int, as_json: bool) -> None:
    """List the dead letters of CONFIG's daemon: who refused what, why, how often and when."""
    from oodmon.cli.opened import opened_store

    with opened_store(config) as store:
        found = [
            (name, row) for name in _receivers(store, receiver) for row in store.dead(name, limit)
        ]
    for name, row in found:
        click.echo(json.dumps(_record(name, row)) if as_json else _line(name, row))
    if not found and not as_json:
        click.echo("no dead letters")


@events.command()
@config_argument
@click.argument("seq", type=int)
def show(config: str, seq: int) -> None:
    """Print dead letter SEQ of CONFIG's daemon as JSON: the whole event, and what became of it."""
    from oodmon.cli.opened import opened_store

    with opened_store(config) as store:
        for name, row in _all(store, ""):
            if row.seq == seq:
                click.echo(json.dumps(_record(name, row), indent=2))
                return
    raise click.ClickException(f"there is no dead letter {seq}; `oodmon events dead` lists them")


@events.command()
@config_argument
@click.argument("seqs", nargs=-1, type=int)
@_receiver
@click.option("--all", "everything", is_flag=True, help="All of the receiver, or of all receivers.")
@click.option("--json", "as_json", is_flag=True, help="Receiver → how many, as one JSON object.")
def replay(
    config: str, seqs: tuple[int, ...], receiver: str, everything: bool, as_json: bool
) -> None:
    """Make dead letters SEQS pending again: the running daemon sends them, under their old ids.

    Exit status 1 where a number is none of a dead letter.
    """
    from oodmon.cli.opened import opened_store

    if everything == bool(seqs):
        raise click.UsageError("name the numbers that `oodmon events dead` shows, or give --all")
    with opened_store(config) as store:
        wanted: dict[str, list[int]] = {}
        missing = set(seqs)
        for name, row in _all(store, receiver):
            if everything or row.seq in missing:
                wanted.setdefault(name, []).append(row.seq)
                missing.discard(row.seq)
        revived = {name: store.revive(name, some) for name, some in wanted.items()}
    if as_json:
        click.echo(json.dumps(revived))
    else:
        for name, count in revived.items():
            click.echo(f"{count} pending again for {name}")
        if not revived:
            click.echo("nothing to replay")
    if missing:
        numbers = ", ".join(str(seq) for seq in sorted(missing))
        raise click.ClickException(f"no dead letter: {numbers}")


def _receivers(store: Store, receiver: str) -> list[str]:
    if receiver:
        return [receiver]
    return sorted(name for name, depth in store.depths().items() if depth.dead)


def _all(store: Store, receiver: str) -> Iterator[tuple[str, OutboxRow]]:
    """Every dead letter, a page at a time: there may be many."""
    for name in _receivers(store, receiver):
        after = 0
        while page := store.dead(name, _PAGE, after):
            yield from ((name, row) for row in page)
            after = page[-1].seq


def _record(receiver: str, row: OutboxRow) -> dict[str, Any]:
    event = row.event
    return {
        "receiver": receiver,
        "seq": row.seq,
        "id": event.id,
        "type": event.type,
        "source": event.source,
        "subject": event.subject,
        "time_ns": event.time,
        "attempts": row.attempts,
        "first_failed_ns": row.first_failed_ns,
        "last_failed_ns": row.last_failed_ns,
        "reason": row.error,
        "data": event.data,
    }


def _line(receiver: str, row: OutboxRow) -> str:
    tries = f"{row.attempts} attempt{'' if row.attempts == 1 else 's'}"
    return (
        f"{receiver} {row.seq} {when(row.event.time)} {row.event.type} {row.event.id}: {tries}, "
        f"first {when(row.first_failed_ns)}, last {when(row.last_failed_ns)}: {row.error}"
    )
