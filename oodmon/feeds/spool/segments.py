"""How a spool looks on disk: guarded folders, segment files, frames that can be found again.

::

    spool/                    0700
        reader.lock           held (flock) by the one reader
        <source>-<token>/     one writer each; the token makes every folder name new
            writer.lock       held (flock) by the writer for as long as it lives
            0000000000.seg    0600, append-only

A segment is a header and frames. Header, 16 bytes: magic, version, CRC-32 of these. Frame: mark,
length, CRC-32 of the payload, CRC-32 of the twelve bytes before it, payload. All little-endian. The
head has a CRC of its own so that a length is only believed when it is sound: a flipped bit then
costs one frame and not the rest of the segment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from oodmon.errors import FeedError

__all__ = [
    "FRAME_HEAD_BYTES",
    "SEGMENT_HEADER",
    "SEGMENT_HEADER_BYTES",
    "Damage",
    "Position",
    "claim_reader",
    "find_head",
    "folder_bytes",
    "frame_head",
    "frame_of",
    "hold",
    "new_folder",
    "read_header",
    "release",
    "remove_folder",
    "secure_folder",
    "segment_numbers",
    "segment_path",
    "writer_folders",
    "writer_gone",
]

_MAGIC: Final = b"OODSPOOL"
_VERSION: Final = 1
_MARK: Final = b"\xf5\xf8OM"  # 0xf5 and 0xf8 never occur in UTF-8, so names cannot look like a mark
_HEADER: Final = struct.Struct("<8sII")
_HEAD: Final = struct.Struct("<4sIII")
_SEGMENT: Final = re.compile(r"([0-9]{10})\.seg")
_WRITER_LOCK: Final = "writer.lock"
_READER_LOCK: Final = "reader.lock"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

FRAME_HEAD_BYTES: Final = _HEAD.size
SEGMENT_HEADER_BYTES: Final = _HEADER.size
SEGMENT_HEADER: Final = _HEADER.pack(
    _MAGIC, _VERSION, zlib.crc32(_MAGIC + _VERSION.to_bytes(4, "little"))
)


# Places ----------------------------------------------------------------------------------------


class Position(NamedTuple):
    """A place in a partition: everything before it has been read."""

    segment: int
    offset: int

    def __str__(self) -> str:
        return f"{self.segment}:{self.offset}"

    @staticmethod
    def parse(text: str) -> Position:
        """The position that this text names, or `FeedError`."""
        found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,18})", text)
        if found is None:
            raise FeedError(f"spool position {text[:64]!r}: expected segment:offset")
        return Position(int(found[1]), int(found[2]))


class Damage:
    """What a reader had to skip.

    Attributes:
        frames, bytes: damaged places within segments, and what was skipped there.
        torn: unfinished frames at the end of what a writer left when it died. Nothing that `put`
            accepted is in them, unless the machine itself lost power.
        last: the latest one, in words.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.bytes = 0
        self.torn = 0
        self.last = ""

    def note(self, where: str, skipped: int) -> None:
        """Count one damaged place."""
        self.frames += 1
        self.bytes += skipped
        self.last = f"{where}: {skipped} bytes skipped"


# Frames ------------------------------------------------------------------------------------------


def frame_of(payload: bytes) -> bytes:
    """The frame that holds this payload."""
    head = _MARK + struct.pack("<II", len(payload), zlib.crc32(payload))
    return b"".join((head, zlib.crc32(head).to_bytes(4, "little"), payload))


def frame_head(buffer: bytes, at: int) -> tuple[int, int] | None:
    """Payload length and CRC of the frame head at this place; none where no sound head is.

    The caller makes sure that `FRAME_HEAD_BYTES` are there.
    """
    mark, length, payload_crc, head_crc = _HEAD.unpack_from(buffer, at)
    if mark != _MARK or zlib.crc32(buffer[at : at + _HEAD.size - 4]) != head_crc:
        return None
    return length, payload_crc


def find_head(buffer: bytes, at: int) -> int:
    """The first sound frame head at or after this place, or -1."""
    while True:
        at = buffer.find(_MARK, at)
        if at < 0 or at + _HEAD.size > len(buffer):
            return -1
        if frame_head(buffer, at) is not None:
            return at
        at += 1


def read_header(data: bytes) -> int:
    """The format version that a segment header names; 0 where the header is damaged."""
    magic, version, crc = _HEADER.unpack(data[: _HEADER.size])
    sound = magic == _MAGIC and zlib.crc32(data[: _HEADER.size - 4]) == crc
    if sound and version > _VERSION:
        raise FeedError(
            f"segment format {version}, this release reads up to {_VERSION}: "
            "a newer release of oodmon wrote it, and one is needed to read it"
        )
    return int(version) if sound else 0


# Folders -----------------------------------------------------------------------------------------


def secure_folder(root: Path) -> None:
    """Make the spool folder, or make sure that nobody else can write into it.

    Raises:
        FeedError: it cannot be made, belongs to somebody else, or others may write to it.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
    except OSError as error:
        raise FeedError(f"spool folder {root}: {error.strerror or error}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise FeedError(f"spool folder {root}: not a folder")
    mode = stat.S_IMODE(found.st_mode)
    if mode & _OTHERS_WRITE:
        raise FeedError(
            f"spool folder {root}: expected mode 0700, found {mode:04o}, so other users may write "
            "to it and forge scores; chmod go-w it or name another folder"
        )
    if found.st_uid not in (os.geteuid(), 0):
        raise FeedError(
            f"spool folder {root}: expected owner {os.geteuid()}, found {found.st_uid}; agent and "
            "daemon have to run as one user"
        )


def new_folder(root: Path, source: str) -> tuple[Path, int]:
    """A writer's own folder and the descriptor that holds its lock.

    The folder gets its final name only when the lock is held, so a reader never takes a starting
    writer for a dead one. The token keeps positions of an earlier folder from being applied here.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", source).lstrip(".")[:80] or "agent"
    for _ in range(100):
        token = secrets.token_hex(4)
        hidden, final = root / f".new-{token}", root / f"{name}-{token}"
        try:
            hidden.mkdir(mode=0o700)
        except FileExistsError:
            continue
        lock = hold(hidden / _WRITER_LOCK)
        hidden.rename(final)
        return final, lock
    raise FeedError(f"spool folder {root}: no free name for {source!r}")


def writer_folders(root: Path) -> list[str]:
    """Names of the writers' folders, sorted."""
    with os.scandir(root) as entries:
        return sorted(
            e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."
        )


def folder_bytes(root: Path) -> int:
    """Size of all segments of all writers."""
    total = 0
    for name in writer_folders(root):
        # A reader may be removing what it has settled.
        with contextlib.suppress(FileNotFoundError), os.scandir(root / name) as entries:
            for entry in entries:
                if _SEGMENT.fullmatch(entry.name):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def segment_path(folder: Path, number: int) -> Path:
    """The file of one segment."""
    return folder / f"{number:010d}.seg"


def segment_numbers(folder: Path) -> list[int]:
    """The segments that are there, ascending; none where the folder is gone."""
    try:
        found = [_SEGMENT.fullmatch(name) for name in os.listdir(folder)]  # noqa: PTH208 hot path
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in found if match)


# Locks: flock belongs to the open file, so a dead process can hold none, and forked children that
# only inherited the descriptor do not free it by closing theirs. ---------------------------------


def hold(path: Path) -> int:
    """Create the file and lock it; `BlockingIOError` where somebody else holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def release(descriptor: int) -> None:
    """Unlock and close, even if a process that is just being started still shares the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def claim_reader(root: Path) -> int:
    """Become the one reader; `FeedError` says who is."""
    path = root / _READER_LOCK
    try:
        descriptor = hold(path)
    except BlockingIOError:
        who = path.read_text(errors="replace")[:200].strip() or "another process"
        raise FeedError(f"spool folder {root} is already read by {who}") from None
    except OSError as error:
        raise FeedError(f"{path}: {error.strerror or error}") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def writer_gone(folder: Path) -> bool:
    """Whether the writer of this folder has ended, in whatever way."""
    try:
        release(hold(folder / _WRITER_LOCK))
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def remove_folder(folder: Path) -> bool:
    """Delete the folder of a writer that is gone; False, and nothing deleted, while it lives."""
    try:
        lock = hold(folder / _WRITER_LOCK)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        release(lock)
    return not folder.exists()
