"""Which detectors suit a model, from reference data alone: what each sees, costs, and shares.

Held-out reference samples are set against corrupted copies of themselves, and against classes that
were kept from the detector and from the head. Neither is the novelty of tomorrow: they rank
detectors by what they react to, and promise no AUROC on anything else.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import nn

from oodmon.contracts import Detector, Tap
from oodmon.detectors import Scorer
from oodmon.errors import ContractError, OodmonError
from oodmon.evaluate import auroc
from oodmon.fitting.learn import RUN, Progress
from oodmon.fitting.proposal import coverage, propose, rank_correlation
from oodmon.fitting.reading import Reading, offered, place_of, probe_of, reads_of
from oodmon.fitting.sampled import sampled, sized
from oodmon.fitting.sources import Source
from oodmon.fitting.trial import (
    LEAST,
    Scores,
    Trial,
    change_all,
    count_of,
    fastest,
    learn_all,
    microseconds,
    read_all,
)
from oodmon.fitting.withheld import UNSEEN, classes_of, withheld
from oodmon.registry import detectors as registry
from oodmon.taps.layout import head_of

__all__ = ["Advice", "Verdict", "advise", "catalogue"]

_BATCH: Final = 256
_SPECIAL: Final = {
    "generalized_odin": "reads the parts of a DeConf head",
    "combine": "made of other detectors",
    "per_layer": "made of other detectors",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One detector.

    Attributes:
        detector: with its layers.
        auroc: corruption → AUROC of its copies against the held-out samples; NaN: not tried.
        mean: of those that were tried.
        microseconds: to score one sample of a full batch.
        like, likeness: the detector that it agrees with most, and their rank correlation.
    """

    detector: Detector
    auroc: Mapping[str, float]
    mean: float
    microseconds: float
    like: str
    likeness: float


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found.

    Attributes:
        verdicts: id → verdict, the best mean first.
        skipped: id, or change → why it could not be tried.
        changes: what samples were set against.
        correlation: id → id → Spearman's of their ranks over clean and corrupted samples.
        learnt, held: samples that were learnt from and held out.
        model_microseconds: a pass of the tapped model, per sample of a full batch.
        budget_microseconds: what the proposed detectors may cost together.
        proposed: their ids, the best first; empty where none fits the budget.
        coverage: mean over the changes of the best proposed detector's AUROC.
    """

    verdicts: Mapping[str, Verdict]
    skipped: Mapping[str, str]
    changes: tuple[str, ...]
    correlation: Mapping[str, Mapping[str, float]]
    learnt: int
    held: int
    model_microseconds: float
    budget_microseconds: float
    proposed: tuple[str, ...]
    coverage: float

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs; null where something was not tried."""
        found = dataclasses.asdict(dataclasses.replace(self, verdicts={}))
        found["detectors"] = {
            name: {
                "type": verdict.detector.name,
                "options": dataclasses.asdict(verdict.detector),  # type: ignore[call-overload]
                "auroc": {k: None if math.isnan(v) else v for k, v in verdict.auroc.items()},
                "mean_auroc": None if math.isnan(verdict.mean) else verdict.mean,
                "microseconds": verdict.microseconds,
                "like": verdict.like,
                "likeness": verdict.likeness,
            }
            for name, verdict in self.verdicts.items()
        }
        del found["verdicts"]
        return found


def catalogue() -> tuple[dict[str, Detector], dict[str, str]]:
    """Every detector that is quick to try as it comes, and of the others why it is not."""
    quick: dict[str, Detector] = {}
    others: dict[str, str] = {}
    for name in registry.names():
        if name in _SPECIAL:
            others[name] = _SPECIAL[name]
            continue
        try:
            detector: Detector = registry.create(name)
            reads = detector.reads()
        except (OodmonError, TypeError) as error:
            others[name] = str(error)
            continue
        if reads.model:
            others[name] = "what runs the model again is tried where the config names it"
        elif "network" in detector.cost:
            others[name] = "what trains a network is tried where the config names it"
        else:
            quick[name] = detector
    return quick, others


def advise(
    model: nn.Module,
    source: Source,
    *,
    tap: Tap,
    candidates: Mapping[str, Detector],
    learnt: Mapping[str, Scorer] | None = None,
    again: Collection[str] = (),
    learn_share: float = 0.5,
    seed: int = 0,
    device: str = "",
    in_order: bool = False,
    budget: float = 0.0,
    learn_samples: int = 2000,
    held_samples: int = 512,
    classes: int = 3,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> Advice:
    """Try detectors on reference data alone, and propose some to run together.

    Args:
        model: run in evaluation mode without gradients; left as it was.
        source: in-distribution data, labelled for detectors that need classes.
        tap: as configured.
        candidates: id → detector that is to learn here; one that cannot is skipped with the reason.
        learnt: id → scorer that `fit` made of the same source, share, seed and order.
        again: ids of those that may learn again, without a class that is then unseen.
        learn_share, seed, device, in_order: as in `fit`, so that nobody is judged on samples that
            it has learnt from.
        budget: microseconds per sample for all proposed together; 0: as much as the model's pass.
        learn_samples, held_samples: at most; drawn uniformly.
        classes: at most so many are kept from detectors, one after the other; 0: none.
        seconds: that corrupted copies may spend in the model; fewer held-out samples are
            corrupted where it is slow.
        progress: told how far it is.

    Raises:
        ContractError: the data cannot be used, or no detector can be tried.
    """
    tell = progress or _quiet
    if device:
        model = model.to(device)
    place = place_of(model)
    layers = offered(tap, model)
    trying = {name: detector.pin(layers) for name, detector in candidates.items()}
    known = {name: scorer.to(place) for name, scorer in (learnt or {}).items()}
    reads = reads_of([*trying.values(), *(scorer.detector for scorer in known.values())])
    tell("sampling", 0.0, source.told)
    to_learn, held = sampled(
        source,
        learn_samples if trying or again else 0,
        held_samples,
        learn_share=learn_share,
        seed=seed,
        run=RUN if in_order else 1,
        progress=lambda done: tell("sampling", done / max(source.samples, done), source.told),
    )
    held = sized(held, _BATCH)
    if not trying and any(batch.labels is None for batch in to_learn):
        to_learn = []
    teaching, asked = count_of(to_learn), count_of(held)
    drawn = f"{teaching} to learn from, " if teaching else ""
    tell("sampling", 1.0, f"{drawn}{asked} held out")
    if asked < LEAST or (trying and teaching < LEAST):
        raise ContractError(
            f"{teaching} samples to learn from and {asked} held out are too few; "
            f"at least {LEAST} of each are needed"
        )
    head = head_of(getattr(model, "_orig_mod", model))
    probe = probe_of(tap, model, reads)
    with (
        tempfile.TemporaryDirectory(prefix="oodmon-advise-") as scratch,
        Reading(model, tap, reads) as reading,
    ):
        kept = read_all(reading, to_learn, Path(scratch) / "learn")
        clean = read_all(reading, held, Path(scratch) / "held")
        made, skipped = learn_all(trying, kept, head, seed, place, probe, tell)
        tried = Trial(known | made, place, probe, skipped)
        usual = tried.scores(clean.batches())
        if not tried.scorers:
            raise ContractError(
                "no detector can be tried: "
                + "; ".join(f"{name}: {why}" for name, why in skipped.items())
            )
        pass_seconds = fastest(lambda: reading.read(held[0])) / held[0].rows
        changed = change_all(tried, reading, held, seconds, pass_seconds, seed, skipped, tell)
        known = tried.scorers
        found = {
            name: {change: _auroc(usual[name], scores[name]) for change, scores in changed.items()}
            for name in known
        }
        columns = {name: [one[name] for one in (usual, *changed.values())] for name in known}
        unseen = classes_of(kept, clean, classes, seed) if kept.rows else ()
        if unseen:
            for number, name in enumerate(known):
                tell("withholding", number / len(known), name)
                found[name][UNSEEN] = (
                    withheld(known[name].detector, kept, clean, unseen, head, seed, place)
                    if name in trying or name in again
                    else math.nan
                )
            tell("withholding", 1.0, "")
        cost = {name: microseconds(scorer, clean, place, probe) for name, scorer in known.items()}
    return _advice(
        known,
        found,
        rank_correlation(np.stack([np.concatenate(columns[name]) for name in known])),
        cost,
        skipped,
        (*changed, *([UNSEEN] if unseen else [])),
        kept.rows,
        clean.rows,
        1e6 * pass_seconds,
        budget or 1e6 * pass_seconds,
    )


def _advice(
    scorers: Mapping[str, Scorer],
    found: Mapping[str, Mapping[str, float]],
    correlation: npt.NDArray[np.float64],
    cost: Mapping[str, float],
    skipped: Mapping[str, str],
    changes: tuple[str, ...],
    learnt: int,
    held: int,
    pass_microseconds: float,
    budget: float,
) -> Advice:
    names = list(scorers)
    table = np.array([[found[name][change] for change in changes] for name in names]).reshape(
        len(names), len(changes)
    )
    # what was not tried on everything is not compared by what it was spared
    whole = table[:, ~np.isnan(table).all(axis=0)]
    rows = propose(whole, np.array([cost[name] for name in names]), correlation, budget)
    others = correlation - 2.0 * np.eye(len(names))
    verdicts = {}
    for row, name in enumerate(names):
        seen = table[row][~np.isnan(table[row])]
        nearest = int(others[row].argmax()) if len(names) > 1 else row
        verdicts[name] = Verdict(
            scorers[name].detector,
            found[name],
            float(seen.mean()) if len(seen) else math.nan,
            cost[name],
            names[nearest] if len(names) > 1 else "",
            float(correlation[row, nearest]) if len(names) > 1 else 0.0,
        )
    order = sorted(names, key=lambda name: (-np.nan_to_num(verdicts[name].mean), cost[name]))
    return Advice(
        {name: verdicts[name] for name in order},
        dict(skipped),
        changes,
        {
            name: dict(zip(names, map(float, correlation[row]), strict=True))
            for row, name in enumerate(names)
        },
        learnt,
        held,
        pass_microseconds,
        budget,
        tuple(names[row] for row in rows),
        coverage(whole[rows]),
    )


def _auroc(usual: Scores, odd: Scores) -> float:
    """NaN where too few could be scored."""
    usual, odd = usual[~np.isnan(usual)], odd[~np.isnan(odd)]
    return auroc(usual, odd) if min(len(usual), len(odd)) >= LEAST else math.nan


def _quiet(stage: str, done: float, note: str) -> None:
    del stage, done, note
