"""The shape of the source: the README's tree is true, files and functions are short, no data is unpickled or evaluated.

The tree is a fenced block in README.md below the heading "## Where things are". Each of its lines is a path relative to
the repository's root, two or more spaces, and a phrase; folders end with `/`; empty lines are allowed:

    src/liftlm/config.py   all settings
    tests/                 mirrors src
"""

from __future__ import annotations

import ast
import fnmatch
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import liftlm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "liftlm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60


def each_source(function: object) -> object:
    return pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))(function)


# --- the README's tree ------------------------------------------------------------------------------------------------


def read_tree(readme: str) -> dict[str, str]:
    """Path → phrase."""
    heading = re.search(r"^## Where things are[ \t]*$", readme, flags=re.MULTILINE)
    assert heading, 'README.md has no heading "## Where things are"'
    section = re.split(r"^#{1,2} ", readme[heading.end() :], flags=re.MULTILINE)[0]
    block = re.search(r"^```\w*\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert block, 'README.md has no fenced block below "## Where things are"'
    tree: dict[str, str] = {}
    for line in block.group(1).splitlines():
        path, gap, phrase = line.strip().partition("  ")
        if path:
            assert gap and phrase.strip(), f"no phrase after two spaces: {line!r}"
            assert path not in tree, f"listed twice: {path}"
            tree[path] = phrase.strip()
    return tree


def expected_paths() -> set[str]:
    """Every module with code in it, and every folder at the top that holds files and is not ignored."""
    ignored = [line.strip("/ ") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir()
        and path.name != ".git"
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
        and any(inner.is_file() for inner in path.rglob("*"))
    }
    return folders | {path.relative_to(ROOT).as_posix() for path in SOURCES if path.stat().st_size}


def test_tree_in_the_readme_is_complete_and_true() -> None:
    tree = read_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    missing = sorted(expected_paths() - tree.keys())
    assert not missing, f"not in the README's tree: {missing}"
    for path in tree:
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"in the README's tree, but not there: {path}"


def test_tree_format() -> None:
    text = "# T\n\n## Where things are\n\nWords.\n\n```text\na/b.py   one  two\n\n  docs/  pages\n```\n\n## Next\n"
    assert read_tree(text) == {"a/b.py": "one  two", "docs/": "pages"}
    for wrong in ("a.py one space", "a.py", "a.py  x\na.py  y"):
        with pytest.raises(AssertionError):
            read_tree(f"## Where things are\n```\n{wrong}\n```\n")
    for wrong in ("## Elsewhere\n```\na  b\n```", "## Where things are\n## Next\n```\na  b\n```"):
        with pytest.raises(AssertionError):
            read_tree(wrong)


# --- size -------------------------------------------------------------------------------------------------------------


@each_source
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"


@each_source
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))


# --- nothing runs or unpickles what it reads --------------------------------------------------------------------------


def forbidden_uses(text: str) -> list[str]:
    """What could run code hidden in data, by any way of importing it."""
    found = []
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    switches = {"trust_remote_code", "allow_pickle", "shell"}  # which may only be off
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {("torch", "load"), ("yaml", "load"), ("yaml", "load_all"), ("yaml", "unsafe_load"), ("numpy", "load")}
    attributes |= {("yaml", "full_load"), ("np", "load"), ("builtins", "eval"), ("builtins", "exec")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").partition(".")[0]
            found += [top] if top in modules else [n.name for n in node.names if (node.module, n.name) in attributes]
        elif isinstance(node, ast.Name) and node.id in calls:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if (node.value.id, node.attr) in attributes else []
        elif isinstance(node, ast.keyword) and node.arg in switches:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if off else [node.arg]
    return found


@each_source
def test_no_data_is_unpickled_or_evaluated(path: Path) -> None:
    assert forbidden_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "f = torch.load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=trusted)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_finds(text: str) -> None:
    assert forbidden_uses(text)


def test_the_scan_lets_pass() -> None:
    harmless = "network.eval()\nyaml.safe_load(text)\nfile.load()\nre.compile('a')\nload(x, trust_remote_code=False)"
    assert forbidden_uses(harmless) == []


def test_one_file_imports_ray() -> None:
    importing = re.compile(r"^\s*(?:import|from) ray\b", re.MULTILINE)
    found = [path.name for path in SOURCES if importing.search(path.read_text(encoding="utf-8"))]
    assert found == ["cluster.py"]


# --- importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["liftlm", "liftlm.cli", "liftlm.config", "liftlm.documents", "liftlm.examples"])
def test_importing_does_not_load_torch(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "accelerate"]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve_whatever_was_imported_before() -> None:
    for module in pkgutil.walk_packages(liftlm.__path__, "liftlm."):
        if module.name != "liftlm.__main__":  # which runs the command line
            importlib.import_module(module.name)
    for name in liftlm.__all__:
        value = getattr(liftlm, name)
        assert callable(value) and value.__name__ == name, name
        assert value.__module__.startswith("liftlm.")
    assert liftlm.absorb is importlib.import_module("liftlm.absorbing").absorb
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        liftlm.nonsense  # noqa: B018


def test_names_for_type_checkers_are_the_names_at_run_time() -> None:
    """They stand in two places in liftlm/__init__.py."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == set(liftlm.__all__)
