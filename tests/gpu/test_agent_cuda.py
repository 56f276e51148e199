"""The CUDA path on a real device: no host synchronisation, bounded memory, the CPU's scores."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon.agent import Limits
from oodmon.agent.lanes import CudaLane
from oodmon.contracts import Reads
from oodmon.detectors import Reference, Scorer
from oodmon.registry import detectors
from oodmon.taps.collect import collect
from oodmon.taps.hooks import Hooks
from oodmon.taps.identity import identify
from oodmon.taps.layout import head_of
from tests.agents import Norm, Recording, attach
from tests.nets import build, images
from tests.waiting import eventually

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

QUICK = Limits(linger_seconds=0.0)
PATIENT = Limits(linger_seconds=0.0, queue_passes=100_000, queue_bytes=1 << 30)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device in this thread raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_device(rows: int = 8, seed: int = 0) -> Tensor:
    return images(rows, seed).cuda()


def scorers_on_cpu() -> dict[str, Scorer]:
    """The real detectors, learnt on the CPU from the model's own activations."""
    model = build("resnet")
    stages = ("stage1", "stage2")
    reads = Reads(layers=(*stages, "penultimate"), logits=True)
    labels = torch.arange(32) % 5
    acts = list(collect(model, Hooks(), reads, [(images(32, n), labels) for n in range(6)]))
    made = {
        "msp": detectors.create("msp"),
        "energy": detectors.create("energy"),
        "gram": detectors.create("gram", layers=stages),
        "rnd": detectors.create("rnd", layer="penultimate", epochs=1),
        "duq": detectors.create("duq", layer="penultimate", epochs=1),
    }
    head = head_of(model)
    return {
        name: Scorer.learn(detector, Reference.from_batches(lambda: iter(acts), head=head))
        for name, detector in made.items()
    }


def test_the_hooks_never_wait_for_the_device() -> None:
    # The mode is the whole process's, so the scoring thread (which does wait, for its own stream's
    # event) must not be at work meanwhile: it is held back until the passes are through.
    model, feed = build("resnet").cuda(), Recording()
    warm = on_device()
    limits = Limits(linger_seconds=30.0, queue_passes=1000, batch_rows=100_000)
    layers = ("stage1", "stage4", "penultimate")
    scorers = {name: Norm(layers=(name,)) for name in layers}
    with attach(model, feed, scorers, limits) as agent:
        with torch.inference_mode():
            model(warm)
            torch.cuda.synchronize()
            with no_synchronisation():
                for _ in range(20):
                    model(warm)
        assert len(agent._gate.open().queue) == 21, "the scoring thread was at work already"
        assert agent.stats().failures == 0
    assert feed.rows == 21 * 8
    assert all(np.isfinite(batch.scores["stage1"]).all() for batch in feed.batches)


def test_scorers_queue_their_work_without_waiting() -> None:
    model = build("resnet").cuda()
    reads = Reads(layers=("stage1", "stage2", "penultimate"), logits=True)
    (acts,) = collect(model, Hooks(), reads, [(on_device(), None)])
    for name, scorer in scorers_on_cpu().items():
        there = scorer.to("cuda")
        there.score(acts)
        torch.cuda.synchronize()
        with no_synchronisation():
            scores = there.score(acts)
        assert scores.is_cuda, name


def test_scores_are_the_cpus() -> None:
    scorers = scorers_on_cpu()
    found: dict[str, dict[str, np.ndarray]] = {}
    for device in ("cpu", "cuda"):
        model, feed = build("resnet").to(device), Recording()
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with attach(model, feed, scorers, PATIENT) as agent, torch.inference_mode():  # type: ignore[arg-type]
                for n in range(5):
                    model(images(8, n).to(device))
                    eventually(lambda n=n, a=agent: a.stats().scored == 8 * (n + 1))  # type: ignore[misc]
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        found[device] = {
            name: np.concatenate([batch.scores[name] for batch in feed.batches]) for name in scorers
        }
    for name in scorers:
        np.testing.assert_allclose(
            found["cuda"][name], found["cpu"][name], rtol=2e-3, atol=2e-4, err_msg=name
        )


def test_values_written_over_right_after_the_pass_are_still_scored_as_they_were() -> None:
    model, feed = build("mlp").cuda(), Recording()
    inputs = on_device(64)
    with torch.inference_mode():
        expected = model[:-1](inputs).square().sum(dim=1).cpu().numpy()  # type: ignore[index]
    with attach(model, feed, limits=PATIENT), torch.inference_mode():
        for _ in range(50):
            output = model(inputs)
            output.fill_(float("nan"))
            del output
            # Takes the very blocks that a tap without record_stream would have given back.
            torch.full((64, 16), float("nan"), device="cuda")
    for batch in feed.batches:
        scores = batch.scores["norm"]
        np.testing.assert_allclose(
            scores, np.tile(expected, len(scores) // len(expected)), rtol=1e-3
        )


def test_serving_on_a_stream_of_its_own_is_waited_for() -> None:
    model, feed = build("mlp").cuda(), Recording()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    inputs = on_device()
    torch.cuda.synchronize()
    with attach(model, feed, limits=PATIENT), torch.inference_mode(), torch.cuda.stream(stream):
        # The pass's kernels are still queued when it "ends".
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        model(inputs)
    with torch.inference_mode():
        expected = model[:-1](inputs).square().sum(dim=1).cpu().numpy()  # type: ignore[index]
    np.testing.assert_allclose(feed.batches[0].scores["norm"], expected, rtol=1e-3)


def test_memory_is_bounded_over_a_thousand_batches() -> None:
    model, feed = build("resnet").cuda(), Recording()
    scorers = {"norm": Norm(layers=("stage1",)), "last": Norm()}
    with attach(model, feed, scorers, QUICK) as agent, torch.inference_mode():
        levels = []
        for n in range(1_000):
            model(on_device(16, n % 7))
            if n % 100 == 99:
                eventually(lambda a=agent: len(a._gate.open().queue) == 0)  # type: ignore[misc]
                torch.cuda.synchronize()
                gc.collect()
                levels.append(torch.cuda.memory_allocated())
    assert feed.rows + agent.stats().dropped == 16_000
    # The last group may still be in hand when one looks; what must not be is growth.
    slack = 8 * 16 * 4 * 16 * 16 * 4
    assert levels[-1] <= levels[1] + slack, levels


def test_the_sampler_sees_device_time() -> None:
    model, feed = build("resnet").cuda(), Recording()
    with attach(model, feed, limits=PATIENT) as agent, torch.inference_mode():
        for n in range(20):
            model(on_device(64, n))
    stats = agent.stats()
    assert stats.serving_seconds > 0
    assert stats.scoring_seconds > 0


def test_a_pass_that_is_captured_into_a_graph_is_passed_by() -> None:
    model, feed = build("mlp").cuda(), Recording()
    still = on_device()
    with attach(model, feed, limits=PATIENT), torch.inference_mode():
        for _ in range(3):
            model(still)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(still)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.isfinite(output).all()
    assert feed.rows == 24, "only the three passes before the capture are read"


def test_a_model_that_moves_takes_its_scorers_along() -> None:
    model, feed = build("mlp"), Recording()
    with attach(model, feed, limits=PATIENT) as agent, torch.inference_mode():
        model(images(4))
        eventually(lambda: agent.stats().scored == 4)
        model.cuda()
        model(on_device(4))
    assert feed.rows == 8
    np.testing.assert_allclose(
        feed.batches[0].scores["norm"], feed.batches[1].scores["norm"], rtol=1e-3
    )
    assert isinstance(agent._gate.open().scoring._lane, CudaLane)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_same_on_every_device(dtype: torch.dtype) -> None:
    model = build("resnet").to(dtype)
    # large enough to be read in slices
    model.register_buffer("table", torch.randn(5_000_000).to(dtype))
    on_cpu = identify(model)
    assert on_cpu
    assert identify(model.cuda()) == on_cpu


def test_weights_are_compared_beside_a_model_on_the_device() -> None:
    model, feed = build("resnet").cuda(), Recording()
    known = Scorer(detectors.create("msp"), {}, "net", "1", identify(model.cpu()))
    with attach(model.cuda(), feed, {"msp": known}, QUICK) as agent, torch.no_grad():  # type: ignore[dict-item]
        model(on_device())
        eventually(lambda: agent.stats().scored == 8)
        model.fc.weight.mul_(1.1)  # type: ignore[operator, union-attr]
    with attach(model, feed, {"msp": known}, QUICK) as agent, torch.no_grad():  # type: ignore[dict-item]
        model(on_device())
        eventually(lambda: agent.stats().scored == 8)
    first, second = feed.batches
    assert (first.digests["msp"], first.notices) == (known.digest, ())
    assert second.digests["msp"] != known.digest
    assert "their scores are not counted" in second.notices[0]
