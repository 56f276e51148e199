"""Our drift tests beside the public ones, in one table. `make bench-drift` runs the short form.

python -m benchmarks.drift [--long] [--only STREAM] [--contenders TEXT] [--out FOLDER]

Short form: up to 20 repetitions of each cell; long form: at least 100, slow contenders fewer, as
the table says. Peers run in the environments `.venv-bench` and `.venv-alibi`; what is not
there is left out, with the reason. Processor time, one thread per process, `--lanes` processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.drift import peers, table
from benchmarks.drift.ours import OURS
from benchmarks.drift.pools import save_pools
from benchmarks.drift.streams import load
from benchmarks.drift.worker import Cell, Plan

ROOT = Path(__file__).resolve().parents[2]
SHORT = Plan(repetitions=20, seconds=0.8)
LONG = Plan(repetitions=100, seconds=60.0, shares=(0.01, 0.05, 0.2, 1.0))
DATA = Path(os.environ.get("OODMON_TEST_DATA", ROOT.parent / "shared" / "data"))
Alarms = dict[str, list[int]]


def environments() -> list[tuple[Path, Sequence[str]]]:
    """Interpreter and the contenders that it runs."""
    own = Path(sys.executable)
    return [
        (own, [*OURS, *peers.MAIN]),
        (ROOT / ".venv-bench" / "bin" / "python", list(peers.BENCH)),
        (ROOT / ".venv-alibi" / "bin" / "python", list(peers.ALIBI)),
    ]


def run(python: Path, name: str, plan: Plan) -> tuple[list[Cell], Alarms, str]:
    """Every cell of one contender, its alarms on drifting streams, and why some are missing."""
    if not python.is_file():
        return [], {}, f"no environment {python.parent.parent.name}"
    done = subprocess.run(
        [python, "-m", "benchmarks.drift.worker", name],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    cells = [Cell(**line) for line in lines if "drifting" not in line]
    alarms = {line["drifting"]: line["at"] for line in lines if "drifting" in line}
    why = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""
    return cells, alarms, why


def main() -> None:
    """Run, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", default="", help="part of a stream's name")
    parser.add_argument("--contenders", default="", help="parts of names, with commas between")
    parser.add_argument("--repetitions", type=int, default=0)
    parser.add_argument("--reference", type=int, default=1_000, help="scores in the reference")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench-output/drift"))
    asked = parser.parse_args()
    basis = LONG if asked.long else SHORT
    with tempfile.TemporaryDirectory(prefix="oodmon-bench-") as scratch:
        pools = Path(scratch) / "pools.npz"
        for why in save_pools(DATA, pools):
            print(f"real scores skipped: {why}", flush=True)
        _measure(
            asked,
            replace(
                basis,
                repetitions=asked.repetitions or basis.repetitions,
                seconds=basis.seconds * (20.0 if asked.repetitions else 1.0),
                reference=asked.reference,
                only=asked.only,
                pools=str(pools),
            ),
        )


def _measure(asked: argparse.Namespace, plan: Plan) -> None:
    begun = time.monotonic()
    jobs = [
        (python, name)
        for python, names in environments()
        for name in names
        if any(part in name for part in asked.contenders.split(","))
    ]
    cells: list[Cell] = []
    drifting: dict[str, Alarms] = {}
    with ThreadPoolExecutor(asked.lanes) as lanes:
        for (_, name), (found, alarms, why) in zip(
            jobs, lanes.map(lambda job: run(job[0], job[1], plan), jobs), strict=True
        ):
            cells += found
            drifting[name] = alarms
            if why:
                print(f"{name}: {'cut short' if found else 'skipped'}: {why}", flush=True)
    pools = load(plan.pools)
    made = table.rows(cells, plan.streams(pools), pools)
    table.show(made)
    table.show_drifting(drifting)
    asked.out.mkdir(parents=True, exist_ok=True)
    table.save(made, asked.out / "drift.csv")
    drawn = [*table.plot(made, asked.out), *table.plot_drifting(drifting, asked.out)]
    print(
        f"\n{len(made)} rows in {time.monotonic() - begun:.0f} s; {asked.out}/drift.csv, "
        f"{', '.join(path.name for path in drawn)}"
    )


if __name__ == "__main__":
    main()
