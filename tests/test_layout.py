"""The layout: imports run one way, files and functions stay small, every knob is explained."""

import ast
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import write_base_config

from transformer.config import RunConfig, sections

ROOT = Path(__file__).parent.parent
# Each imports only what stands before it, and files of its own folder.
ORDER = (
    "errors files knobs plugins renamed console",
    "parallel",
    "modules",
    "loss metrics",
    "data",
    "inference",
    "training",
    "config",
    "workdir",
    "run run_training averaging",
    "cli",
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
FOLDERS = [path.parent for path in sorted(ROOT.glob("transformer/*/__init__.py"))]
# The most lines of a folder, lowered whenever one shrinks; the goals are 7,500, 4,500, 9,000 and
# 22,500 in all.
BUDGETS = {"transformer": 11_371, "scripts": 5_368, "tests": 10_519, "": 28_494}
CONFIGS = [RunConfig, *sections(RunConfig).values()]


def tracked(folder=""):
    """The Python files of a folder."""
    if not (ROOT / ".git").exists():  # in a copy of the tree
        return sorted((ROOT / folder).rglob("*.py"))
    words = ("git", "ls-files", "--cached", "--others", "--exclude-standard", f"{folder}*.py")
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).exists()]


def imported(tree):
    """The modules of this package that a file imports when it is run, as `data.toy`."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            base = node.module or ""
            names = [alias.name for alias in node.names] if base == "transformer" else [""]
            for name in names:
                package, _, rest = f"{base}.{name}".strip(".").partition(".")
                if package in ("transformer", "lab", "scripts"):
                    yield package, rest


def test_imports_run_one_way():
    wrong = []
    for path in tracked("transformer/"):
        own = path.relative_to(ROOT / "transformer").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in RANK, f"name {own} in ORDER"
        for package, module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            other = module.split(".")[0]
            inside = package == "transformer" and other in RANK
            alike = inside and own in ORDER[RANK[other]].split()
            if package != "transformer" or (inside and RANK[other] >= RANK[own] and not alike):
                wrong.append(f"{path.relative_to(ROOT)} imports {package}.{module}")
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_it_holds_and_what_it_may_import(folder):
    assert folder.name in RANK
    (docstring,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert "mports" in ast.literal_eval(docstring.value)


def test_files_and_functions_are_small():
    large = []
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            large.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.name != "base.py":
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    large.append(f"{node.name} in {path.relative_to(ROOT)} has {lines} lines")
    assert not large


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_stays_in_its_budget(folder):
    paths = tracked(f"{folder}/" if folder else "")
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in paths) <= BUDGETS[folder]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_knob_has_a_comment(config):
    comments = write_base_config.comments(config)
    for knob in fields(config):
        assert comments[knob.name] or is_dataclass(knob.default_factory), knob.name


def test_the_base_config_shows_every_knob():
    remedy = "run python scripts/write_base_config.py"
    assert write_base_config.BASE.read_text() == write_base_config.base_config(), remedy


# What the standard library documents as to be assigned, or to be called in spite of its name.
DOCUMENTED = {"sys.unraisablehook", "sys.argv", "sys.stdout", "sys.stderr", "os._exit"}


def test_nothing_is_assigned_into_a_library_and_no_private_attribute_of_one_is_used():
    wrong = []
    for path in tracked():
        if "tests" in path.relative_to(ROOT).parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        names = [(alias.asname or alias.name) for node in imports for alias in node.names]
        modules = {name.split(".")[0] for name in names}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            private = private or isinstance(node.ctx, ast.Store)
            name = ast.unparse(node)
            if node.value.id in modules and private and name not in DOCUMENTED:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong
