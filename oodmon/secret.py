"""A string that is never shown: not in repr, logs, errors or reports."""

from __future__ import annotations

import hmac

__all__ = ["Secret"]


class Secret:
    """Holds a password, token or key; `reveal` is the only way to read it.

    Equality is compared in constant time, so that a comparison cannot leak a prefix.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __repr__(self) -> str:
        return "Secret('****')"

    __str__ = __repr__
