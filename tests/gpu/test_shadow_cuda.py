"""The shadow worker on a real device: the CPU's scores, no wait in the hooks, memory that ends."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

from oodmon.agent import Limits
from oodmon.detectors import Scorer
from oodmon.records import Activations
from oodmon.registry import detectors
from oodmon.taps.twin import Twin
from tests.agents import Norm, Recording, attach
from tests.gpu.test_agent_cuda import no_synchronisation, on_device
from tests.nets import build, images
from tests.waiting import eventually

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPT = Limits(
    linger_seconds=0.0, shadow_duty=1.0, shadow_passes=1000, shadow_age_seconds=3600.0, nice=0
)


def shadow_scorers() -> dict[str, Scorer]:
    return {
        "odin": Scorer(detectors.create("odin"), {}),
        "mc_dropout": Scorer(detectors.create("mc_dropout", passes=4), {}),
    }


def test_thinned_networks_and_slopes_are_the_cpus() -> None:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for name, scorer in shadow_scorers().items():
            found = []
            for device in ("cpu", "cuda"):
                model, inputs = build("vgg").to(device), images(32).to(device)
                with torch.no_grad():
                    acts = Activations(logits=model(inputs), inputs=inputs, probe=Twin(model))
                found.append(scorer.to(device).score(acts).cpu().numpy())
            np.testing.assert_allclose(found[1], found[0], rtol=2e-3, atol=2e-4, err_msg=name)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def test_further_passes_are_queued_without_waiting() -> None:
    model, inputs = build("vgg").cuda(), on_device()
    with torch.no_grad():
        acts = Activations(logits=model(inputs), inputs=inputs, probe=Twin(model))
    for scorer in shadow_scorers().values():
        scorer.score(acts)
        torch.cuda.synchronize()
        with no_synchronisation():
            scorer.score(dataclasses.replace(acts))


def test_the_hooks_never_wait_for_the_device_with_a_shadow_either() -> None:
    model, feed = build("vgg").cuda(), Recording()
    warm = on_device()
    limits = dataclasses.replace(
        PROMPT, linger_seconds=30.0, batch_rows=100_000, shadow_rows=10_000
    )
    scorers = {"norm": Norm(), **shadow_scorers()}
    with attach(model, feed, scorers, limits, shadow_budget=1.0), torch.inference_mode():  # type: ignore[arg-type]
        model(warm)
        torch.cuda.synchronize()
        with no_synchronisation():
            for _ in range(20):
                model(warm)
    assert sum(batch.rows for batch in feed.batches if batch.repeats) == 21 * 8


def test_outputs_stay_and_memory_is_bounded() -> None:
    plain, model, feed = build("vgg").cuda(), build("vgg").cuda(), Recording()
    scorers = {"norm": Norm(), **shadow_scorers()}
    levels = []
    with attach(model, feed, scorers, PROMPT, shadow_budget=1.0) as agent, torch.inference_mode():  # type: ignore[arg-type]
        for n in range(300):
            inputs = on_device(16, n % 7)
            assert torch.equal(model(inputs), plain(inputs))
            if n % 50 == 49:
                eventually(lambda a=agent, due=16 * (n + 1): _done(a) == due)  # type: ignore[misc]
                torch.cuda.synchronize()
                gc.collect()
                levels.append(torch.cuda.memory_allocated())
    assert levels[-1] <= levels[1] + (1 << 20), levels
    shadowed = [batch for batch in feed.batches if batch.repeats]
    assert all(np.isfinite(column).all() for b in shadowed for column in b.scores.values())


def _done(agent: object) -> int:
    stats = agent.shadow_stats()  # type: ignore[attr-defined]
    return 0 if stats is None else int(stats.scored + stats.dropped)
