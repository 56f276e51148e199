"""pytorch-ood's detectors on activations that are already there, to hold ours against them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.records import Activations

__all__ = ["peers"]

Score = Callable[[Activations], Tensor]


def peers(
    module: ModuleType,
    known: Activations,
    head: tuple[Tensor, Tensor],
    layer: str,
    maps: str,
    fresh: Activations | None = None,
) -> dict[str, Score]:
    """Name of our detector → theirs, learnt from the same activations, with our options.

    Args:
        module: `pytorch_ood.detector`.
        known: features in `layer`, feature maps in `maps`, logits and labels of the reference.
        head: weight and bias of the last layer.
        fresh: logits and labels that the network was not trained on, for the temperature; the
            reference's where there are none.
    """
    weight, bias = head
    rows, logits, labels = known.layer(layer), known.require_logits(), known.labels
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(requires_grad=False)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)

    def pooled(found: Tensor) -> Tensor:
        return functional.linear(found.mean(dim=(2, 3)), weight, bias)

    of_logits = {
        "msp": module.MaxSoftmax(None),
        "max_logit": module.MaxLogit(None),
        "energy": module.EnergyBased(None),
        "entropy": module.Entropy(None),
        "gen": module.GEN(None, M=min(100, len(weight))),
        "kl_matching": module.KLMatching(None).fit_logits(logits, labels),
        "temperature_scaling": module.TemperatureScaling(None),
    }
    with torch.inference_mode(mode=False), torch.enable_grad():
        unseen = fresh or known
        of_logits["temperature_scaling"].fit_logits(unseen.require_logits().clone(), unseen.labels)
    openmax = module.OpenMax(None, tailsize=20, alpha=10).fit_logits(logits, labels)
    # it takes the distance from a class that no row of a batch is given to as 0
    given = logits.argmax(dim=1)
    one_each = torch.stack([logits[given == label][0] for label in sorted(set(given.tolist()))])
    gradient = module.GradNorm(linear, param_filter=lambda name: name == "weight")
    distance = module.fDBD(None, linear)
    distance._precompute_denom_matrix()
    of_features = {
        "mahalanobis": module.Mahalanobis(None),
        "relative_mahalanobis": module.RMD(None),
        "knn": module.KNN(None, k=50),
        "nnguide": module.NNGuide(None, linear),
        "vim": module.ViM(None, d=len(weight.T) // 2, w=weight, b=bias),
        "she": module.SHE(None, linear),
        "nci": module.NCI(None, linear),
        "fdbd": distance,
        "gmm": module.GMM(None),
        "dice": module.DICE(None, weight, bias, 0.7),
    }
    for judge in of_features.values():
        judge.fit_features(rows, labels)
    of_maps: dict[str, Any] = {
        "react": module.ReAct(None, pooled, percentile=0.9),
        "vra": module.VRA(None, pooled, lower_percentile=0.6, upper_percentile=0.95),
        "scale": module.SCALE(None, pooled, percentile=0.85),
        "ash": module.ASH(None, pooled, variant="ash-s", percentile=0.9),
        "rankfeat": module.RankFeat(None, pooled),
    }
    of_maps["vra"].fit_feature_maps(known.layer(maps), labels)
    # the paper clips what feeds the head, of which theirs makes a map of one place
    of_maps["react"].fit_feature_maps(rows[:, :, None, None], labels)

    def on_logits(judge: Any) -> Score:
        return lambda acts: judge.predict_logits(acts.require_logits())

    def on_features(judge: Any) -> Score:
        return lambda acts: judge.predict_features(acts.layer(layer))

    def by_openmax(acts: Activations) -> Tensor:
        rows = torch.cat([one_each, acts.require_logits()])
        found: Tensor = openmax.predict_logits(rows)[len(one_each) :]
        return found

    def by_gradient(acts: Activations) -> Tensor:
        with torch.inference_mode(mode=False), torch.enable_grad():
            found: Tensor = gradient.predict(acts.layer(layer).clone()).detach()
        return found

    def on_maps(judge: Any) -> Score:
        return lambda acts: judge.predict_feature_maps(acts.layer(maps))

    def by_clipping(acts: Activations) -> Tensor:
        found: Tensor = of_maps["react"].predict_feature_maps(acts.layer(layer)[:, :, None, None])
        return found

    return {
        **{name: on_logits(judge) for name, judge in of_logits.items()},
        **{name: on_features(judge) for name, judge in of_features.items()},
        **{name: on_maps(judge) for name, judge in of_maps.items()},
        "gradnorm": by_gradient,
        "openmax": by_openmax,
        "react": by_clipping,
    }
