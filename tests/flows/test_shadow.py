"""Detectors that need further passes, from the YAML file to the facts, on real images.

A small network with dropout learns eight of scikit-learn's digits; `fit` learns and calibrates one
detector for the tap and three for the shadow worker; the model serves known digits, then the two
that it never saw; the pipeline concludes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import oodmon  # noqa: E402
from oodmon.config import build  # noqa: E402
from oodmon.config.parse import load  # noqa: E402
from oodmon.fitting import fit  # noqa: E402
from oodmon.fitting.sources import from_data  # noqa: E402
from oodmon.records import DriftResult, Exceedance, Fact, Notice, ScoreBatch, Window  # noqa: E402
from tests.waiting import PATIENCE_SECONDS, eventually  # noqa: E402

KNOWN = (0, 1, 2, 3, 5, 7, 8, 9)
ROWS = 8
SHADOWED = {"odin", "mc_dropout", "ensemble"}

CONFIG = """
model: {name: digits, version: "1"}
agent:
  tap: {type: hooks, overhead_budget: 1.0, shadow_budget: 1.0}
  detectors:
    msp: {type: msp}
    odin: {type: odin, choices: [0.0, 0.001]}
    mc_dropout: {type: mc_dropout, passes: 8}
    ensemble: {type: ensemble, weights_folder: members/}
  states: states/
  feed: {type: spool, path: spool/}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  flag_level: 0.01
  windows: {length_seconds: 3600, allowed_lateness_seconds: 10}
  drift:
    budget: {type: budget, false_alarms: 1 per 1000 windows, tolerated_fraction: 0.05}
  rules:
    novelty: {drift: budget, severity: critical}
"""


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels of known digits, and images of novel ones."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = torch.from_numpy((pixels[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    known = np.isin(labels[order], KNOWN)
    names = torch.from_numpy(np.searchsorted(KNOWN, labels[order][known]))
    return images[known], names, images[~known]


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Dropout2d(0.2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, len(KNOWN)),
    )  # fmt: skip
    images, labels, _ = digits()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        adam.zero_grad()
        nn.functional.cross_entropy(model(images[:500]), labels[:500]).backward()  # type: ignore[no-untyped-call]
        adam.step()
    adam.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A folder with a config that was fitted, and the model."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "members").mkdir()
    for seed in (1, 2):
        save_file(trained(seed).state_dict(), folder / "members" / f"{seed}.safetensors")
    path = folder / "oodmon.yaml"
    path.write_text(CONFIG)
    model = trained(0)
    config = load(str(path))
    half = build.agent_half(config)
    images, labels, _ = digits()
    fitting = fit(
        model,
        from_data((images[500:1000], labels[500:1000]), batch_size=100, seed=0),
        tap=half.tap.component.component,
        detectors={name: entity.component for name, entity in half.detectors.items()},
        model_name="digits",
        version="1",
    )
    Path(half.states).mkdir()
    for name, fitted in fitting.detectors.items():
        fitted.scorer.save(build.state_path(half.states, name))
        fitted.calibration.save(build.calibration_path(half.states, name))
    return path, model


def anatomy(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {n: t.clone() for n, t in model.state_dict().items()}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        found[f"hooks of {name}"] = [*module._forward_hooks, *module._forward_pre_hooks]
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(was, other[name]) if isinstance(was, Tensor) else was == other[name]
        for name, was in one.items()
    )


def batches(path: Path) -> list[ScoreBatch]:
    reader = build.daemon_half(load(str(path))).feed.component.reader()
    found = []
    while delivered := reader.poll(1000, 0.0):
        found += [delivery.batch for delivery in delivered]
    reader.settle({delivery.partition: delivery.position for delivery in delivered})
    reader.close()
    return found


def far_enough(agent: oodmon.Agent, samples: int) -> bool:
    """Whether the shadow worker is done with so many."""
    stats = agent.shadow_stats()
    return stats is not None and stats.sampled + stats.dropped >= samples


def test_from_file_to_facts(site: tuple[Path, nn.Module]) -> None:
    path, model = site
    images, _, novel = digits()
    served = [*torch.split(images[1000:], ROWS), *torch.split(novel[:80], ROWS)]
    with torch.inference_mode():
        expected = [model(part) for part in served]
    before, dice = anatomy(model), torch.get_rng_state()

    agent = oodmon.attach(model, str(path))
    try:
        assert any(line.startswith("shadow worker: odin, mc_dropout") for line in agent.found)
        with torch.inference_mode():
            for number, part in enumerate(served):
                assert torch.equal(model(part), expected[number]), "an output changed"
                due = ROWS * number - 40
                eventually(functools.partial(far_enough, agent, due))
    finally:
        assert agent.detach(PATIENCE_SECONDS)
    assert same(anatomy(model), before), "the model is not as it was"
    assert torch.equal(dice, torch.get_rng_state())

    written = batches(path)
    samples = sum(len(part) for part in served)
    for shadowed in (False, True):
        mine = [batch for batch in written if batch.repeats == shadowed]
        names = SHADOWED if shadowed else {"msp"}
        assert all(set(batch.scores) == names for batch in mine)
        columns = [column for batch in mine for column in batch.scores.values()]
        assert all(np.isfinite(column).all() for column in columns)
        lost = sum(batch.dropped for batch in mine)
        assert sum(batch.rows for batch in mine) + lost == samples
    assert not [notice for batch in written for notice in batch.notices]

    pipeline = build.pipeline(load(str(path)))
    facts: list[Fact] = [fact for batch in written for fact in pipeline.step(batch)]
    facts += pipeline.advance(written[-1].observed_at + 10**13)
    assert pipeline.samples == samples, "samples that the shadow repeats were counted again"
    assert not [fact for fact in facts if isinstance(fact, Notice)], "digests fit, nothing is odd"
    windows = [fact for fact in facts if isinstance(fact, Window)]
    assert sum(window.samples for window in windows) == samples
    scored = {name: sum(w.histogram(name).scored for w in windows) for name in {*SHADOWED, "msp"}}
    assert scored["msp"] == samples
    assert {scored[name] for name in SHADOWED} == {
        sum(batch.rows for batch in written if batch.repeats)
    }
    judged = {fact.detector for fact in facts if isinstance(fact, DriftResult)}
    assert judged >= {*SHADOWED, "msp"}
    named = {name for batch in written if not batch.repeats for name in batch.sample_ids}
    flagged = [fact for fact in facts if isinstance(fact, Exceedance)]
    assert {fact.detector for fact in flagged} & SHADOWED
    assert {fact.sample_id for fact in flagged if fact.detector in SHADOWED} <= named


def test_what_was_fitted_on_another_machine_is_found_here(
    site: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    """The state holds the members, so where their files lay no longer matters."""
    path, model = site
    moved = tmp_path / "oodmon.yaml"
    moved.write_text(CONFIG)
    (tmp_path / "states").symlink_to(path.parent / "states")
    oodmon.attach(model, str(moved)).detach()


def test_novel_digits_score_above_known_ones(site: tuple[Path, nn.Module]) -> None:
    from oodmon.evaluate import auroc
    from oodmon.records import Activations
    from oodmon.taps.twin import Twin

    path, model = site
    images, _, novel = digits()
    twin = Twin(model)
    for name, scorer in build.scorers(load(str(path))).items():
        found = []
        for inputs in (images[1000:], novel):
            with torch.no_grad():
                acts = Activations(logits=model(inputs), inputs=inputs, probe=twin)
            found.append(scorer.score(acts).numpy())
        assert auroc(*found) > 0.7, name
