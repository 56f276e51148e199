"""What the code never does: held against every file by reading its syntax tree."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for folder in (ROOT / "oodmon", *sorted((ROOT / "plugins").glob("*/src")), ROOT / "plugins")
    for path in sorted(folder.rglob("*.py"))
    if "tests" not in path.relative_to(ROOT).parts and "build" not in path.parts
]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
              "jsonpickle"}  # fmt: skip
EVALUATORS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "torch.load", "torch.jit.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "np.fromstring", "numpy.load", "tempfile.mktemp",
    "ssl._create_unverified_context", "xml.etree.ElementTree.parse",
}  # fmt: skip


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(parsed(path))


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def violations(path: Path) -> list[str]:
    """What a file does that no file may."""
    found = []
    for node in nodes(path):
        line = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [f"{line} imports {name}" for name in names if name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNPICKLERS:
                found.append(f"{line} imports {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in EVALUATORS or called in FORBIDDEN_CALLS:
                found.append(f"{line} calls {called}")
            if called == "np.load" and options.get("allow_pickle") != "False":
                found.append(f"{line} calls np.load without allow_pickle=False")
            if options.get("shell", "False") != "False":
                found.append(f"{line} starts a shell")
            if options.get("verify") == "False" or options.get("check_hostname") == "False":
                found.append(f"{line} does not verify certificates")
            if called.startswith("yaml.") and options.get("Loader", "yaml.SafeLoader") not in (
                "yaml.SafeLoader",
                "yaml.CSafeLoader",
            ):
                found.append(f"{line} reads YAML with {options['Loader']}")
        elif isinstance(node, ast.Attribute) and node.attr == "CERT_NONE":
            found.append(f"{line} does not verify certificates")
    return found


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert len(FILES) > 100
    assert not [found for path in FILES for found in violations(path)]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.compose(text, Loader=yaml.FullLoader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "requests.get(url, verify=False)",
        "context.verify_mode = ssl.CERT_NONE",
    ],
)
def test_the_reader_of_the_code_sees(code: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert violations(path)


# SQL ---------------------------------------------------------------------------------------------

# Texts made at run time of the program's own constants only: file → names that stand for them.
OWN_CONSTANTS = {
    "schema.py": {"name", "statement", "VERSION_TABLE"},
    "database.py": {"pragma"},
    "retention.py": {"step", "name"},
}


def made_up_sql(path: Path) -> list[str]:
    """SQL texts that hold anything but literals and the program's own constants."""
    found = []
    for node in nodes(path):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        if called not in ("text", "exec_driver_sql", "execute", "executemany", "executescript"):
            continue
        first = node.args[0]
        if isinstance(first, ast.JoinedStr):
            parts = [
                ast.unparse(p.value) for p in first.values if isinstance(p, ast.FormattedValue)
            ]
            own = OWN_CONSTANTS.get(path.name, set())
            found += [f"{path.name}:{node.lineno}: {p}" for p in parts if p not in own]
        elif isinstance(first, ast.BinOp) or (
            isinstance(first, ast.Call) and ast.unparse(first.func).endswith(".format")
        ):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(first)}")
    return found


def test_sql_is_parametrised() -> None:
    files = sorted((ROOT / "oodmon").rglob("*.py"))
    assert not [found for path in files for found in made_up_sql(path)]


@pytest.mark.parametrize(
    "code",
    [
        "connection.execute(text(f\"SELECT '{user}'\"))",
        "cursor.execute('SELECT ' + user)",
        "cursor.execute('SELECT %s' % user)",
        "cursor.execute('SELECT {}'.format(user))",
    ],
)
def test_made_up_sql_is_seen(code: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert made_up_sql(path)


def test_signatures_are_compared_in_constant_time() -> None:
    for name, function in (("sinks/webhook.py", "verify"), ("secret.py", "__eq__")):
        tree = ast.parse((ROOT / "oodmon" / name).read_text())
        body = next(
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == function
        )
        assert "compare_digest" in body, f"{name}: {function}"
