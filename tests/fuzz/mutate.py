"""Bytes → other bytes: seeded, so that any input can be made again from its number."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Final

__all__ = ["Mutator"]

_NUMBERS: Final = (
    b"0", b"-1", b"1", b"255", b"2147483647", b"4294967296", b"9223372036854775807",
    b"18446744073709551616", b"1e999", b"-1e-999", b"NaN", b"Infinity", b"0.1", b"9" * 400,
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b"[[[[]]]]",
)  # fmt: skip
_LENGTHS: Final = (
    b"\0" * 8, b"\xff" * 8, b"\0\0\0\0\0\0\0\x80", b"\x01\0\0\0",
    b"\xff\xff\xff\x7f", b"\0\0\0\x80",
)  # fmt: skip
_DIGITS: Final = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?")
_NESTS: Final = (b"[", b"{", b'{"a":', b"- ", b"? ", b"&a [*a", b"(", b"!!python/object:os.system ")


class Mutator:
    """Makes inputs out of examples.

    Args:
        seeds: sound inputs, and hostile ones that are known.
        words: pieces of the format.
        seed: of the choices.
    """

    def __init__(self, seeds: Sequence[bytes], words: Sequence[bytes], seed: int) -> None:
        self._seeds = list(seeds)
        self._words = list(words)
        self._random = random.Random(seed)

    def next(self) -> bytes:
        """The next input."""
        chance = self._random
        if chance.random() < 0.005:
            return chance.randbytes(chance.randrange(200))
        data = bytearray(chance.choice(self._seeds))
        for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5, 9))):
            self._change(data)
        return bytes(data)

    def _change(self, data: bytearray) -> None:
        chance = self._random
        at = chance.randrange(len(data) + 1)
        what = chance.randrange(12)
        if what == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif what == 2:
            del data[at : at + chance.choice((1, 1, 2, 4, 16, 64))]
        elif what == 3:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))
        elif what == 4:
            del data[at:]
        elif what == 5:
            begin = chance.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + chance.choice((1, 4, 16, 64))]
        elif what == 6:
            length = chance.choice(_LENGTHS)
            at = chance.choice((0, at))
            data[at : at + len(length)] = length
        elif what in (7, 8):
            self._number(data)
        elif what == 9 and self._words:
            word = chance.choice(self._words)
            data[at : at + chance.choice((0, len(word)))] = word
        elif what == 10:
            other = chance.choice(self._seeds)
            begin = chance.randrange(len(other) + 1)
            data[at:] = other[begin:]
        else:
            data[at:at] = chance.choice(_NESTS) * chance.choice((1, 3, 30, 300))

    def _number(self, data: bytearray) -> None:
        found = [match.span() for match in _DIGITS.finditer(data)]
        if found:
            first, last = self._random.choice(found)
            data[first:last] = self._random.choice(_NUMBERS)
