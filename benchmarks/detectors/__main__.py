"""Throughput and agreement of every detector beside pytorch-ood's: a table, ratios within one run.

    python -m benchmarks.detectors [--only gen openmax] [--rounds 9] [--json FILE] [--strict]
    python -m benchmarks.detectors --record

Each file of this folder that has a `cases` function is a family; `frame` says how to add one. With
--record the figures go to docs/measured/detectors.json, from which `make docs` makes the page's:

    make bench-detectors BENCH=--record && make docs
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import math
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.detectors.frame import HEADER, Joint, Line, import_peer, measure
from benchmarks.detectors.results import results, text

RECORD = Path(__file__).resolve().parents[2] / "docs" / "measured" / "detectors.json"


def families() -> list[ModuleType]:
    """The modules of this folder that have cases, by name."""
    folder = str(Path(__file__).parent)
    found = [
        importlib.import_module(f"benchmarks.detectors.{info.name}")
        for info in pkgutil.iter_modules([folder])
        if info.name != "__main__"
    ]
    return [module for module in found if hasattr(module, "cases")]


def plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds per ratio")
    parser.add_argument("--only", nargs="*", default=[], help="methods or families to measure")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    parser.add_argument(
        "--record", action="store_true", help=f"write the table to docs/measured/{RECORD.name}"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 where a goal is missed")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record takes the whole table, --only is a part of it")
    torch.set_num_threads(1)
    gc.disable()
    peer = import_peer()
    wanted, lines, joints = set(options.only), list[Line](), list[Joint]()
    print(HEADER)
    known = {module.__name__.rpartition(".")[2]: module for module in families()}
    for short, family in known.items():
        if wanted and wanted <= known.keys() and short not in wanted:
            continue  # its tensors need not be made
        for case in family.cases(peer):
            if wanted and not wanted & {short, case.method}:
                continue
            with torch.inference_mode():
                lines.append(measure(case, options.rounds))
            print(lines[-1].text(), flush=True)
        if hasattr(family, "notes") and (not wanted or short in wanted):
            for joint in family.notes(options.rounds):
                joints.append(joint)
                print(joint.text(), flush=True)
        gc.collect()
    found = results(lines, joints)
    print(text(found))
    rows = [{k: plain(v) for k, v in dataclasses.asdict(line).items()} for line in lines]
    table = json.dumps({"rounds": options.rounds, **found, "lines": rows}, indent=1) + "\n"
    for path in (options.json, RECORD if options.record else None):
        if path:
            path.write_text(table)
    missed = any(not goal["reached"] for goal in found["goals"]) or found["ranks"]
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
