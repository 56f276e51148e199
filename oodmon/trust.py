"""Files that can be believed: written whole, and by nobody but their owner (or root)."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from oodmon.errors import StateError

__all__ = ["check_unshared", "write_private"]

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def check_unshared(path: str | os.PathLike[str]) -> None:
    """Return if no other user may write the file or put another one in its place.

    Raises:
        StateError: who may, and how to put it right. A file that is not there is left to the
            reader to tell.
    """
    file = Path(path)
    try:
        found = file.stat()
        folder = file.absolute().parent.stat()
    except OSError:
        return
    for what, place, status in (("file", file, found), ("folder", file.parent, folder)):
        sticky = what == "folder" and status.st_mode & stat.S_ISVTX
        if status.st_mode & _OTHERS_WRITE and not sticky:
            mode = stat.S_IMODE(status.st_mode)
            raise StateError(
                f"{file}: the {what} {place} has mode {mode:04o}, so other users may write to it "
                "and forge what is learnt; chmod go-w it"
            )
    if found.st_uid not in (os.geteuid(), 0):
        raise StateError(
            f"{file}: expected owner {os.geteuid()} or root, found {found.st_uid}, who may forge "
            "what is learnt; chown it"
        )


def write_private(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all, readable by its owner only; it is on the disk then."""
    target = Path(path)
    # mkstemp makes the file with mode 0600; the rename keeps it.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
