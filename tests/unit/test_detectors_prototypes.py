"""she, cosine, nci and fdbd: features against one vector per class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodmon.detectors import Reference, Scorer
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs, head, logits, reference, strange
from tests.peers import pytorch_ood, rank_agreement

WIDTH = 14
ROWS, LABELS = blobs(900, WIDTH)
FRESH = torch.cat([blobs(150, WIDTH, seed=1)[0], strange(150, WIDTH)])
X, Z = FRESH.double().numpy(), logits(FRESH).double().numpy()
FIT = ROWS.double().numpy()
RIGHT = logits(ROWS).argmax(dim=1) == LABELS


def learnt(name: str, rows: Tensor = ROWS, labels: Tensor = LABELS, **options: Any) -> Scorer:
    return Scorer.learn(detectors.create(name, layer="f", **options), reference(rows, labels))


def scores(scorer: Scorer, rows: Tensor = FRESH) -> Tensor:
    return scorer.score(Activations({"f": rows}, logits(rows)))


def linear() -> nn.Linear:
    found = nn.Linear(WIDTH, 5).requires_grad_(requires_grad=False)
    found.weight.copy_(head(WIDTH)[0])
    found.bias.copy_(head(WIDTH)[1])
    return found


def patterns() -> np.ndarray:
    return np.array([FIT[(RIGHT & torch.eq(LABELS, c)).numpy()].mean(axis=0) for c in range(5)])


def expected(name: str) -> np.ndarray:
    top, away = Z.argmax(axis=1), X - FIT.mean(axis=0)
    weight = head(WIDTH)[0].double().numpy()
    if name == "she":
        found = -(X * patterns()[top]).sum(axis=1)
    elif name == "nci":
        along = (away * weight[top]).sum(axis=1) / np.linalg.norm(away, axis=1)
        found = -along - 0.01 * np.abs(X).sum(axis=1)
    else:
        found = np.zeros(len(X))
        for i, row in enumerate(Z):
            others = [c for c in range(5) if c != top[i]]
            gaps = [
                (row[top[i]] - row[c]) / np.linalg.norm(weight[top[i]] - weight[c]) for c in others
            ]
            found[i] = -np.mean(gaps) / np.linalg.norm(away[i])
    return np.asarray(found)


OPTIONS: dict[str, dict[str, Any]] = {"she": {}, "nci": {"norm_weight": 0.01}, "fdbd": {}}
PEERS = {"she": "SHE", "nci": "NCI", "fdbd": "fDBD"}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_scores_are_those_of_the_formula(name: str) -> None:
    found = scores(learnt(name, **OPTIONS[name]))
    np.testing.assert_allclose(found, expected(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_ranks_as_pytorch_ood_does(name: str) -> None:
    peer = getattr(pytorch_ood(), PEERS[name])(None, linear())
    if name == "fdbd":
        peer._precompute_denom_matrix()
    peer.fit_features(ROWS, LABELS)
    assert rank_agreement(scores(learnt(name)), peer.predict_features(FRESH)) >= 0.9999


@pytest.mark.parametrize("projection", [False, True])
def test_cosine_to_the_nearest_class(projection: bool) -> None:
    means = np.array([FIT[torch.eq(LABELS, c).numpy()].mean(axis=0) for c in range(5)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    length = 1.0 if projection else np.linalg.norm(X, axis=1, keepdims=True)
    found = scores(learnt("cosine", projection=projection))
    np.testing.assert_allclose(found, -((X / length) @ means.T).max(axis=1), rtol=1e-5)


def test_a_class_that_is_never_right_has_the_pattern_of_all() -> None:
    labels = LABELS.clone()
    labels[labels == 2] = 3  # so the model's answer 2 is never right
    state = learnt("she", labels=labels).state["patterns"].double().numpy()
    kept = (RIGHT & (LABELS != 2)).numpy()
    np.testing.assert_allclose(state[2], FIT[kept].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state[1], patterns()[1], rtol=1e-5)


def test_predicted_labels_are_all_right() -> None:
    detector = detectors.create("she", layer="f", labels="predicted")
    found = Scorer.learn(detector, reference(ROWS, LABELS))
    answers = learnt("she", rows=ROWS, labels=logits(ROWS).argmax(dim=1))
    assert torch.equal(found.state["patterns"], answers.state["patterns"])


def test_labels_beyond_the_model_are_said() -> None:
    """A first batch of three classes, and then one of five: two models in one reference."""

    def batches() -> Any:
        for classes in (3, 5):
            labels = LABELS % classes
            yield Activations({"f": ROWS}, nn.functional.one_hot(labels).float(), labels=labels)

    with pytest.raises(ContractError, match=r"she: the reference has label 4.* 3 classes"):
        Scorer.learn(detectors.create("she", layer="f"), Reference.from_batches(batches))


def test_equal_rows_of_the_head_and_masked_classes_leave_fdbd_finite() -> None:
    weight, bias = head(WIDTH)
    weight[1], bias[1] = weight[0], bias[0]
    given = Reference.from_arrays({"f": ROWS}, ROWS @ weight.T + bias, head=(weight, bias))
    scorer = Scorer.learn(detectors.create("fdbd", layer="f"), given)
    z = FRESH @ weight.T + bias
    assert bool(scorer.score(Activations({"f": FRESH}, z)).isfinite().all())
    masked = logits(FRESH)
    masked[:, 4] = -torch.inf
    whole = learnt("fdbd")
    found = whole.score(Activations({"f": FRESH}, masked))
    assert bool(found.isfinite().all())
    known = [c for c in range(5) if c != 4]
    weight, bias = head(WIDTH)
    few = Reference.from_arrays(
        {"f": ROWS}, logits(ROWS)[:, known], head=(weight[known], bias[known])
    )
    alone = Scorer.learn(detectors.create("fdbd", layer="f"), few)
    torch.testing.assert_close(
        found, alone.score(Activations({"f": FRESH}, logits(FRESH)[:, known]))
    )


@pytest.mark.parametrize("name", ["nci", "fdbd"])
def test_features_at_their_mean_are_no_error(name: str) -> None:
    scorer = learnt(name)
    found = scores(scorer, scorer.state["center"][None])
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", ["nci", "fdbd"])
def test_a_head_has_to_be_known(name: str) -> None:
    with pytest.raises(
        ContractError, match=f"{name}: the reference does not know the model's head"
    ):
        Scorer.learn(detectors.create(name, layer="f"), reference(ROWS, LABELS, known=False))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("she", {"labels": "none"}, "labels: 'none'"),
        ("cosine", {"labels": "none"}, "labels: 'none'"),
        ("nci", {"norm_weight": -1.0}, "norm_weight: -1.0 is negative"),
        ("nci", {"norm_weight": float("nan")}, "norm_weight: nan"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.{said}"):
        detectors.create(name, **options)
