"""Write the pages that are made from the code: ``python -m docs.generate [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from docs.measured import PLACES
from oodmon.cli.catalog import rows_of
from oodmon.cli.markdown import entries, overview

FOLDER = Path(__file__).resolve().parent


def detectors() -> str:
    """docs/detectors.md: the built-in detectors, in the places that the template leaves."""
    rows = [row for row in rows_of("detectors") if row.get("module", "").startswith("oodmon.")]
    return _filled("detectors.md", {"{{overview}}": overview(rows), "{{entries}}": entries(rows)})


def acceptance() -> str:
    """docs/acceptance.md: what the acceptance experiments measured."""
    return _filled("acceptance.md", {})


def _filled(name: str, made: Mapping[str, str]) -> str:
    """The template of this page with what was made, and the tables of what was measured."""
    page = (FOLDER / "templates" / name).read_text(encoding="utf-8")
    made = {**made, **{place: table() for place, table in PLACES[name].items()}}
    for place, text in made.items():
        if page.count(place) != 1:
            raise ValueError(f"templates/{name}: {place} is there {page.count(place)} times")
        page = page.replace(place, text)
    return page.rstrip() + "\n"


PAGES = {"detectors.md": detectors, "acceptance.md": acceptance}
"""File in this folder → what makes it."""


def main() -> int:
    """Write every page, or with --check tell those that would change."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check = parser.parse_args().check
    outdated = []
    for name, made in PAGES.items():
        path, text = FOLDER / name, made()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if outdated:
        print(f"{'outdated' if check else 'written'}: {', '.join(outdated)}")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
