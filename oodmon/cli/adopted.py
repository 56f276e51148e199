"""What the daemon goes by is changed whole or not at all: files, and a daemon that takes them."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

__all__ = ["adopted"]

_RELOAD_SECONDS: Final = 60.0


@contextmanager
def adopted(paths: Sequence[Path], host: str, port: int) -> Iterator[None]:
    """Change some files within, then ask the daemon to reload, and say what came of it.

    Where it refuses, or anything fails within, the files are as they were.

    Args:
        paths: all that may be written, made or removed.
        host, port: where the daemon's HTTP server listens, if it runs.
    """
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
        told = _reloaded(host, port)
    except BaseException as error:
        for path in paths:
            if path in before:
                path.write_bytes(before[path])
            else:
                path.unlink(missing_ok=True)
        if isinstance(error, _Refused):
            raise click.ClickException(f"{error.message}; everything is as it was") from None
        raise
    click.echo(told)


class _Refused(click.ClickException):
    """The daemon answered, and not with yes."""


def _reloaded(host: str, port: int) -> str:
    """Ask the daemon of this config to reload: what came of it."""
    where = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104  # to connect to
    connection = http.client.HTTPConnection(where, port, timeout=_RELOAD_SECONDS)
    try:
        connection.request("POST", "/-/reload")
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace").strip()
    except OSError as error:
        return (
            f"no daemon answers at {where}:{port} ({error}); it takes this when it starts or "
            "is sent SIGHUP"
        )
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return "the daemon has reloaded and goes by the new reference"
    raise _Refused(f"the daemon did not take it: {text}")
