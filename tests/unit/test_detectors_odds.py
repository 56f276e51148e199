"""One softmax per batch: one sample, a batch and the log domain say the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oodmon.detectors.gaps import Answer, Gaps
from oodmon.detectors.odds import Odds, One, answer_of, largest
from oodmon.detectors.odds import answer as answer_for
from oodmon.records import Activations

PARTS: dict[str, Callable[[Answer], Tensor]] = {
    "log_wrong": lambda answer: answer.log_wrong(),
    "log_odds": lambda answer: answer.log_odds(),
    "log_sure": lambda answer: answer.log_sure(),
    "log_partition": lambda answer: answer.log_partition(),
    "entropy": lambda answer: answer.entropy(),
    "mean_other": lambda answer: answer.mean_other(),
}


def logits_of(classes: int, rows: int = 12) -> Tensor:
    """Ties, a near tie, a gap of 40, one beyond float32's smallest number, and a -inf."""
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes)) * 3
    logits[0] = 1.5
    logits[1, :2] = 12.0
    logits[2, 1] = 12.0 + float(logits[2].max())
    logits[3, 0] = 40.0
    logits[4, 1] = 250.0
    logits[5, 0] = -math.inf
    logits[6, 1] = 1e4
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 9, 1000])
@pytest.mark.parametrize("part", PARTS)
def test_all_ways_agree(part: str, classes: int, dtype: torch.dtype) -> None:
    logits = logits_of(classes).to(dtype)
    ask = PARTS[part]
    near = 1e-6 if part in ("log_odds", "log_partition") else 1e-30  # these cross 0
    exact = ask(Gaps(logits.double()))
    whole, small = ask(answer_of(logits)), ask(Gaps(logits))
    alone = torch.cat([ask(answer_of(row[None])) for row in logits])
    for found in (whole, small, alone):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=near)


@pytest.mark.parametrize("classes", [2, 9, 1000])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_likeliest_classes_agree(count: int, classes: int) -> None:
    logits, count = logits_of(classes), min(count, classes)
    exact = logits.double().log_softmax(dim=1)
    whole = exact.sort(dim=1, descending=True).values[:, :count]
    whole[:, 0] = torch.minimum(whole[:, 0], Gaps(logits.double()).log_wrong())
    whole = whole.sort(dim=1).values
    for answer in (answer_of(logits), Gaps(logits)):
        found = answer.log_likeliest(count).sort(dim=1).values.double()
        torch.testing.assert_close(found.clamp(-1e9), whole.clamp(-1e9), rtol=2e-6, atol=1e-6)
    for row, expected in zip(logits, whole, strict=True):
        found = answer_of(row[None]).log_likeliest(count).sort(dim=1).values[0].double()
        torch.testing.assert_close(found.clamp(-1e9), expected.clamp(-1e9), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_stays_in_its_row(part: str, value: float, rows: int) -> None:
    logits = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    plain = PARTS[part](answer_of(logits.clone()))
    logits[0, 2] = value
    found = PARTS[part](answer_of(logits))
    assert bool(found[0].isnan())
    assert torch.equal(found[1:], plain[1:])


def test_no_logit_is_changed_and_no_row_is_needed() -> None:
    logits = logits_of(30)
    before = logits.clone()
    for part in PARTS.values():
        part(answer_of(logits))
        part(answer_of(logits[:1]))
        assert part(answer_of(logits[:0])).shape == (0,)
    answer_of(logits).log_likeliest(4)
    answer_of(logits).log_likeliest(30)
    answer_of(logits[:1]).log_likeliest(30)
    assert torch.equal(logits, before)


def test_other_memory_layouts_give_the_same() -> None:
    wide = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    for view in (wide[:, ::3], wide.T, wide[::2, 5:9]):
        for rows in (view, view[:1]):
            plain = rows.contiguous()
            for name, part in PARTS.items():
                found, expected = part(answer_of(rows)), part(answer_of(plain))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_rows_that_are_sure_beyond_float32_are_computed_again() -> None:
    logits = logits_of(9)
    assert not One(logits[4:5]).whole
    assert isinstance(answer_of(logits[4:5]), Gaps)
    assert isinstance(answer_of(logits[:1]), One)
    assert isinstance(answer_of(logits), Odds)
    sure = answer_of(logits).log_wrong()
    assert float(sure[6]) == pytest.approx(-1e4, rel=1e-2)


@pytest.mark.parametrize("rows", [1, 4, 2000])
def test_the_largest_logit_is_the_same_whoever_asked_before(rows: int) -> None:
    logits = torch.randn(rows, 9, generator=torch.Generator().manual_seed(3)) * 3
    for value in (0.0, math.nan, math.inf, -math.inf, 3e38, -3e38):
        logits[0, 2:4] = value
        plain = logits.amax(dim=1)
        for answer in (answer_of(logits), Gaps(logits)):
            answer.largest().neg_()  # the caller's own
            assert torch.equal(answer.largest().nan_to_num(nan=7.0), plain.nan_to_num(nan=7.0))
        acts = Activations(logits=logits)
        assert torch.equal(largest(acts).nan_to_num(nan=7.0), plain.nan_to_num(nan=7.0))
        answer_for(acts)
        assert torch.equal(largest(acts).nan_to_num(nan=7.0), plain.nan_to_num(nan=7.0))


def test_numbers_as_wide_as_there_are_need_no_warning() -> None:
    """A difference that overflows, and a -inf times nothing: each in a small and a large batch."""
    for rows in (3, 2000):
        logits = torch.zeros(rows, 9)
        logits[0, 0], logits[0, 1] = 3e38, -3e38
        logits[1, 0] = -math.inf
        answer = answer_of(logits)
        for name, part in PARTS.items():
            expected = part(Gaps(logits.double()))
            found = part(answer).double()
            torch.testing.assert_close(found.clamp(min=-1e30), expected.clamp(min=-1e30), msg=name)
