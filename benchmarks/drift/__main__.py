"""Our drift tests beside the public ones, in one table. `make bench-drift` runs the short form.

python -m benchmarks.drift [--long] [--only STREAM] [--contenders TEXT] [--out FOLDER]

Short form: up to 15 repetitions of each cell. Long form: 100 of each, slow contenders fewer, as the
table says; each cell is kept in `cells.jsonl` of the folder as soon as it is done, and a further
call goes on from there (`--again TEXT` runs these contenders once more, `--minutes` stops it in
time, `--table` only makes the table of what is there). `python -m benchmarks.drift.page` puts the
outcome into docs/alarms.md. Peers run in the environments `.venv-bench` and `.venv-alibi`; what is
not there is left out, with the reason. Processor time, one thread per process, `--lanes` processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from benchmarks.drift import peers, table
from benchmarks.drift.ours import OURS
from benchmarks.drift.pools import save_pools
from benchmarks.drift.streams import load
from benchmarks.drift.worker import Cell, Plan

ROOT = Path(__file__).resolve().parents[2]
SHORT = Plan(repetitions=15, seconds=0.25, control=10_000)
SHORT_MINUTES = 12.0
"""Then the table is made of what is there; the slowest contenders come last."""
LONG = Plan(repetitions=100, seconds=10.0, shares=(0.01, 0.05, 0.2, 1.0))
DATA = Path(os.environ.get("OODMON_TEST_DATA", ROOT.parent / "shared" / "data"))
Alarms = dict[str, list[int]]


class Results:
    """The cells that are done, in a file that is appended to.

    Args:
        path: of the file; its first line is the plan that they were made by.
        plan: that new cells are made by. `SystemExit` where the file has another.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path = path
        self._lock = Lock()
        self.lines: list[dict[str, Any]] = []
        told = asdict(replace(plan, pools="", only=""))
        if path.is_file():
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != json.loads(json.dumps(told)):
                raise SystemExit(f"{path} was made by another plan; move it, or give another --out")
            self.lines = [json.loads(line) for line in lines]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told) + "\n", encoding="utf-8")
        self._head = json.dumps(told)

    def add(self, line: str) -> None:
        """One more, at once on disk."""
        with self._lock:
            self.lines.append(json.loads(line))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line.rstrip() + "\n")

    def drop(self, contenders: Sequence[str]) -> None:
        """Forget the cells of contenders with one of these parts in their names."""
        parts = [part for part in contenders if part]
        self.lines = [
            line for line in self.lines if not any(part in line["contender"] for part in parts)
        ]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        self._path.write_text(f"{self._head}\n{text}", encoding="utf-8")

    def done(self, contender: str) -> list[tuple[str, str]]:
        """Stream and change of what this contender has behind it."""
        return [
            (line.get("stream") or line["drifting"], line.get("change", ""))
            for line in self.lines
            if line["contender"] == contender
        ]

    def cells(self) -> list[Cell]:
        """All but the streams that drift by themselves."""
        return [Cell(**line) for line in self.lines if "drifting" not in line]

    def drifting(self) -> dict[str, Alarms]:
        """Contender → stream that drifts by itself → its alarms."""
        found: dict[str, Alarms] = {}
        for line in self.lines:
            if line.get("at") is not None and "drifting" in line:
                found.setdefault(line["contender"], {})[line["drifting"]] = line["at"]
        return found


def environments() -> list[tuple[Path, Sequence[str]]]:
    """Interpreter and the contenders that it runs."""
    own = Path(sys.executable)
    return [
        (own, [*OURS, *peers.MAIN]),
        (ROOT / ".venv-bench" / "bin" / "python", list(peers.BENCH)),
        (ROOT / ".venv-alibi" / "bin" / "python", list(peers.ALIBI)),
    ]


def run(python: Path, name: str, plan: Plan, results: Results, until: float) -> str:
    """What one contender has not done yet; why some of it is missing."""
    if not python.is_file():
        return f"no environment {python.parent.parent.name}"
    left = until - time.monotonic()
    if left <= 0.0:
        return "out of time"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [python, "-m", "benchmarks.drift.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        ) as worker,
    ):
        bell = Timer(min(left, 1e6), worker.terminate)
        bell.start()
        with worker.stdin as told:  # type: ignore[union-attr]
            json.dump(asdict(plan) | {"done": results.done(name)}, told)
        for line in worker.stdout or ():
            if line[:1] == "{":
                results.add(line)
        bell.cancel()
        code = worker.wait()
        errors.seek(0)
        why = (errors.read().strip().splitlines() or ["no reason given"])[-1]
    if time.monotonic() >= until:
        return "out of time"
    return why if code else ""


def main() -> None:
    """Run, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", default="", help="part of a stream's name")
    parser.add_argument("--contenders", default="", help="parts of names, with semicolons between")
    parser.add_argument("--again", default="", help="as --contenders: not to be gone on with")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--minutes", type=float, help="short form: 12; long form: as it takes")
    parser.add_argument("--repetitions", type=int, default=0)
    parser.add_argument("--reference", type=int, default=1_000, help="scores in the reference")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    basis = LONG if asked.long else SHORT
    out = asked.out or ROOT / "bench-output" / ("drift-long" if asked.long else "drift")
    out.mkdir(parents=True, exist_ok=True)
    cells = out / "cells.jsonl"
    if not (asked.long or asked.table):
        cells.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="oodmon-bench-") as scratch:
        pools = Path(scratch) / "pools.npz"
        for why in save_pools(DATA, pools):
            print(f"real scores skipped: {why}", flush=True)
        plan = replace(
            basis,
            repetitions=asked.repetitions or basis.repetitions,
            seconds=basis.seconds * (20.0 if asked.repetitions else 1.0),
            reference=asked.reference,
            only=asked.only,
            pools=str(pools),
        )
        results = Results(cells, plan)
        if asked.again:
            results.drop(asked.again.split(";"))
        if not asked.table:
            _measure(asked, plan, results)
        _tell(out, plan, results)


def _measure(asked: argparse.Namespace, plan: Plan, results: Results) -> None:
    begun = time.monotonic()
    until = begun + 60.0 * (asked.minutes or (math.inf if asked.long else SHORT_MINUTES))
    jobs = [
        (python, name)
        for python, names in environments()
        for name in names
        if any(part in name for part in asked.contenders.split(";"))
    ]
    before = len(results.lines)
    with ThreadPoolExecutor(asked.lanes) as lanes:
        for (_, name), why in zip(
            jobs,
            lanes.map(lambda job: run(job[0], job[1], plan, results, until), jobs),
            strict=True,
        ):
            mine = [cell.seconds for cell in results.cells() if cell.contender == name]
            spent = f"{len(mine)} cells, {sum(mine):.0f} s of processor time"
            print(f"{name}: {spent}{f'; not all: {why}' if why else ''}", flush=True)
    print(f"{len(results.lines) - before} cells in {time.monotonic() - begun:.0f} s")


def _tell(out: Path, plan: Plan, results: Results) -> None:
    pools = load(plan.pools)
    order = {name: at for at, name in enumerate(n for _, names in environments() for n in names)}
    cells = sorted(results.cells(), key=lambda cell: order.get(cell.contender, len(order)))
    drifting = results.drifting()
    made = table.rows(cells, replace(plan, only="").streams(pools), pools)
    table.show(made)
    table.show_drifting(drifting)
    table.save(made, out / "drift.csv")
    (out / "alarms.json").write_text(json.dumps(drifting), encoding="utf-8")
    drawn = [*table.plot(made, out), *table.plot_drifting(drifting, out)]
    missing = [name for name in order if name not in {row.contender for row in made}]
    print(f"\n{len(made)} rows: {out}/drift.csv, {', '.join(path.name for path in drawn)}")
    if missing:
        print(f"not run: {', '.join(missing)}")


if __name__ == "__main__":
    main()
