"""What the acceptance experiments measure: held to its bound, and kept in a file where asked.

    pytest -m slow -k acceptance tests/flows --figures=docs/measured/acceptance.json

writes every figure of the experiments that ran into that file; what other runs left there stays.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Figures", "merged"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--figures", type=Path, help="file that the figures of acceptance experiments go into"
    )


class Figures:
    """The figures of one test.

    Args:
        test: where it stands, for the reader of the table.
        path: of the file they are kept in, if any.
    """

    def __init__(self, test: str, path: Path | None) -> None:
        self._test = test
        self._path = path
        self.missed: list[str] = []

    def hold(
        self,
        experiment: str,
        what: str,
        value: float,
        *,
        seed: int,
        least: float | None = None,
        most: float | None = None,
        expected: float | None = None,
    ) -> None:
        """One figure, `least` at least or `most` at most; judged when the test ends.

        Args:
            experiment: such as "B2".
            what: the figure, in words; the same for every seed.
            value: measured.
            seed: of what was random.
            least, most: the bound; one of them.
            expected: by the method's specification, where the bound is another one.
        """
        if (least is None) == (most is None):
            raise ValueError(f"{experiment} {what}: give least or most")
        kept = value >= least if least is not None else value <= (most or 0.0)
        if not kept:
            need = f">= {least:.4g}" if least is not None else f"<= {most:.4g}"
            self.missed.append(f"{experiment} {what}, seed {seed}: {value:.4f}, not {need}")
        if self._path is None:
            return
        bound = most if least is None else least
        row: dict[str, Any] = {"experiment": experiment, "what": what, "test": self._test}
        row |= {"seed": seed, "value": round(float(value), 4), "least": least, "most": most}
        row["expected"] = bound if expected is None else expected
        with self._path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tests may run in several processes
            file.seek(0)
            text = file.read()
            found = merged(json.loads(text)["figures"] if text else [], row)
            rows = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in found)
            file.truncate(0)
            file.write(f'{{"figures": [\n  {rows}\n]}}\n')


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one in its older self's place; its other seeds take its bounds."""

    def same(one: dict[str, Any]) -> bool:
        return bool(one["experiment"] == row["experiment"] and one["what"] == row["what"])

    bounds = {name: row[name] for name in ("test", "least", "most", "expected")}
    found = [one | bounds if same(one) else one for one in rows]
    found = [one for one in found if not (same(one) and one["seed"] == row["seed"])]
    return sorted([*found, row], key=lambda one: (one["experiment"], one["what"], one["seed"]))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Where a test puts what it measured; the test fails at its end if a bound was missed."""
    test = request.node.nodeid.partition("[")[0]
    found = Figures(test, request.config.getoption("--figures"))
    yield found
    if found.missed:
        pytest.fail("missed:\n  " + "\n  ".join(found.missed), pytrace=False)
