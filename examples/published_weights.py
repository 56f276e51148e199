"""Every post-hoc detector on published weights: what they separate on models that others trained.

ResNet-20 and ResNet-56 (CIFAR-10) against CIFAR-100, traffic signs, house numbers, and blurred and
noisy copies of CIFAR-10; and Outlier Exposure's networks before and after they were fine-tuned
with outliers. Prints one table per network; exits 1 where a detector separates worse than
pytorch-ood's of the same formula, or where fine-tuning did not help.

    python -m examples.published_weights --data FOLDER [--networks resnet20] [--rows 1000]
        [--odin] [--json FILE]

FOLDER (or the environment variable OODMON_TEST_DATA) holds the .npz files named below with `images`
and `labels`, texts as .gz, and a folder `weights` with the safetensors files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import published_networks as networks
from oodmon.contracts import Reads
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import Evaluation, auroc, evaluate
from oodmon.fitting.reading import Reading
from oodmon.fitting.sources import Batch
from oodmon.records import Activations
from oodmon.registry import detectors, taps
from oodmon.taps.twin import Twin

REFERENCE_ROWS = 10_000
STAGE_ROWS = 4_000  # of the reference that detectors of whole maps learn from
ROWS = 3_000  # of each set that is scored
BATCH = 250
BLUR_SIGMA = 1.0
NOISE_STD = 0.1
ALLOWED = 0.002  # AUROC that may be lost against the peer to rounding and ties
RESNETS = {"resnet20": 3, "resnet56": 9}
STAGES = ("stage1", "stage2", "stage3")
LAST, FEATURES = "stage3", "penultimate"
ON_MAPS = ("ash", "scale", "rankfeat")  # the others shape what feeds the head, as in their papers
HELD_OUT = "temperature_scaling"  # is learnt from images that the network was not trained on
ON_STAGES: dict[str, dict[str, Any]] = {
    "gram": {"layers": STAGES},
    "mahalanobis, 3 stages": {"layers": STAGES},
}
# A head that these networks were not trained with, and outliers that nobody has labelled.
NEEDS_MORE = frozenset(("generalized_odin", "deep_sad"))
ALSO: dict[str, dict[str, Any]] = {"gen, p ≥ 1e-7": {"least": 1e-7}}
OTHER_FORMULA = {"gen": "theirs clamps probabilities at 1e-7, which `least: 1e-7` does here"}
OURS: dict[str, dict[str, Any]] = {
    "gmm": {"covariance": "full"},
    "knn": {"k": 50},
    "mahalanobis, 3 stages": {"combine": "sum"},
}


@dataclass(frozen=True)
class Line:
    """One detector on one data set; `theirs` is pytorch-ood's AUROC, none where it has none."""

    network: str
    detector: str
    data: str
    ours: Evaluation
    theirs: float | None


def images(folder: Path, name: str, rows: slice) -> Tensor:
    """(N, C, H, W) in [0, 1]."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        pixels = file["images"][rows]
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255.0


def labels(folder: Path, name: str, rows: slice) -> Tensor:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["labels"][rows])


def blurred(pictures: Tensor) -> Tensor:
    """With a Gaussian of `BLUR_SIGMA` pixels; edges are mirrored."""
    reach = int(4 * BLUR_SIGMA + 0.5)
    line = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * BLUR_SIGMA**2))
    line = (line / line.sum()).repeat(3, 1)[:, None]
    padded = functional.pad(pictures, (reach, reach, reach, reach), mode="reflect")
    across = functional.conv2d(padded, line[:, :, None], groups=3)
    return functional.conv2d(across, line[:, :, :, None], groups=3)


def noisy(pictures: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (pictures + NOISE_STD * torch.randn(pictures.shape, generator=draw)).clamp_(0.0, 1.0)


def applicable(odin: bool) -> dict[str, dict[str, Any]]:
    """Line of the table → options, for every built-in detector that needs activations alone."""
    found: dict[str, dict[str, Any]] = {}
    for name in detectors.names():
        kind = detectors.get(name)
        if not kind.__module__.startswith("oodmon.") or name in NEEDS_MORE:
            continue
        try:
            reads = kind().pin((*STAGES, FEATURES)).reads()
        except Exception:  # it asks for options that only its user knows
            continue
        if (reads.inputs or reads.model) and not (odin and name == "odin"):
            continue
        found[name] = {**OURS.get(name, {}), **({"layer": LAST} if name in ON_MAPS else {})}
    for name, options in {**ON_STAGES, **ALSO}.items():
        found[name] = {**OURS.get(name, {}), **options}
    return found


def resnet(
    name: str, folder: Path, rows: int, learnt_from: int, odin: bool, peer: Any
) -> Iterator[Line]:
    """Learn every detector from CIFAR-10's training images, score the sets."""
    blocks = RESNETS[name]
    path = folder / "weights" / f"cifar10_{name}_akamaster.safetensors"
    model = networks.load_resnet(path, blocks)
    head = model.linear.weight.detach(), model.linear.bias.detach()
    known = images(folder, "cifar10_train10k", slice(learnt_from))
    answers = labels(folder, "cifar10_train10k", slice(learnt_from))
    reads = Reads(layers=(*STAGES, FEATURES), logits=True, inputs=odin)
    chosen = applicable(odin)
    with Reading(model, taps.create("hooks"), reads) as reading:
        whole = [reading.read(batch) for batch in batches(known[:STAGE_ROWS], answers)]
        few = [thin(acts) for acts in whole]
        few += [
            thin(reading.read(batch)) for batch in batches(known[STAGE_ROWS:], answers[STAGE_ROWS:])
        ]
        cifar, right = (read(folder, "cifar10_test", slice(None)) for read in (images, labels))
        unseen = batches(cifar[3 * ROWS :], right[3 * ROWS :])
        aside = [thin(reading.read(batch)) for batch in unseen]
        scorers = {}
        for line, options in chosen.items():
            kept = whole if line in ON_STAGES else aside if line == HELD_OUT else few
            reference = Reference.from_batches(lambda kept=kept: iter(kept), head=head)  # type: ignore[misc]
            began = time.monotonic()
            detector = detectors.create(line.partition(",")[0], **options)
            scorers[line] = Scorer.learn(detector, reference)
            print(f"  {line}: learnt in {time.monotonic() - began:.1f} s", file=sys.stderr)
        del whole
        theirs: Mapping[str, Callable[[Activations], Tensor]] = {}
        if peer is not None:
            from benchmarks.published import peers

            theirs = peers(peer, joined(few), head, FEATURES, LAST, joined(aside))
            theirs = {**theirs, **{line: theirs[line.partition(",")[0]] for line in ALSO}}
        del few
        sets = {
            "CIFAR-10": cifar[:rows],
            "CIFAR-100": images(folder, "cifar100_test5k", slice(rows)),
            "GTSRB": images(folder, "gtsrb_test3k", slice(rows)),
            "SVHN": images(folder, "svhn_train_head1083", slice(rows)),
            "blurred": blurred(cifar[rows : 2 * rows]),
            "noisy": noisy(cifar[2 * rows : 3 * rows]),
        }
        probe = Twin(model) if odin else None
        ours, other = {}, {}
        for data, pictures in sets.items():
            ours[data], other[data] = scored(reading, pictures, scorers, theirs, probe)
            print(f"  {data}: scored", file=sys.stderr)
    for data in list(sets)[1:]:
        for line in scorers:
            beside = None
            if line in theirs:
                beside = auroc(other["CIFAR-10"][line], other[data][line])
            yield Line(name, line, data, evaluate(ours["CIFAR-10"][line], ours[data][line]), beside)


def batches(pictures: Tensor, answers: Tensor | None = None) -> Iterator[Batch]:
    for start in range(0, len(pictures), BATCH):
        rows = slice(start, start + BATCH)
        yield Batch((pictures[rows],), {}, None if answers is None else answers[rows])


def thin(acts: Activations) -> Activations:
    """Without the large maps of early stages."""
    kept = {name: acts.layers[name] for name in (LAST, FEATURES)}
    return dataclasses.replace(acts, layers=kept)


def joined(parts: Sequence[Activations]) -> Activations:
    return Activations(
        layers={n: torch.cat([acts.layers[n] for acts in parts]) for n in (LAST, FEATURES)},
        logits=torch.cat([acts.require_logits() for acts in parts]),
        labels=torch.cat([acts.labels for acts in parts if acts.labels is not None]),
    )


def scored(
    reading: Reading,
    pictures: Tensor,
    scorers: Mapping[str, Scorer],
    theirs: Mapping[str, Callable[[Activations], Tensor]],
    probe: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by ours and by theirs, on the same activations."""
    ours: dict[str, list[Any]] = {name: [] for name in scorers}
    other: dict[str, list[Any]] = {name: [] for name in theirs}
    for batch in batches(pictures):
        acts = dataclasses.replace(reading.read(batch), probe=probe)
        for name, scorer in scorers.items():
            ours[name].append(scorer.score(acts).numpy())
        with torch.no_grad():
            for name, judge in theirs.items():
                other[name].append(judge(acts).double().numpy())
    return (
        {name: np.concatenate(parts) for name, parts in ours.items()},
        {name: np.concatenate(parts) for name, parts in other.items()},
    )


def exposure(folder: Path, rows: int) -> Iterator[tuple[str, str, float, float]]:
    """(network, data, AUROC of MSP before, and after fine-tuning with outliers)."""
    weights = folder / "weights"
    msp = Scorer(detectors.create("msp"), {})

    def scores(model: nn.Module, inputs: Tensor) -> Any:
        with torch.inference_mode():
            return msp.score(Activations(logits=model(inputs))).numpy()

    sets = {
        n: images(folder, n, slice(rows))
        for n in ("mnist_test", "notmnist_test", "kmnist_test", "fashion_mnist_test")
    }
    made: list[dict[str, Any]] = []
    for step in ("baseline", "tune"):
        stem = "mnist_oe_baseline" if step == "baseline" else "mnist_oe_tune"
        model: nn.Module = networks.load_convnet(weights / f"{stem}_hendrycks.safetensors")
        made.append({name: scores(model, inputs) for name, inputs in sets.items()})
    for name in list(sets)[1:]:
        before, after = (auroc(found["mnist_test"], found[name]) for found in made)
        yield "MNIST ConvNet", name.removesuffix("_test"), before, after
    texts = {
        "trec": [
            row["text"]
            for row in map(json.loads, lines(folder / "text_trec.jsonl.gz"))
            if row["split"] == "test"
        ],
        "multi30k": lines(folder / "text_multi30k_captions.txt.gz")[:rows],
        "wmt16": lines(folder / "text_wmt16_sentences.txt.gz")[:rows],
    }
    made = []
    for stem in ("trec_gru_baseline", "trec_gru_oe_wikitext2"):
        path = weights / f"{stem}_hendrycks.safetensors"
        gru, words = networks.load_gru(path, weights / "trec_gru_vocab.json")
        made.append({name: scores(gru, words.tokens(found)) for name, found in texts.items()})
    for name in ("multi30k", "wmt16"):
        before, after = (auroc(found["trec"], found[name]) for found in made)
        yield "TREC GRU", name, before, after


def lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def peer_module() -> Any:
    """pytorch-ood's detectors, or none where they or the benchmarks are not at hand."""
    try:
        from benchmarks.detectors.frame import import_peer
    except ImportError:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        return import_peer()


def told(found: Sequence[Line]) -> None:
    """AUROC and FPR95 (share of CIFAR-10 flagged where 95 % of the set is caught)."""
    sets = list(dict.fromkeys(line.data for line in found))
    for network in dict.fromkeys(line.network for line in found):
        print(
            f"\n{network}: AUROC / FPR95, OOD positive\n{'':24}" + "".join(f"{s:>16}" for s in sets)
        )
        rows: dict[str, list[Line]] = {}
        for line in found:
            if line.network == network:
                rows.setdefault(line.detector, []).append(line)
        for name in sorted(rows, key=lambda n: -sum(line.ours.auroc for line in rows[n])):
            cells = [f"{line.ours.auroc:.3f} / {line.ours.fpr95_ood:.2f}" for line in rows[name]]
            print(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))


def compact(rows: int, lines: Sequence[object], exposures: Sequence[object]) -> str:
    """JSON of one row a line, in five digits."""
    table = json.dumps({"rows": rows, "lines": lines, "exposure": exposures})
    table = json.dumps(json.loads(table, parse_float=lambda text: round(float(text), 5)))
    return table.replace('{"network"', '\n  {"network"').replace(", \n", ",\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("OODMON_TEST_DATA"))
    parser.add_argument("--networks", nargs="*", choices=RESNETS, default=list(RESNETS))
    parser.add_argument("--rows", type=int, default=ROWS, help="of each set that is scored")
    parser.add_argument("--learn", type=int, default=REFERENCE_ROWS, help="rows to learn from")
    parser.add_argument("--odin", action="store_true", help="also odin, which runs the model again")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    if not 0 < options.rows <= ROWS:
        parser.error(
            f"--rows must be 1 to {ROWS}: the last of CIFAR-10's test images are learnt from"
        )
    if options.data is None or not (Path(options.data) / "weights").is_dir():
        parser.error("--data (or OODMON_TEST_DATA) must be a folder that has a folder `weights`")
    folder, peer = Path(options.data), peer_module()
    found: list[Line] = []
    for name in options.networks:
        print(name, file=sys.stderr)
        found += resnet(name, folder, options.rows, options.learn, options.odin, peer)
    told(found)
    worse = [
        line
        for line in found
        if line.theirs is not None and line.ours.auroc < line.theirs - ALLOWED
    ]
    for line in worse:
        why = OTHER_FORMULA.get(line.detector, "")
        print(
            f"below pytorch-ood's: {line.network} {line.detector} {line.data}: "
            f"{line.ours.auroc:.4f} < {line.theirs:.4f}{'; ' + why if why else ''}"
        )
    worse = [line for line in worse if line.detector not in OTHER_FORMULA]
    exposed = list(exposure(folder, options.rows))
    print("\nAUROC of msp before and after fine-tuning with outliers")
    for network, data, before, after in exposed:
        print(f"{network:16}{data:16}{before:8.3f}{after:8.3f}")
    if options.json:
        lines = [{**dataclasses.asdict(line), "fpr95_id": line.ours.fpr95_id} for line in found]
        names = ("network", "data", "before", "after")
        exposures = [dict(zip(names, row, strict=True)) for row in exposed]
        options.json.write_text(compact(options.rows, lines, exposures))
    return 1 if worse or any(after <= before for *_, before, after in exposed) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
