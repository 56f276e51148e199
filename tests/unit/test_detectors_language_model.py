"""The language model: bits per symbol, pads, unknown symbols, known outliers, and bad ids."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.language_model import LanguageModel, next_logs
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations

SMALL = {"epochs": 8, "embedding": 8, "width": 16, "learning_rate": 2e-2}


def counting(rows: int, seed: int = 0, step: int = 1) -> Tensor:
    """Ids 10 to 14 in turn, from a random one on, with a few mistakes."""
    draw = torch.Generator().manual_seed(seed)
    found = (torch.randint(5, (rows, 1), generator=draw) + step * torch.arange(20)) % 5
    wrong = torch.rand(rows, 20, generator=draw) < 0.05
    return torch.where(wrong, torch.randint(5, (rows, 20), generator=draw), found) + 10


def learnt(text: Tensor | None = None, **options: object) -> Scorer:
    detector = LanguageModel(**{**SMALL, **options})  # type: ignore[arg-type]
    return Scorer.learn(
        detector, Reference.from_arrays(inputs=counting(400) if text is None else text)
    )


def scores(scorer: Scorer, text: Tensor) -> Tensor:
    return scorer.score(Activations(inputs=text))


def test_the_score_is_the_mean_surprise_of_each_symbol() -> None:
    scorer = learnt(epochs=1)
    text = counting(3, seed=1)
    expected = torch.zeros(3)
    for t in range(20):
        # what stands at t and after is hidden, so only the symbols before can be used
        blind = (text - 8).clone()
        blind[:, t:] = 0
        logs = next_logs(blind, scorer.state)[:, t]
        expected -= logs.gather(1, (text[:, t] - 9)[:, None])[:, 0] / 20 / math.log(2)
    torch.testing.assert_close(scores(scorer, text), expected)
    torch.testing.assert_close(next_logs(text - 8, scorer.state).exp().sum(2), torch.ones(3, 20))


def test_text_of_another_order_scores_high() -> None:
    scorer = learnt()
    inside = scores(scorer, counting(100, seed=1))
    assert float(inside.mean()) < 1.0  # log2 of 5 is 2.3
    outside = scores(scorer, counting(100, seed=2, step=2))
    assert auroc(inside.numpy(), outside.numpy()) > 0.99


def test_pads_are_left_out_wherever_they_stand() -> None:
    scorer = learnt(pad=0)
    text = counting(4, seed=3)
    whole = scores(scorer, text)
    front = torch.nn.functional.pad(text, (7, 0))
    spread = torch.zeros(4, 40, dtype=torch.int64)
    spread[:, ::2] = text
    behind = torch.nn.functional.pad(text, (0, 5), value=-1)
    for padded in (front, spread, behind):
        torch.testing.assert_close(scores(scorer, padded), whole)


def test_unknown_symbols_score_high_and_nothing_scores_nan() -> None:
    scorer = learnt(pad=0)
    inside = counting(50, seed=1)
    foreign = inside + 5000
    assert float(scores(scorer, foreign).min()) > float(scores(scorer, inside).max())
    # one is as unknown as another
    assert torch.equal(scores(scorer, foreign), scores(scorer, foreign + 17))
    assert bool(scores(scorer, torch.zeros(2, 9, dtype=torch.int64)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.float16])
def test_ids_of_any_dtype(dtype: torch.dtype) -> None:
    text, fresh = counting(200), counting(5, seed=1)
    whole = learnt(text, epochs=2)
    assert learnt(text.to(dtype), epochs=2).digest == whole.digest
    torch.testing.assert_close(scores(whole, fresh.to(dtype)), scores(whole, fresh))


def test_only_the_most_frequent_symbols_are_known() -> None:
    text = torch.tensor([[5, 5, 5, 9, 9, 7], [9, 5, 9, 5, 9, 3]]).repeat(20, 1)
    assert learnt(text, epochs=1, symbols=2).state["symbols"].tolist() == [5, 9]
    assert learnt(text, epochs=1).state["symbols"].tolist() == [3, 5, 7, 9]


def test_batches_of_different_lengths_and_long_texts() -> None:
    def batches() -> Iterator[Activations]:
        for width in (12, 20, 7):
            yield Activations(inputs=counting(60)[:, :width])

    reference = Reference.from_batches(batches)
    scorer = Scorer.learn(LanguageModel(**{**SMALL, "length": 15}), reference)  # type: ignore[arg-type]
    text = counting(3, seed=1)
    torch.testing.assert_close(scores(scorer, text), scores(scorer, text[:, :15]))


def test_known_outliers_are_made_to_look_flat() -> None:
    text = torch.cat([counting(240), counting(60, seed=5, step=2)])
    labels = torch.cat([torch.zeros(240), -torch.ones(60)]).long()
    detector = LanguageModel(**SMALL, outliers=True, statistic="flatness")  # type: ignore[arg-type]
    told = Scorer.learn(detector, Reference.from_arrays(inputs=text, labels=labels))
    inside = scores(told, counting(100, seed=1))
    outside = scores(told, counting(100, seed=2, step=2))
    assert auroc(inside.numpy(), outside.numpy()) > 0.95
    assert float(inside.max()) <= 0.0


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ContractError, match="holds no symbol"):
        learnt(torch.zeros(5, 4, dtype=torch.int64), pad=0)
    with pytest.raises(ContractError, match=r"ids \(B, T\) as inputs, found \(5,\)"):
        learnt(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ContractError, match="pad: -2 is below -1"):
        LanguageModel(pad=-2)
    with pytest.raises(ContractError, match="'bits', 'flatness'"):
        LanguageModel(statistic="words")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="language_model: the reference has no labels"):
        learnt(outliers=True)
    scorer = learnt(epochs=1)
    with pytest.raises(StateError, match="ids that ascend"):
        Scorer(scorer.detector, {**scorer.state, "symbols": torch.tensor([3, 2, 5, 6, 7])})
    with pytest.raises(StateError, match=r"'output\.bias': expected float32 \(6,\)"):
        Scorer(scorer.detector, {**scorer.state, "output.bias": torch.zeros(5)})
