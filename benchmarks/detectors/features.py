"""Detectors of features beside pytorch-ood's: Gaussians, neighbours, subspaces, prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detectors.frame import Case
from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["cases"]

BATCH = 256
SHAPES = ((512, 10), (512, 1000), (2048, 1000))
FIT_ROWS = 8_000
BANK_ROWS = 50_000
RANK = 64

# goals of the project, by method, features and classes
GOALS = {("mahalanobis", 2048, 1000): 300.0}


class Data:
    """Features after a ReLU around class centres, and the head that tells nearest means apart."""

    def __init__(self, width: int, classes: int, rows: int) -> None:
        draw = torch.Generator().manual_seed(0)
        centres = torch.randn((classes, width), generator=draw) + 0.5
        mix = torch.randn((RANK, width), generator=draw) / RANK**0.5
        labels = torch.arange(rows + BATCH) % classes
        noise = 0.5 * torch.randn((rows + BATCH, width), generator=draw)
        common = torch.randn((rows + BATCH, RANK), generator=draw) @ mix
        features = (centres[labels] + common + noise).relu_()
        self.fit, self.labels = features[:rows], labels[:rows]
        # half of the scored batch is like the reference, half is not
        self.batch = features[rows:].clone()
        self.batch[::2] = self.batch[::2].roll(1, dims=1) * 1.3
        self.head = nn.Linear(width, classes).requires_grad_(requires_grad=False)
        means = centres.relu()
        self.head.weight.copy_((means - means.mean(dim=0)) * (8.0 / width**0.5))
        self.head.bias.zero_()
        self.reference = Reference.from_arrays(
            {"features": self.fit},
            self.head(self.fit),
            labels=self.labels,
            head=(self.head.weight, self.head.bias),
        )

    def learn(self, method: str, **options: Any) -> Scorer:
        return Scorer.learn(detectors.create(method, layer="features", **options), self.reference)

    def fresh(self, logits: bool) -> Callable[[], Activations]:
        """Features, and the logits that the model has made of them anyway."""
        found = self.head(self.batch) if logits else None
        return lambda: Activations({"features": self.batch}, found)


# method → (name in pytorch-ood, whether it reads logits, options that make both the same formula)
PEERS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "mahalanobis": ("Mahalanobis", False, {"shrinkage": "none"}),
    "relative_mahalanobis": ("RMD", False, {"shrinkage": "none"}),
    "vim": ("ViM", True, {"dimensions": 256}),
    "she": ("SHE", True, {}),
    "nci": ("NCI", True, {}),
    "fdbd": ("fDBD", True, {}),
}
SAME = frozenset(("mahalanobis", "relative_mahalanobis", "vim", "she", "nci", "fdbd"))


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """The methods that both have at three sizes, the banks at one, and ours alone at one."""
    for width, classes in SHAPES:
        data = Data(width, classes, FIT_ROWS)
        what = f"{BATCH} D={width} C={classes}"
        for method, (theirs, logits, options) in PEERS.items():
            judge = None if peer is None else fitted(getattr(peer, theirs), data)
            yield Case(
                method=method,
                what=what,
                scorer=data.learn(method, **options),
                fresh=data.fresh(logits),
                rows=BATCH,
                theirs=None if judge is None else calling(judge, data.batch),
                same_formula=method in SAME,
                goal=GOALS.get((method, width, classes), 0.0),
            )
    data = Data(512, 10, FIT_ROWS)
    what = f"{BATCH} D=512 C=10"
    gmm = None if peer is None else peer.GMM(None).fit_features(data.fit, data.labels)
    yield Case(
        method="gmm",
        what=f"{what} full",
        scorer=data.learn("gmm", covariance="full"),
        fresh=data.fresh(logits=False),
        rows=BATCH,
        theirs=None if gmm is None else calling(gmm, data.batch),
        remark="theirs in float64 and without shrinkage",
    )
    for method, options in (
        ("gmm", {"covariance": "shared"}),
        ("gmm", {"covariance": "diagonal"}),
        ("residual", {}),
        ("pca", {}),
        ("cosine", {}),
    ):
        scorer = data.learn(method, **options)
        kind = options.get("covariance", "")
        yield Case(method, f"{what} {kind}".strip(), scorer, data.fresh(logits=False), BATCH)
    yield from banks(peer)


def banks(peer: ModuleType | None) -> Iterator[Case]:
    """Nearest neighbours among 50,000 features of width 512."""
    data = Data(512, 10, BANK_ROWS)
    for method, logits, options in (
        ("knn", False, {"rows": BANK_ROWS}),
        ("nnguide", True, {"rows": BANK_ROWS}),
    ):
        judge: Any = None
        if peer is not None:
            judge = peer.KNN(None, k=50) if method == "knn" else peer.NNGuide(None, data.head)
            judge = judge.fit_features(data.fit, data.labels)
        yield Case(
            method=method,
            what=f"{BATCH} D=512 N={BANK_ROWS}",
            scorer=data.learn(method, **options),
            fresh=data.fresh(logits),
            rows=BATCH,
            theirs=None if judge is None else calling(judge, data.batch),
            same_formula=True,
        )
    few = data.learn("knn", rows=10_000, coreset=2_000, k=5)
    yield Case(
        method="knn",
        what=f"{BATCH} D=512 coreset 2000",
        scorer=few,
        fresh=data.fresh(logits=False),
        rows=BATCH,
        remark=f"recall {float(few.state['recall']):.2f}",
    )


def fitted(kind: Any, data: Data) -> Any:
    """pytorch-ood's detector of this kind, fitted to the same features."""
    name = kind.__name__
    if name in ("Mahalanobis", "RMD"):
        judge = kind(None)
    elif name == "ViM":
        judge = kind(None, d=256, w=data.head.weight, b=data.head.bias)
    else:
        judge = kind(None, data.head)
    if name == "fDBD":
        judge._precompute_denom_matrix()
    return judge.fit_features(data.fit, data.labels)


def calling(judge: Any, batch: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        found: Tensor = judge.predict_features(batch)
        return found

    return call
