"""What breaks public libraries does not break the detectors of features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oodmon.contracts import Reference
from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs, logits, reference, strange

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mahalanobis": ("mahalanobis", {}),
    "relative_mahalanobis": ("relative_mahalanobis", {}),
    "knn": ("knn", {"k": 5}),
    "knn_coreset": ("knn", {"k": 1, "coreset": 30}),
    "nnguide": ("nnguide", {}),
    "residual": ("residual", {}),
    "vim": ("vim", {}),
    "pca": ("pca", {}),
    "she": ("she", {}),
    "cosine": ("cosine", {}),
    "nci": ("nci", {}),
    "fdbd": ("fdbd", {}),
    "gmm": ("gmm", {}),
    "gmm_diagonal": ("gmm", {"covariance": "diagonal"}),
    "gmm_full": ("gmm", {"covariance": "full"}),
    "gmm_steps": ("gmm", {"components": 5, "covariance": "diagonal", "steps": 8}),
}
WIDTH = 16
every = pytest.mark.parametrize("kind", list(KINDS))


def learnt(kind: str, given: Reference) -> Scorer:
    name, options = KINDS[kind]
    return Scorer.learn(detectors.create(name, layer="f", **options), given)


def scores(scorer: Scorer, rows: Tensor) -> Tensor:
    return scorer.score(Activations({"f": rows}, logits(rows)))


def finite(scorer: Scorer) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in scorer.state.values())


@every
@pytest.mark.parametrize("size", [1, 7, 500])
def test_the_size_of_the_reference_batches_does_not_matter(kind: str, size: int) -> None:
    rows, labels = blobs(300, WIDTH)
    whole = learnt(kind, reference(rows, labels, batch_size=300))
    parts = learnt(kind, reference(rows, labels, batch_size=size))
    for name, tensor in whole.state.items():
        torch.testing.assert_close(parts.state[name], tensor, rtol=1e-6, atol=1e-6)


@every
def test_a_value_that_is_not_finite_spoils_its_own_row_alone(kind: str) -> None:
    rows, labels = blobs(300, WIDTH)
    spoilt = rows.clone()
    spoilt[10, 3], spoilt[20, 4] = float("nan"), float("inf")
    scorer = learnt(kind, reference(spoilt, labels))
    assert finite(scorer)
    clean, fresh = scores(scorer, rows[:30]), rows[:30].clone()
    fresh[4, 2] = float("nan")
    found = scorer.score(Activations({"f": fresh}, logits(rows[:30])))
    assert found.isnan().nonzero().flatten().tolist() == [4]
    kept = torch.arange(30) != 4
    torch.testing.assert_close(found[kept], clean[kept])


@every
def test_few_rows_for_many_features(kind: str) -> None:
    rows, labels = blobs(40, 96)
    scorer = learnt(kind, reference(rows, labels))
    assert finite(scorer)
    assert bool(scores(scorer, blobs(50, 96, seed=1)[0]).isfinite().all())


@every
def test_duplicated_and_dead_units(kind: str) -> None:
    rows, labels = blobs(300, WIDTH)
    for part in (rows, fresh := blobs(50, WIDTH, seed=1)[0], other := strange(50, WIDTH, seed=2)):
        part[:, 3], part[:, 5] = part[:, 4], 0.0
    scorer = learnt(kind, reference(rows, labels))
    assert finite(scorer)
    inside, outside = scores(scorer, fresh), scores(scorer, other)
    assert bool(inside.isfinite().all())
    # nci and she rank by direction and size; these samples are strange in place
    assert auroc(inside.numpy(), outside.numpy()) > 0.75


@every
def test_a_class_that_the_reference_lacks(kind: str) -> None:
    rows, labels = blobs(400, WIDTH)
    kept = labels != 2
    scorer = learnt(kind, reference(rows[kept], labels[kept]))
    assert finite(scorer)
    assert bool(scores(scorer, rows).isfinite().all())


@every
def test_one_row_and_none(kind: str) -> None:
    rows, labels = blobs(200, WIDTH)
    scorer = learnt(kind, reference(rows, labels))
    together = scores(scorer, rows[:5])
    for row in range(5):
        torch.testing.assert_close(
            scores(scorer, rows[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-4
        )
    assert scores(scorer, rows[:0]).shape == (0,)


@every
def test_half_precision_scores_as_its_values_do(kind: str) -> None:
    rows, labels = blobs(200, WIDTH)
    half = rows[:20].half()
    given = logits(half.float())
    scorer = learnt(kind, reference(rows, labels))
    found = scorer.score(Activations({"f": half}, given))
    torch.testing.assert_close(found, scorer.score(Activations({"f": half.float()}, given)))


@every
def test_the_unit_of_the_activations_does_not_matter(kind: str) -> None:
    """Learnt and scored at 10,000 times the size, samples come in the same order."""
    rows, labels = blobs(300, WIDTH)
    both = torch.cat([blobs(40, WIDTH, seed=1)[0], strange(40, WIDTH, seed=2)])
    plain = scores(learnt(kind, reference(rows, labels)), both)
    large = reference(rows, labels)
    name, options = KINDS[kind]

    def batches() -> Any:
        for acts in large:
            yield Activations({"f": acts.layer("f") * 1e4}, acts.logits, labels=acts.labels)

    weight, bias = large.head or (torch.zeros(0), torch.zeros(0))
    scaled = type(large).from_batches(batches, head=(weight / 1e4, bias))
    scorer = Scorer.learn(detectors.create(name, layer="f", **options), scaled)
    found = scorer.score(Activations({"f": both * 1e4}, logits(both)))
    assert bool(found.isfinite().all())
    ranks = [torch.argsort(torch.argsort(column)).double() for column in (plain, found)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.99


GROWING = ("knn", "knn_coreset", "nnguide", "gmm_full", "gmm_steps")
"""More rows bring neighbours closer, and let a component of its own covariance be what it is."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GROWING])
def test_a_larger_reference_does_not_move_the_scores(kind: str) -> None:
    """So a threshold survives learning anew."""
    rows, labels = blobs(6000, WIDTH)
    fresh = blobs(1000, WIDTH, seed=1)[0]
    few = scores(learnt(kind, reference(rows[:600], labels[:600])), fresh)
    many = scores(learnt(kind, reference(rows, labels)), fresh)
    assert float((many.median() - few.median()).abs()) < 0.3 * float(many.std())
    assert float(few.std()) == pytest.approx(float(many.std()), rel=0.3)


@every
def test_a_layer_that_was_never_named_is_said(kind: str) -> None:
    name, options = KINDS[kind]
    rows, labels = blobs(50, WIDTH)
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.layer is empty"):
        detectors.create(name, **options).learn(reference(rows, labels))


@every
def test_features_of_another_width_are_said(kind: str) -> None:
    rows, labels = blobs(200, WIDTH)
    scorer = learnt(kind, reference(rows, labels))
    with pytest.raises(ContractError, match="layer 'f': learnt with 16 features, found 15"):
        scorer.score(Activations({"f": rows[:, 1:]}, logits(rows)))
