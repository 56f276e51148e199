"""When and where reference samples were seen: what ranks within an hour or a segment need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.contexts import Context
from oodmon.errors import ContractError

__all__ = ["PLACES", "Places", "check", "is_places", "joined", "places"]

Places = Mapping[str, npt.NDArray[Any]]
"""``times`` int64 (B,) ns UTC and ``segments`` str (B,), as far as they are known."""

PLACES: Final = ("times", "segments")
_NEEDED: Final = {"hour": "times", "segment": "segments"}
_SECONDS_END: Final = 10**17
"""Whole numbers below are no nanoseconds of this age: 1973 in ns, the year 5138 in ms."""


def is_places(value: Any) -> bool:
    """Whether this is what a function of the user's says beside inputs and labels."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= set(PLACES)


def places(said: Mapping[str, Any], rows: int, told: str) -> Places:
    """Checked columns of `rows` rows.

    Args:
        said: "times" and "segments", or one of them: datetime64 or whole nanoseconds since the
            epoch, UTC; names, or numbers that become names.
        rows: that there have to be.
        told: what they come with, for errors.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name in PLACES:
        if name in said and said[name] is not None:
            column = np.asarray(said[name])
            if column.shape != (rows,):
                raise ContractError(f"{told}: {rows} samples, but {name} of shape {column.shape}")
            found[name] = _times(column, told) if name == "times" else _segments(column, told)
    return found


def check(found: Places, context: Context, told: str) -> None:
    """`ContractError` names what the data would have to say for the ranks that are asked for."""
    for name in context.of:
        needed = _NEEDED.get(name, "")
        if needed and needed not in found:
            raise ContractError(
                f"daemon.calibration.context is {context}, but the reference ({told}) does not "
                f"say the {needed} of its samples: add an array `{needed}` to the .npz file, or a "
                f"third part {{{needed!r}: …}} beside inputs and labels; image folders have none"
            )


def _times(column: npt.NDArray[Any], told: str) -> npt.NDArray[np.int64]:
    if np.issubdtype(column.dtype, np.datetime64):
        if np.isnat(column).any():
            raise ContractError(f"{told}: times hold NaT")
        return column.astype("datetime64[ns]").astype(np.int64)
    if not np.issubdtype(column.dtype, np.integer):
        raise ContractError(
            f"{told}: times: expected datetime64 or whole nanoseconds since the epoch, found "
            f"{column.dtype}"
        )
    times = column.astype(np.int64)
    if len(times) and int(times.max()) < _SECONDS_END:
        raise ContractError(
            f"{told}: times: {int(times.max())} is no time in nanoseconds since the epoch; seconds "
            "would have to be multiplied by 1,000,000,000"
        )
    return times


def _segments(column: npt.NDArray[Any], told: str) -> npt.NDArray[np.str_]:
    if column.dtype.kind not in "UOiu" or not all(
        isinstance(name, (str, int)) for name in column.tolist()
    ):
        raise ContractError(f"{told}: segments: expected names, found {column.dtype}")
    return np.array([str(name) for name in column.tolist()], np.str_)


def joined(parts: Sequence[tuple[Places, npt.NDArray[np.bool_]]]) -> Places:
    """The chosen rows of all batches, which have to say the same."""
    names = {name for said, _ in parts for name in said}
    for name in sorted(names):
        silent = sum(name not in said and bool(rows.any()) for said, rows in parts)
        if silent:
            raise ContractError(
                f"{silent} of {len(parts)} batches do not say the {name} of their samples, which "
                "the others do"
            )
    return {
        name: np.concatenate([said[name][rows] for said, rows in parts if name in said])
        for name in sorted(names)
    }
