"""What every drift test has to do, whatever its statistic.

No more false alarms than it states, alarms where something changed, defined on every window, and
the same decisions however the traffic was cut or interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from oodmon.checks import examples_of
from oodmon.checks.drift.promises import (
    check_false_alarms_stay_within_the_promise,
    check_fires_on_a_shift_and_sooner_on_a_larger_one,
    check_says_how_often_it_is_wrong,
    check_streams_together_stay_within_the_promise,
)
from oodmon.checks.drift.restarts import (
    check_combining_keeps_every_stream,
    check_deterministic,
    check_frozen_state_is_plain_and_bounded,
    check_many_streams_at_once_equal_each_by_itself,
    check_replay_equals_live,
    check_split_windows_add_up,
    check_step_leaves_the_old_state_alone,
    check_streams_share_no_state,
)
from oodmon.checks.drift.windows import (
    check_constant_windows_are_defined,
    check_empty_windows_never_drift,
    check_results_are_well_formed,
)
from oodmon.contracts import DriftTest

__all__ = ["CHECKS", "cases"]

Test = DriftTest[Any]


def check_docstring_tells_the_four(test: Test) -> None:
    """The class says what it reads, its statistic, its threshold and where it comes from."""
    text = type(test).__doc__ or ""
    for word in ("Reads", "Statistic", "Threshold", "Reference"):
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{word}  ")]
        assert lines, f"the docstring of {type(test).__name__} has no line `{word}  …`"


CHECKS: Final[tuple[Callable[[Test], None], ...]] = (
    check_docstring_tells_the_four,
    check_says_how_often_it_is_wrong,
    check_results_are_well_formed,
    check_empty_windows_never_drift,
    check_constant_windows_are_defined,
    check_deterministic,
    check_step_leaves_the_old_state_alone,
    check_streams_share_no_state,
    check_split_windows_add_up,
    check_many_streams_at_once_equal_each_by_itself,
    check_replay_equals_live,
    check_frozen_state_is_plain_and_bounded,
    check_combining_keeps_every_stream,
    check_fires_on_a_shift_and_sooner_on_a_larger_one,
    check_false_alarms_stay_within_the_promise,
    check_streams_together_stay_within_the_promise,
)


def cases(cls: type[Test]) -> list[Test]:
    """Instances to check: of each of the class's `examples`, or of its defaults."""
    return [cls(**options) for options in examples_of(cls)]
