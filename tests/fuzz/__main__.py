"""``python -m tests.fuzz``: so many inputs over all targets; the status is 1 if one found a bug."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.drive import drive
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run, print one line for each target, keep what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TARGETS), help="one target")
    parser.add_argument("--keep", type=Path, help="folder for inputs that found a bug")
    given = parser.parse_args()
    total = bugs = 0
    begun = time.monotonic()
    for name, target in TARGETS.items():
        if given.only not in (None, name):
            continue
        count = given.inputs if given.only else round(given.inputs * target.share)
        outcome = drive(target, count, given.seed)
        total += outcome.inputs
        bugs += len(outcome.bugs)
        _say(str(outcome))
        for number, (data, why) in enumerate(outcome.bugs[:20]):
            _say(f"  {why}\n  {data[:200]!r}")
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{name.replace(' ', '-')}-{number}").write_bytes(data)
    seconds = time.monotonic() - begun
    _say(f"{total:,} inputs in {seconds:,.0f} s, {total / seconds:,.0f}/s, {bugs} bugs")
    return 1 if bugs else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
