"""Real digits, corrupted: the estimated accuracy, what the alert says of it, and where it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oodmon.calibration import Calibration
from oodmon.detectors import Reference, Scorer
from oodmon.drift.accuracy_loss import AccuracyLoss
from oodmon.drift.budget import Budget
from oodmon.pipeline import Pipeline
from oodmon.records import Activations, Fact, ScoreBatch, Window
from oodmon.registry import detectors
from oodmon.rules import Rule
from oodmon.windows import Windowing
from tests.data import data_path
from tests.streams import EPOCH, SECOND, alerts, plain

ROWS = 100
LEARNT = 5_000


@dataclass(frozen=True, slots=True)
class Digits:
    """A small classifier of MNIST, held-out samples of its kind, and a test set."""

    model: nn.Module
    held: Tensor
    held_labels: Tensor
    images: Tensor
    labels: Tensor

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(images)
        return found

    def accuracy(self, images: Tensor) -> float:
        """Of the first so many test images, in their order."""
        return float((self.logits(images).argmax(1) == self.labels[: len(images)]).double().mean())

    def corrupted(self, how: str) -> Tensor:
        images, draw = self.images, torch.Generator().manual_seed(3)
        if how == "noise":
            return (images + 0.2 * torch.randn(images.shape, generator=draw)).clamp(0.0, 1.0)
        if how == "blur":
            return functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        if how == "inverted":
            return 1.0 - images
        return images


def _images(name: str) -> tuple[Tensor, Tensor]:
    with np.load(data_path(f"{name}.npz")) as file:
        return torch.from_numpy(file["images"]).float()[:, None] / 255, torch.from_numpy(
            file["labels"]
        )


@pytest.fixture(scope="module")
def digits() -> Iterator[Digits]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, labels = _images("mnist_train10k")
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(5):
            for part in torch.split(torch.randperm(LEARNT), 100):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images[part]), labels[part])
                torch.autograd.backward(loss)
                optimizer.step()
        model.eval()
        yield Digits(model, images[LEARNT:], labels[LEARNT:], *_images("mnist_test"))


class Watch:
    """A pipeline over the digits, as fit would have made it."""

    def __init__(self, digits: Digits, kind: str = "calibrated", tolerated_loss: float = 0.03):
        self.digits = digits
        logits, half = digits.logits(digits.held), len(digits.held) // 2
        reference = Reference.from_arrays(logits=logits[:half], labels=digits.held_labels[:half])
        self.scorer = Scorer.learn(detectors.create("expected_error", kind=kind), reference)
        held = self.scorer.score(Activations(logits=logits[half:])).numpy()
        self.calibration = Calibration.from_scores(
            "error", self.scorer.digest, held, measures=self.scorer.detector.measures
        )
        self.tolerated_loss = tolerated_loss

    def pipeline(self) -> Pipeline:
        return Pipeline(
            "digits",
            "1",
            {"error": self.calibration},
            Windowing(10.0, 0.0, 0.0),
            {
                "change": Budget("1 per 10000 windows"),
                "matters": AccuracyLoss("1 per 10000 windows", tolerated_loss=self.tolerated_loss),
            },
            {"changed": Rule("change"), "worse": Rule("matters", severity="critical")},
        )

    def batches(self, *images: Tensor) -> list[ScoreBatch]:
        """100 samples a second of these images, one after the other."""
        logits = self.digits.logits(torch.cat(images))
        scores = self.scorer.score(Activations(logits=logits)).numpy()
        return [
            ScoreBatch(
                "digits",
                "1",
                "agent",
                sequence,
                EPOCH + sequence * SECOND,
                {"error": scores[first : first + ROWS]},
                {"error": self.scorer.digest},
            )
            for sequence, first in enumerate(range(0, len(scores), ROWS))
        ]


def _run(pipeline: Pipeline, batches: Sequence[ScoreBatch]) -> list[Fact]:
    facts = [fact for batch in batches for fact in pipeline.step(batch)]
    return facts + pipeline.advance(batches[-1].observed_at + 60 * SECOND)


def _estimates(facts: Sequence[Fact]) -> npt.NDArray[np.float64]:
    return np.array([f.histogram("error").accuracy for f in facts if isinstance(f, Window)])


@pytest.mark.parametrize("kind", ["calibrated", "threshold"])
@pytest.mark.parametrize(("how", "error"), [("clean", 0.02), ("noise", 0.06), ("blur", 0.04)])
def test_the_estimate_follows_the_accuracy_of_mild_covariate_drift(
    digits: Digits, kind: str, how: str, error: float
) -> None:
    watch, images = Watch(digits, kind), digits.corrupted(how)
    estimates = _estimates(_run(watch.pipeline(), watch.batches(images)))
    assert len(estimates) >= 10
    assert np.nanmean(estimates) == pytest.approx(digits.accuracy(images), abs=error)


def test_the_estimate_is_exact_for_the_window(digits: Digits) -> None:
    watch = Watch(digits)
    batches = watch.batches(digits.images[:2_000])
    estimates = _estimates(_run(watch.pipeline(), batches))
    for place, window in enumerate((batches[:10], batches[10:])):
        wanted = 1.0 - np.concatenate([b.scores["error"] for b in window]).astype(float).mean()
        assert estimates[place] == pytest.approx(wanted, abs=1e-6)


def test_the_estimate_follows_a_mix_of_easier_and_harder_samples(digits: Digits) -> None:
    # covariate drift as the method supposes it: p(label | image) is as it was
    watch = Watch(digits)
    top = digits.logits(digits.images).softmax(1).amax(1)
    hard = top < top.median()
    chosen = digits.images[hard]
    truth = (digits.logits(chosen).argmax(1) == digits.labels[hard]).double().mean()
    assert float(truth) < digits.accuracy(digits.images) - 0.05
    estimate = np.nanmean(_estimates(_run(watch.pipeline(), watch.batches(chosen))))
    assert estimate == pytest.approx(float(truth), abs=0.02)


def test_an_alert_says_that_a_change_matters(digits: Digits) -> None:
    watch = Watch(digits)
    facts = _run(watch.pipeline(), watch.batches(digits.images[:5_000], digits.corrupted("noise")))
    worse = next(alert for alert in alerts(facts) if alert.rule == "worse")
    assert worse.started_at >= EPOCH + 50 * SECOND
    (row,) = worse.evidence["accuracy"]
    assert row["detector"] == "error"
    assert row["before"] > row["now"] + 0.04
    assert row["before"] == pytest.approx(digits.accuracy(digits.images[:5_000]), abs=0.03)
    assert f"fell from {row['before']:.1%} to {row['now']:.1%}" in worse.evidence["summary"]
    assert row["now"] == pytest.approx(digits.accuracy(digits.corrupted("noise")), abs=0.08)
    (stream,) = worse.evidence["streams"]
    assert stream["accuracy_since"] < stream["accuracy_reference"] - 0.05


def test_a_change_that_does_not_matter_is_told_apart(digits: Digits) -> None:
    watch = Watch(digits, tolerated_loss=0.05)
    facts = _run(watch.pipeline(), watch.batches(digits.images, digits.corrupted("blur")))
    assert {alert.rule for alert in alerts(facts)} == {"changed"}


def test_nothing_alarms_while_nothing_changes(digits: Digits) -> None:
    watch = Watch(digits)
    draw = torch.Generator().manual_seed(1)
    order = torch.randint(len(digits.images), (30_000,), generator=draw)
    facts = _run(watch.pipeline(), watch.batches(digits.images[order]))
    assert not [alert for alert in alerts(facts) if alert.rule == "worse"]


def test_sure_and_wrong_is_not_seen(digits: Digits) -> None:
    # What the page says of its limits: an estimate is no measurement.
    watch, images = Watch(digits), digits.corrupted("inverted")
    estimate = np.nanmean(_estimates(_run(watch.pipeline(), watch.batches(images))))
    assert digits.accuracy(images) < 0.1
    assert estimate > 0.6


def test_killed_at_any_moment_the_same_facts_come_out(digits: Digits) -> None:
    watch = Watch(digits)
    batches = watch.batches(digits.images[:2_500], digits.corrupted("noise")[:4_000])
    wanted = [plain(fact) for fact in _run(watch.pipeline(), batches)]
    pipeline = watch.pipeline()
    facts: list[Fact] = []
    for place, batch in enumerate(batches):
        facts += pipeline.step(batch)
        if place % 7 == 3:
            state = pipeline.freeze()
            pipeline = watch.pipeline()
            pipeline.thaw(state)
    facts += pipeline.advance(batches[-1].observed_at + 60 * SECOND)
    assert [plain(fact) for fact in facts] == wanted
    sums = [
        (w.histogram("error").judged, w.histogram("error").errors)
        for w in facts
        if isinstance(w, Window)
    ]
    assert sum(judged for judged, _ in sums) == 6_500
