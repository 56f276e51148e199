"""What watching costs the served model: forward passes with the tap and four detectors ÷ without.

Blocks with and without the tap alternate, and each pair of neighbours gives one ratio, so that a
noisy machine disturbs both sides alike. A block is long beside the quarter of a second in which
the agent lets small passes gather, so that scoring falls into the block that caused it. Run as
``python -m benchmarks.overhead``; with a CUDA device the passes run there and are timed to their
end on the device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.models import ResNet18
from oodmon.agent import Agent, Stats
from oodmon.contracts import Reads
from oodmon.detectors import Reference, Scorer
from oodmon.registry import detectors, feeds
from oodmon.taps.collect import collect
from oodmon.taps.hooks import Hooks
from oodmon.taps.identity import identify
from oodmon.taps.layout import head_of

STAGES = ("stage1", "stage2", "stage3", "stage4")

_SETTLE_BLOCKS = 4
"""Blocks before the first that counts, in which the agent finds its sampled fraction."""


def learn(model: nn.Module, device: torch.device, rows: int = 320) -> dict[str, Scorer]:
    """All four, on what the model makes of random images: their cost does not depend on it."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(rows // 32):
        images = torch.randn(32, 3, 32, 32, generator=generator)
        batches.append((images, torch.randint(0, 10, (32,), generator=generator)))

    weights = identify(model)

    def learnt(name: str, tapped: tuple[str, ...], **options: Any) -> Scorer:
        acts = list(collect(model, Hooks(), Reads(layers=tapped, logits=True), batches))
        reference = Reference.from_batches(lambda: iter(acts), head=head_of(model), device=device)
        return Scorer.learn(detectors.create(name, **options), reference, weights=weights)

    return {
        "msp": learnt("msp", ()),
        "gram": learnt("gram", STAGES, layers=STAGES),
        "duq": learnt("duq", ("penultimate",)),
        "rnd": learnt("rnd", ("penultimate",)),
    }


def timed(model: nn.Module, inputs: Tensor, seconds: float) -> npt.NDArray[np.float64]:
    """Seconds of each pass, for as long as told (at least one pass)."""
    passes: list[float] = []
    with torch.inference_mode():
        end = perf_counter() + seconds
        while not passes or perf_counter() < end:
            begun = perf_counter()
            model(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()
            passes.append(perf_counter() - begun)
    return np.array(passes)


def compare(
    attach: Callable[[], Agent],
    model: nn.Module,
    inputs: Tensor,
    blocks: int,
    seconds: float,
) -> tuple[dict[str, float], Stats]:
    """Ratios of medians and of 99th percentiles; the agent's controller is settled first."""
    agent = attach()
    timed(model, inputs, _SETTLE_BLOCKS * seconds)
    hooks = _Switch(model)
    without: list[npt.NDArray[np.float64]] = []
    tapped: list[npt.NDArray[np.float64]] = []
    for block in range(blocks):
        # Which side comes first alternates too.
        for on in (True, False) if block % 2 else (False, True):
            hooks.turn(on=on)
            (tapped if on else without).append(timed(model, inputs, seconds))
    hooks.turn(on=True)
    agent.detach(30.0)
    stats = agent.stats()
    pairs = [np.median(b) / np.median(a) for a, b in zip(without, tapped, strict=True)]
    plain, watched = np.concatenate(without), np.concatenate(tapped)
    ratios = {
        "p50_ratio": float(np.median(pairs)),
        "p50_ratio_pooled": float(np.median(watched) / np.median(plain)),
        "p99_ratio": float(np.quantile(watched, 0.99) / np.quantile(plain, 0.99)),
        "mean_ratio": float(watched.mean() / plain.mean()),
        "p50_ms": float(np.median(plain) * 1000),
    }
    return ratios, stats


def looks(model: nn.Module, device: torch.device, times: int = 5) -> dict[str, float]:
    """Milliseconds of one thread to tell which weights a model has: this one's, and a gigabyte."""
    torch.set_num_threads(1)  # as in the scoring thread
    large = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device=device) for _ in range(16)))
    found = {}
    for name, each in (("served", model), ("gigabyte", large)):
        spent = []
        for _ in range(times):
            begun = thread_time()
            assert identify(each)
            spent.append(thread_time() - begun)
        found[f"look_ms_{name}"] = float(np.median(spent) * 1000)
    return found


class _Switch:
    """Takes the hooks of a tapped model off for a while: the agent and its thread live on."""

    def __init__(self, model: nn.Module) -> None:
        self._hooks = []
        for module in model.modules():
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                self._hooks.append((getattr(module, name), dict(getattr(module, name))))

    def turn(self, *, on: bool) -> None:
        for place, hooks in self._hooks:
            place.clear()
            if on:
                place.update(hooks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one block")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where CUDA is there")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    torch.manual_seed(0)
    model = ResNet18().eval().to(device)
    scorers = learn(model, device)
    results = []
    for budget in args.budgets:
        for batch in args.batches:
            inputs = torch.randn(batch, 3, 32, 32, device=device)
            with tempfile.TemporaryDirectory() as folder:
                feed = feeds.create("spool", path=folder)

                def attach(budget: float = budget, feed: object = feed) -> Agent:
                    return Agent.attach(
                        model,
                        tap=Hooks(),
                        scorers=scorers,
                        feed=feed,  # type: ignore[arg-type]
                        model_name="resnet18",
                        version="1",
                        overhead_budget=budget,
                    )

                ratios, stats = compare(attach, model, inputs, args.blocks, args.seconds)
            result = {"device": name, "budget": budget, "batch": batch, **ratios}
            result |= {"fraction": stats.fraction, "overhead": stats.overhead}
            result |= {"sampled": stats.sampled, "seen": stats.seen, "dropped": stats.dropped}
            results.append(result)
            if not args.json:
                print(
                    f"{name}  budget {budget:g}  batch {batch:3d}  "
                    f"p50 x{ratios['p50_ratio']:.3f}  p99 x{ratios['p99_ratio']:.3f}  "
                    f"mean x{ratios['mean_ratio']:.3f}  (without: {ratios['p50_ms']:.1f} ms)  "
                    f"fraction {stats.fraction:.4f}  overhead {stats.overhead:.4f}  "
                    f"scored {stats.scored} of {stats.seen}, dropped {stats.dropped}",
                    flush=True,
                )
    spent = looks(model, device)
    if args.json:
        print(json.dumps({"overhead": results, **spent}))
    else:
        print(
            f"{name}  which weights are served: {spent['look_ms_served']:.0f} ms of the scoring "
            f"thread every five minutes; of a gigabyte {spent['look_ms_gigabyte']:.0f} ms"
        )


if __name__ == "__main__":
    main()
