"""Training that a detector does inside `learn` ends in time, whichever detector it is."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from oodmon.checks.detectors import cases
from oodmon.checks.detectors.samples import reference
from oodmon.contracts import Detector
from oodmon.detectors import Scorer
from oodmon.registry import detectors


def limited() -> list[str]:
    """Detectors that say how long they may train."""
    return [name for name in detectors.names() if hasattr(detectors.get(name), "training_seconds")]


def trained(name: str, **options: object) -> Detector:
    return dataclasses.replace(cases(detectors.get(name))[0], **options)  # type: ignore[type-var]


def test_every_detector_that_trains_long_says_how_long_it_may() -> None:
    networks = {
        name
        for name in detectors.names()
        if detectors.get(name).__module__.startswith("oodmon.")
        and "network" in detectors.get(name).cost
    }
    # a network of three small layers on logits: seconds, whatever the reference
    assert networks - {"introspection"} <= set(limited())
    assert "duq" in limited()


@pytest.mark.parametrize("name", limited())
def test_training_ends_when_its_seconds_are_over(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a clock on which every batch takes a second."""
    clock = itertools.count()
    monkeypatch.setattr("oodmon.detectors.training.monotonic", clock.__next__)
    monkeypatch.setattr("oodmon.detectors.duq.monotonic", clock.__next__)
    detector = trained(name, epochs=50, training_seconds=2.0)
    scorer = Scorer.learn(detector, reference(detector))
    assert next(clock) < 20, "it went on"
    assert all(
        line.startswith(f"{name}: its training_seconds were over") for line in caplog.messages
    )
    assert caplog.messages
    assert all(bool(tensor.isfinite().all()) for tensor in scorer.state.values())


def test_two_trainings_share_the_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("oodmon.detectors.training.monotonic", clock.__next__)
    detector = trained("deep_svdd", epochs=50, pretraining=50, training_seconds=8.0)
    Scorer.learn(detector, reference(detector))
    # each begins with a look at the clock, and then has four seconds
    assert next(clock) == 2 * (1 + 4)
    assert len(caplog.messages) == 2
