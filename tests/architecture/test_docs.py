"""What the pages name exists: commands, their options, make words, files, metrics, config keys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from oodmon.cli.program import Program, main
from oodmon.config.parse import load
from oodmon.daemon.metrics import METRICS, SERIES
from oodmon.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "plugins").glob("*/README.md"),
        *(ROOT / "deploy").glob("**/*.md"),
        *(ROOT / "oodmon" / "cli").glob("start.py"),
        *(ROOT / "examples").glob("*.yaml"),
    )
    if "templates" not in path.parts  # parts of a page that is made, and is here itself
)
NAMES: Final = [str(path.relative_to(ROOT)) for path in PAGES]
MADE: Final = ("bench-output", "demo-output", ".venv", "docs/adr/NNNN")
RECORDED: Final = frozenset({"oodmon_example_detector"})  # names that are no metrics
FILES: Final = re.compile(
    r"`((?:oodmon|tests|docs|deploy|benchmarks|examples|plugins)/[\w./<>*-]+)`"
)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
FENCE: Final = re.compile(r"```(\w*)[^\n]*\n(.*?)```", re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def verb_of(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that these words call, and the words after it; none where a word is no verb."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            return command, words
        found = command.get_command(context, words[0])
        if found is None:
            return None
        command, words = found, words[1:]
    return command, words


def calls(text: str) -> Iterator[list[str]]:
    """The words of every call of the program: in code spans, and at the start of a fenced line."""
    spans = re.findall(r"`(oodmon [^`\n]+)`", text)
    lines = [
        line.removeprefix("$ ").strip()
        for _, block in FENCE.findall(text)
        for line in block.splitlines()
    ]
    for span in [*spans, *(line for line in lines if line.startswith("oodmon "))]:
        bare = span.partition(" # ")[0].partition("   ")[0]
        try:
            words = [word for word in shlex.split(bare)[1:] if word != "--debug"]
        except ValueError:
            continue
        if words and not re.fullmatch(r"[A-Z…]+", words[0]):
            yield words


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in calls(page.read_text()):
        found = verb_of(words)
        assert found is not None, f"oodmon {' '.join(words)}: no such command"
        command, rest = found
        known = {"--help", "--version", "-h"} | {
            name for option in command.params for name in (*option.opts, *option.secondary_opts)
        }
        for word in rest:
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", name):
                assert name in known, f"oodmon {' '.join(words)}: no option {name}"


def test_every_verb_stands_on_its_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert isinstance(main, Program)
    for verb in main.list_commands(click.Context(main)):
        assert f"`{verb}" in page, verb


@pages
def test_make_words_exist(page: Path) -> None:
    words = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
        assert word in words, f"make {word}"


@pages
def test_files_exist(page: Path) -> None:
    for name in FILES.findall(page.read_text()):
        if "<" in name or name.startswith(MADE):
            continue
        assert list(ROOT.glob(name.rstrip("/"))), name


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http:", "https:", "mailto:")) or page.suffix != ".md":
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What a heading is linked by."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads]
    return set(plain) | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pages
def test_metrics_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`(oodmon_[a-z0-9_]+)", text):
        assert name in SERIES | METRICS.keys() | RECORDED, name


@pages
def test_configs_in_the_pages_have_no_unknown_key(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "oodmon.yaml"
    blocks = [block for kind, block in FENCE.findall(page.read_text()) if kind == "yaml"]
    for block in blocks:
        if not re.match(r"(#.*\n)*(model|agent|daemon):", block):
            continue
        file.write_text(block)
        try:
            load(str(file), "both")
        except ConfigError as error:
            # A page shows a part: what is missing there is not wrong.
            wrong = [p for p in error.problems if "unknown" in p or "nothing is called" in p]
            assert not wrong, block


def test_the_checks_see_what_is_wrong() -> None:
    assert verb_of(["repot", "oodmon.yaml"]) is None
    (words,) = calls("run `oodmon report --colour oodmon.yaml`")
    found = verb_of(words)
    assert found is not None
    assert "--colour" not in {name for option in found[0].params for name in option.opts}
    assert list(calls("```\n$ oodmon events dead x.yaml   # what\n```")) == [
        ["events", "dead", "x.yaml"]
    ]
    assert anchors("## HTTP intake\n") == {"http-intake"}
