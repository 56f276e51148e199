"""Throughput and agreement of every detector beside pytorch-ood's: a table, ratios within one run.

    python -m benchmarks.detectors [--only gen openmax] [--rounds 9] [--json FILE] [--strict]

Each file of this folder that has a `cases` function is a family; `frame` says how to add one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.detectors.frame import HEADER, Line, import_peer, measure, summary


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
    parser.add_argument("--strict", action="store_true", help="exit 1 where a goal is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = import_peer()
    wanted, lines = set(options.only), list[Line]()
    print(HEADER)
    found = {module.__name__.rpartition(".")[2]: module for module in families()}
    for short, family in found.items():
        if wanted and wanted <= found.keys() and short not in wanted:
            continue  # its tensors need not be made
        for case in family.cases(peer):
            if wanted and not wanted & {short, case.method}:
                continue
            with torch.inference_mode():
                lines.append(measure(case, options.rounds))
            print(lines[-1].text(), flush=True)
        if hasattr(family, "notes") and (not wanted or short in wanted):
            for note in family.notes(options.rounds):
                print(note, flush=True)
    total = summary(lines)
    if total["methods"]:
        print(
            f"\nover {total['methods']} methods that both have: geometric mean "
            f"{total['geometric_mean']:.1f}x, least {total['minimum']:.2f}x ({total['slowest']})"
        )
        print(f"missed: {', '.join(total['missed']) or 'nothing'}")
    if options.json:
        rows = [{k: plain(v) for k, v in dataclasses.asdict(line).items()} for line in lines]
        table = {"summary": {k: plain(v) for k, v in total.items()}, "lines": rows}
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if options.strict and total["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
