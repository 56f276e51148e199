"""``oodmon events``: what could not be delivered, and how it gets another chance."""

from __future__ import annotations

import json

import click

from oodmon.cli.options import config_option, when

__all__ = ["events"]

_PAGE = 1_000


@click.group()
def events() -> None:
    """Look at events that could not be delivered, and revive them."""


@events.command(name="list")
@click.argument("receiver", required=False)
@config_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_dead(receiver: str | None, config: str, limit: int, as_json: bool) -> None:
    """List dead letters, of one RECEIVER (such as sinks.kafka) or of all."""
    from oodmon.cli.opened import opened_store

    with opened_store(config) as store:
        depths = store.depths()
        wanted = [receiver] if receiver else sorted(n for n, depth in depths.items() if depth.dead)
        for name in wanted:
            for row in store.dead(name, limit):
                if as_json:
                    record = {
                        "receiver": name,
                        "seq": row.seq,
                        "id": row.event.id,
                        "type": row.event.type,
                        "attempts": row.attempts,
                        "error": row.error,
                    }
                    click.echo(json.dumps(record))
                else:
                    click.echo(
                        f"{name} {row.seq} {when(row.event.time)} {row.event.type} {row.event.id} "
                        f"after {row.attempts} attempts: {row.error}"
                    )
        if not wanted and not as_json:
            click.echo("no dead letters")


@events.command()
@click.argument("receiver")
@click.argument("seqs", nargs=-1, type=int)
@config_option
@click.option("--all", "everything", is_flag=True, help="All dead letters of the receiver.")
def revive(receiver: str, seqs: tuple[int, ...], config: str, everything: bool) -> None:
    """Make dead letters of RECEIVER pending again: the running daemon sends them."""
    from oodmon.cli.opened import opened_store

    if everything == bool(seqs):
        raise click.UsageError("name the numbers that `oodmon events list` shows, or give --all")
    with opened_store(config) as store:
        revived = 0
        if not everything:
            revived = store.revive(receiver, seqs)
        while everything and (rows := store.dead(receiver, _PAGE)):
            revived += store.revive(receiver, [row.seq for row in rows])
    click.echo(f"{revived} pending again for {receiver}")
