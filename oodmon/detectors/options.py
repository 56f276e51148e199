"""Options of a detector, checked by their types: one message for all of them."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Literal

from oodmon.contracts import Detector
from oodmon.errors import ContractError

__all__ = ["check_options"]


def check_options(
    detector: Detector, may_be_zero: Sequence[str] = (), unchecked: Sequence[str] = ()
) -> None:
    """`ContractError` for a choice that there is not, or a number that is not positive."""
    name = detector.name
    hints = typing.get_type_hints(type(detector))
    for field in dataclasses.fields(detector):  # type: ignore[arg-type]  # all are dataclasses
        value, hint = getattr(detector, field.name), hints[field.name]
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            allowed = ", ".join(repr(choice) for choice in typing.get_args(hint))
            raise ContractError(f"detectors.{name}.{field.name}: {value!r} is none of {allowed}")
        if hint in (int, float) and field.name not in unchecked:
            if field.name in may_be_zero:
                if not 0 <= value < math.inf:
                    raise ContractError(f"detectors.{name}.{field.name}: {value} is negative")
            elif not 0 < value < math.inf:
                raise ContractError(f"detectors.{name}.{field.name}: {value} is not positive")
