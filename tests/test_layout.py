import ast
import re
import subprocess
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import write_base_config

from transformer.config import RunConfig, sections

ROOT = Path(__file__).parent.parent
# Each imports only what stands before it, and files of its own folder.
ORDER = """
errors files knobs renamed console testing | parallel | modules | loss metrics | data | inference |
training | config | workdir | init_from run run_training averaging | interop | cli | __init__
"""
RANK = {name: rank for rank, names in enumerate(ORDER.split("|")) for name in names.split()}
FOLDERS = {path.parent.name: path for path in sorted(ROOT.glob("transformer/*/__init__.py"))}
# The most lines of a folder, lowered whenever one shrinks; the goals are 7,500, 4,500, 9,000 and
# 22,500 in all.
BUDGETS = {"transformer": 12_815, "scripts": 5_613, "tests": 14_297, "": 34_425}
# What its library documents as to be assigned, or to be called in spite of its name. sys.name is
# `setattr(sys, name, …)` of standard output and error.
DOCUMENTED = re.compile(r"sys\.(unraisablehook|argv|stdout|stderr|name)|os\._exit|flags\.FLAGS.*")


@cache
def tracked(folder=""):
    """Path → syntax tree and number of lines of the Python files of a folder."""
    words = ("git", "ls-files", "--cached", "--others", "--exclude-standard", f"{folder}*.py")
    if (ROOT / ".git").exists():
        names = subprocess.check_output(words, cwd=ROOT, text=True).splitlines()
        paths = [ROOT / name for name in names if (ROOT / name).exists()]
    else:  # in a copy of the tree
        paths = sorted((ROOT / folder).rglob("*.py"))
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    return {path: (ast.parse(text), text.count("\n")) for path, text in texts.items()}


def imported(node):
    """What a file imports when it is run: `transformer.data.toy`, and the name that it binds."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            yield base + alias.name, (alias.asname or alias.name).split(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def parts(tree):
    """The files and folders of the library that a file imports, and `scripts` and `lab`."""
    names = [name.split(".") for name, _ in imported(tree)]
    library = {name[1] for name in names if name[0] == "transformer"} & RANK.keys()
    return library | ({name[0] for name in names} & {"scripts", "lab"})


def test_imports_run_one_way():
    wrong = []
    for path, (tree, _) in tracked("transformer/").items():
        own = path.parts[1].removesuffix(".py")
        assert own in RANK, f"name {own} in ORDER"
        later = [other for other in parts(tree) if RANK.get(other, 99) > RANK[own]]
        wrong += [f"{path} imports {other}" for other in later]
    assert not wrong


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_what_it_holds_and_what_it_imports(name):
    (docstring,) = ast.parse(FOLDERS[name].read_text(encoding="utf-8")).body
    _, _, said = ast.literal_eval(docstring.value).partition("mports")
    named = set(re.findall(r"`(?:transformer\.)?(\w+)`", said)) & FOLDERS.keys()
    found = set().union(*(parts(tree) for tree, _ in tracked(f"transformer/{name}/").values()))
    assert found & FOLDERS.keys() - {name} <= named
    assert all(RANK[other] < RANK[name] for other in named)


def test_files_and_functions_are_small():
    large = []
    for path, (tree, lines) in tracked().items():
        functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
        large += [f"{path} has {lines} lines"] if lines > 400 else []
        long = [each.name for each in functions if each.end_lineno - each.lineno > 59]
        large += [f"{name} in {path}" for name in long]
    assert large == ["get_config in configs/base.py"]


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_stays_in_its_budget(folder):
    files = tracked(f"{folder}/" if folder else "").values()
    assert sum(lines for _, lines in files) <= BUDGETS[folder]


def test_the_base_config_shows_every_knob_with_its_comment():
    for config in (RunConfig, *sections(RunConfig).values()):
        comments = write_base_config.comments(config)
        for knob in fields(config):
            assert comments[knob.name] or is_dataclass(knob.default_factory), knob.name
    remedy = "run python scripts/write_base_config.py"
    assert write_base_config.BASE.read_text() == write_base_config.base_config(), remedy


def attributes(tree):
    """Each object and attribute that a file names, and whether the attribute is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr, not isinstance(node.ctx, ast.Load)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("getattr", "setattr", "delattr"):
            target, name, *_ = map(ast.unparse, node.args)
            yield target, name.strip("'"), called != "getattr"


def trespasses(tree):
    """The private names of libraries that a file uses, and what it assigns into libraries."""
    own, private = ("transformer", "lab", "configs", "train"), re.compile(r"_(?!.*__$).*")
    names = {alias: name for name, alias in imported(tree) if name.split(".")[0] not in own}
    yield from (each for each in names.values() if any(map(private.match, each.split("."))))
    for target, name, assigned in attributes(tree):
        path = f"{target}.{name}"
        wrong = (assigned or private.match(name)) and not DOCUMENTED.fullmatch(path)
        yield from [path] if wrong and target.split(".")[0] in names else []


def test_nothing_is_assigned_into_a_library_and_no_private_name_of_one_is_used():
    files = {path: tree for path, (tree, _) in tracked().items() if path.parts[0] != "tests"}
    found = {path: [*trespasses(tree)] for path, tree in files.items()}
    assert {path: names for path, names in found.items() if names} == {}


TRESPASSES = ("x._y", "x.y = 1", "x.y.z = 1", "del x.y", "setattr(x.y, 'z', 1)", "getattr(x, '_y')")


@pytest.mark.parametrize("code", [*TRESPASSES, "import x._y", "from x import _y"])
def test_every_form_of_a_trespass_is_found(code):
    assert len([*trespasses(ast.parse(f"import x\n{code}"))]) == 1
