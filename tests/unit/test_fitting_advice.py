"""Advice: real figures of real digits, who cannot see what, who is left out, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from torch import Tensor, nn  # noqa: E402

from oodmon.contracts import Detector  # noqa: E402
from oodmon.detectors import Scorer  # noqa: E402
from oodmon.errors import ContractError  # noqa: E402
from oodmon.evaluate import auroc  # noqa: E402
from oodmon.fitting import advice as module  # noqa: E402
from oodmon.fitting import fit, trial  # noqa: E402
from oodmon.fitting.advice import Advice, advise, catalogue  # noqa: E402
from oodmon.fitting.corruptions import corruptions_for  # noqa: E402
from oodmon.fitting.sampled import sampled, sized  # noqa: E402
from oodmon.fitting.sources import Batch, Source, from_data  # noqa: E402
from oodmon.fitting.withheld import UNSEEN  # noqa: E402
from oodmon.records import Activations  # noqa: E402
from oodmon.registry import detectors, taps  # noqa: E402

CLASSES = 8


class Net(nn.Module):
    """Stages that a tap finds by itself; with `blind` it sees an image's mean alone."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind
        self.stage1 = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(16 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.blind:
            # sums of few bits: exact whatever their order
            x = (x * 16).round().sum(dim=(2, 3), keepdim=True).div(1024).expand(x.shape)
        found: Tensor = self.fc(self.stage2(self.stage1(x)))
        return found


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = datasets.load_digits()
    known = data.target < CLASSES
    images = torch.from_numpy((data.images[known] / 16).astype("float32"))[:, None]
    return images, torch.from_numpy(data.target[known]).long()


@pytest.fixture(scope="module")
def model(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    made, (images, labels) = Net(), digits
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(500).split(50):
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(made(images[rows]), labels[rows]))
            optimiser.step()
    return made.eval()


def data(digits: tuple[Tensor, Tensor], labelled: bool = True) -> Source:
    images, labels = digits
    return from_data((images[500:], labels[500:] if labelled else None), batch_size=128, seed=0)


def candidates(*names: str) -> dict[str, Detector]:
    return {name: detectors.create(name) for name in names}


def run(model: nn.Module, source: Source, *names: str, **options: Any) -> Advice:
    return advise(model, source, tap=taps.create("hooks"), candidates=candidates(*names), **options)


@pytest.fixture(scope="module")
def found(model: nn.Module, digits: tuple[Tensor, Tensor]) -> Advice:
    return run(model, data(digits), "msp", "max_logit", "energy", "mahalanobis", "gram")


def test_every_figure_is_there_and_sees_something(found: Advice) -> None:
    changes = ("noise", "blur", "dark", "inverted", "turned", "patches", UNSEEN)
    assert found.changes == changes
    assert (found.held, found.learnt) == (487, 456)
    for verdict in found.verdicts.values():
        assert set(verdict.auroc) == set(changes)
        assert verdict.mean == pytest.approx(np.mean(list(verdict.auroc.values())))
        assert 0.0 < verdict.microseconds < 1e5
        assert verdict.mean > 0.6
    assert found.verdicts["gram"].auroc["inverted"] > 0.95
    means = [verdict.mean for verdict in found.verdicts.values()]
    assert means == sorted(means, reverse=True)
    assert found.verdicts["gram"].microseconds > found.verdicts["max_logit"].microseconds
    assert not found.skipped


def test_a_figure_is_the_auroc_of_a_scorer_made_by_hand(
    model: nn.Module, digits: tuple[Tensor, Tensor], found: Advice
) -> None:
    _, held = sampled(data(digits), 2000, 512, learn_share=0.5, seed=0)
    held = sized(held, 256)
    inverted = corruptions_for(held, 0)["inverted"]
    scorer = Scorer(detectors.create("energy"), {})

    def scores(batches: list[Batch]) -> Any:
        with torch.no_grad():
            logits = torch.cat([model(batch.arguments[0]) for batch in batches])
        return scorer.score(Activations(logits=logits)).numpy()

    expected = auroc(scores(held), scores([inverted(batch) for batch in held]))
    assert found.verdicts["energy"].auroc["inverted"] == pytest.approx(expected, abs=1e-6)
    images = torch.cat([batch.arguments[0] for batch in held])
    assert torch.allclose(inverted(held[0]).arguments[0], images.amax() - held[0].arguments[0])


def test_what_a_model_does_not_see_is_one_half(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    source = data(digits)
    blind = run(Net(blind=True).eval(), source, "energy", "mahalanobis", classes=0)
    for verdict in blind.verdicts.values():
        assert verdict.auroc["patches"] == pytest.approx(0.5, abs=1e-3)
        assert verdict.auroc["turned"] == pytest.approx(0.5, abs=1e-3)
        assert abs(verdict.auroc["inverted"] - 0.5) > 0.2


def test_twins_are_told_and_one_of_them_is_proposed(found: Advice) -> None:
    assert found.correlation["max_logit"]["energy"] > 0.95
    assert found.verdicts["max_logit"].like == "energy"
    assert found.correlation["energy"]["energy"] == 1.0
    assert not {"max_logit", "energy"} <= set(found.proposed)
    assert found.proposed
    assert 0.6 < found.coverage <= 1.0


def test_the_budget_holds(model: nn.Module, digits: tuple[Tensor, Tensor], found: Advice) -> None:
    spent = sum(found.verdicts[name].microseconds for name in found.proposed)
    assert spent <= found.budget_microseconds
    assert found.budget_microseconds == found.model_microseconds
    nothing = run(model, data(digits), "msp", "energy", classes=0, budget=1e-9)
    assert nothing.proposed == ()
    assert nothing.coverage == 0.5


def test_an_unseen_class_is_unknown_to_detector_and_head(
    model: nn.Module, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[tuple[set[int], int, int]] = []
    plain = Scorer.learn.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Scorer], detector: Detector, reference: Any, *more: str) -> Scorer:
        labels = {int(label) for acts in reference for label in acts.labels}
        widths = {acts.logits.shape[1] for acts in reference}
        learnt.append((labels, widths.pop(), len(reference.head[0])))
        made: Scorer = plain(cls, detector, reference, *more)
        return made

    monkeypatch.setattr(Scorer, "learn", classmethod(watched))
    run(model, data(digits), "mahalanobis", classes=2)
    everything, *without = learnt
    assert everything == (set(range(8)), 8, 8)
    assert without == [(set(range(7)), 7, 7)] * 2


def test_without_labels_no_class_is_withheld_and_who_needs_them_is_skipped(
    model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    unlabelled = run(model, data(digits, labelled=False), "msp", "mahalanobis")
    assert UNSEEN not in unlabelled.changes
    assert set(unlabelled.verdicts) == {"msp"}
    assert "labels" in unlabelled.skipped["mahalanobis"]
    with pytest.raises(ContractError, match="no detector can be tried: mahalanobis"):
        run(model, data(digits, labelled=False), "mahalanobis")


def test_scorers_of_fit_are_judged_on_samples_that_they_have_not_learnt_from(
    model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    source = data(digits)
    fitting = fit(
        model,
        source,
        tap=taps.create("hooks"),
        detectors=candidates("energy", "gram"),
        model_name="m",
        version="1",
        learn_share=0.4,
        seed=3,
    )
    learnt = {name: fitted.scorer for name, fitted in fitting.detectors.items()}
    told = run(model, source, learnt=learnt, learn_share=0.4, seed=3, held_samples=5000)
    assert told.held == fitting.calibrated
    assert told.learnt == 0
    assert set(told.verdicts) == {"energy", "gram"}
    _, held = sampled(source, 0, 5000, learn_share=0.4, seed=3)
    with torch.no_grad():
        logits = torch.cat([model(batch.arguments[0]) for batch in held])
    scores = learnt["energy"].score(Activations(logits=logits)).sort().values.numpy()
    assert scores == pytest.approx(fitting.detectors["energy"].calibration.scores, abs=1e-5)


def test_the_model_is_left_as_it_was_and_may_refuse_a_corruption(
    digits: tuple[Tensor, Tensor],
) -> None:
    class Fussy(Net):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.amax()) < 0.5:
                raise ValueError("an image is too dark")
            return super().forward(x)

    torch.manual_seed(0)
    fussy = Fussy().train()
    before = {name: value.clone() for name, value in fussy.state_dict().items()}
    told = run(fussy, data(digits), "msp", classes=0)
    assert fussy.training
    assert not fussy.fc._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in fussy.state_dict().items())
    assert "too dark" in told.skipped["dark"]
    assert "dark" not in told.changes
    assert "inverted" in told.changes


def test_a_slow_model_is_corrupted_on_fewer_samples(
    model: nn.Module, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(batches: Any, seed: int) -> Any:
        def count(batch: Batch) -> Batch:
            seen.append(batch.rows)
            return batch

        return {"nothing": count}

    monkeypatch.setattr(trial, "corruptions_for", watched)
    same = run(model, data(digits), "energy", classes=0, seconds=1e-9)
    assert seen == [32]
    assert abs(same.verdicts["energy"].auroc["nothing"] - 0.5) < 0.15


def test_json_is_plain_and_has_no_nan(model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    import json

    images, labels = digits
    small = from_data((images[:60], labels[:60]), batch_size=60, seed=0)
    told = run(model, small, "msp", "rnd", classes=1, held_samples=20)
    text = json.dumps(told.as_json(), allow_nan=False)
    assert json.loads(text)["detectors"]["rnd"]["type"] == "rnd"
    assert set(told.as_json()["correlation"]) == {"msp", "rnd"}


def test_too_few_samples_are_told(model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    with pytest.raises(ContractError, match="at least 8"):
        run(model, from_data((images[:12], labels[:12]), batch_size=4, seed=0), "msp")


def test_the_catalogue_is_quick_and_says_who_is_not() -> None:
    quick, others = catalogue()
    assert {"msp", "vim", "gram"} <= set(quick)
    assert not set(quick) & set(others)
    assert set(quick) | set(others) == set(detectors.names())
    assert "network" in others["deep_svdd"]
    assert "again" in others["mc_dropout"]
    assert not any(detector.reads().model for detector in quick.values())


def test_samples_are_drawn_evenly_from_data_in_order() -> None:
    rows = torch.arange(4000.0)[:, None]

    def batches() -> Iterator[Batch]:
        return (Batch((rows[at : at + 100],), {}, None) for at in range(0, 4000, 100))

    told: list[int] = []
    learn, held = sampled(
        Source(batches, 0, "in order"), 300, 100, learn_share=0.5, seed=1, progress=told.append
    )
    assert told == list(range(100, 4001, 100))
    first, second = (torch.cat([batch.arguments[0] for batch in part]) for part in (learn, held))
    assert len(first) == 300
    assert len(second) == 100
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())
    for part in (first, second):
        assert abs(float(part.mean()) - 2000) < 350
        assert torch.equal(part.sort(dim=0).values, part)


def test_batches_are_cut_to_size_with_all_that_belongs_to_a_row() -> None:
    batch = Batch((torch.arange(6.0), 7), {"mask": torch.arange(6)}, torch.arange(6))
    three, rest = sized([batch, batch], 8)
    assert three.arguments[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert rest.named["mask"].tolist() == [2, 3, 4, 5]
    assert rest.labels is not None
    assert rest.labels.tolist() == [2, 3, 4, 5]
    assert rest.arguments[1] == 7
    odd = Batch((torch.zeros(2, 3),), {}, None), Batch((torch.zeros(2, 4),), {}, None)
    assert sized(odd, 8) == list(odd)


def test_what_cannot_be_scored_is_nan_and_not_one_half() -> None:
    assert math.isnan(module._auroc(np.zeros(20, np.float32), np.full(20, np.nan, np.float32)))
    assert module._auroc(np.zeros(20, np.float32), np.zeros(20, np.float32)) == 0.5
