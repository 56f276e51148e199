"""Advice from reference data alone ranks detectors as novel data does: a published ResNet-20."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from scipy.stats import spearmanr

torch = pytest.importorskip("torch")

from examples import published_networks as networks  # noqa: E402
from oodmon.evaluate import auroc  # noqa: E402
from oodmon.fitting import fit  # noqa: E402
from oodmon.fitting.advice import advise, catalogue  # noqa: E402
from oodmon.fitting.measure import measure  # noqa: E402
from oodmon.fitting.sources import Source, from_data, from_npz  # noqa: E402
from oodmon.registry import taps  # noqa: E402
from tests.data import data_path  # noqa: E402

NOVEL: Final = ("cifar100_test5k", "svhn_train_head1083", "gtsrb_test3k")
DEAR: Final = frozenset(("gram", "malcom", "rankfeat"))
"""Their maps take most of the time, and they are no better a test of the advice."""

ROWS: Final = 400
REFERENCE: Final = 1500
THRESHOLD: Final = 0.75
"""Spearman's; 0.877, 0.920 and 0.872 were measured with the three seeds."""


def part(name: str, rows: slice, seed: int, labelled: bool = False) -> Source:
    """Some rows of a data set in an order of its own."""
    path = data_path(f"{name}.npz")
    (whole,) = from_npz(path, batch_size=100_000, seed=seed, labelled=labelled).batches()
    labels = None if whole.labels is None else whole.labels[rows]
    return from_data((whole.arguments[0][rows], labels), batch_size=250, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_over_corruptions_ranks_detectors_as_novel_data_does(seed: int) -> None:
    weights = data_path("weights") / "cifar10_resnet20_akamaster.safetensors"
    model = networks.load_resnet(weights, 3).eval()
    source = part("cifar10_test", slice(REFERENCE), seed, labelled=True)
    tap = taps.create("hooks")
    tried = {name: one for name, one in catalogue()[0].items() if name not in DEAR}
    advice = advise(
        model, source, tap=tap, candidates=tried, classes=0, held_samples=300, seed=seed
    )
    known = {name: tried[name] for name in advice.verdicts}
    fitted = fit(
        model, source, tap=tap, detectors=known, model_name="m", version="1", seed=seed
    ).detectors
    scorers = {name: one.scorer for name, one in fitted.items()}
    inside = measure(
        model,
        part("cifar10_test", slice(REFERENCE, REFERENCE + ROWS), seed),
        tap=tap,
        scorers=scorers,
    )
    real = np.zeros(len(known))
    for name in NOVEL:
        outside = measure(model, part(name, slice(ROWS), seed), tap=tap, scorers=scorers)
        real += [auroc(inside[one], outside[one]) for one in known]
    said = np.array([advice.verdicts[name].mean for name in known])
    assert len(known) >= 20
    found = float(spearmanr(said, real).statistic)
    assert found > THRESHOLD
    proposed = [list(known).index(name) for name in advice.proposed]
    assert (real / len(NOVEL))[proposed].max() > np.median(real / len(NOVEL))
