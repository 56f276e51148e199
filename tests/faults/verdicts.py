"""How a disturbed run is judged against an undisturbed one, and the table over many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.faults.site import Outcome

__all__ = ["Table", "Verdict", "compared"]

_MORE_THREADS, _MORE_FILES, _MORE_BYTES = 2, 12, 24 << 20
"""What a disturbed daemon may hold beyond an undisturbed one: kept connections of pools."""

_COLUMNS = ("fault", "database", "runs", "lost", "differ", "missing", "dupl.", "copies", "leaks",
            "broken")  # fmt: skip


@dataclass
class Verdict:
    """How one run differs from an undisturbed one.

    Attributes:
        lost: facts that are missing; differing: rows that are in one of the two only.
        missing: alerts and other events that never reached the topic.
        duplicates: ids that an undisturbed run does not send, or under which the topic holds two
            different bodies; copies: records that a consumer drops because it has seen their id.
        leaks: what the daemon holds too much of, in words.
        recovery: seconds to ready, one per disturbance that ended readiness.
        failure: what broke the run itself.
        example: a row that differs, as it is and as it should be.
    """

    lost: int = 0
    differing: int = 0
    missing: int = 0
    duplicates: int = 0
    copies: int = 0
    leaks: str = ""
    recovery: list[float] = field(default_factory=list)
    failure: str = ""
    example: str = ""

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        wrong = self.lost or self.differing or self.missing or self.duplicates
        return not (wrong or self.leaks or self.failure)


def compared(calm: Outcome, wild: Outcome) -> Verdict:
    """What is wrong with a run, by what an undisturbed one left behind."""
    found = Verdict(recovery=wild.recovery)
    for table, rows in calm.facts.items():
        expected, there = set(rows), set(wild.facts[table])
        found.lost += len(expected - there)
        if expected ^ there and not found.example:
            pair = [*sorted(there - expected)[:1], *sorted(expected - there)[:1]]
            found.example = f"{table}: " + " | ".join(row[:600] for row in pair)
        found.differing += len(expected ^ there) + abs(len(wild.facts[table]) - len(there))
    found.missing = len(set(calm.sent) - set(wild.sent))
    found.duplicates = sum(len(bodies) > 1 for bodies in wild.contents.values())
    found.duplicates += len(set(wild.sent) - set(calm.sent))
    found.copies = len(wild.sent) - len(set(wild.sent))
    for what, has, may in (
        ("threads", wild.threads, calm.threads + _MORE_THREADS),
        ("files", wild.files, calm.files + _MORE_FILES),
        ("bytes", wild.memory, calm.memory + _MORE_BYTES),
    ):
        if has > may:
            found.leaks += f"{has} {what}, at most {may} expected; "
    return found


@dataclass
class Table:
    """The verdicts, by fault and database."""

    rows: dict[tuple[str, str], list[Verdict]] = field(default_factory=dict)

    def add(self, fault: str, database: str, verdict: Verdict) -> None:
        """One run."""
        self.rows.setdefault((fault, database), []).append(verdict)

    def lines(self) -> list[str]:
        """As docs/reliability.md shows it."""
        every = [one for found in self.rows.values() for one in found]
        body = [self._line(*key, found) for key, found in self.rows.items()]
        head = (*_COLUMNS, "recovery s, worst")
        return [_row(head), _row("---" for _ in head), *body, self._line("all", "", every)]

    @staticmethod
    def _line(fault: str, database: str, found: Sequence[Verdict]) -> str:
        recovery = [seconds for one in found for seconds in one.recovery]
        counts = (
            len(found),
            sum(one.lost for one in found),
            sum(one.differing for one in found),
            sum(one.missing for one in found),
            sum(one.duplicates for one in found),
            sum(one.copies for one in found),
            sum(bool(one.leaks) for one in found),
            sum(bool(one.failure) for one in found),
        )
        worst = f"{max(recovery):.2f}" if recovery else "-"
        return _row((fault, database, *(str(one) for one in counts), worst))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
