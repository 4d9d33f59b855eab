import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layout import ROOT, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def others(requirements):
    """Those that are not an extra of this package itself, and what such an extra holds."""
    for wanted in map(Requirement, requirements):
        own = wanted.name == PROJECT["name"]
        extras = [others(EXTRAS[extra]) for extra in wanted.extras] if own else [[wanted]]
        yield from itertools.chain(*extras)


def test_every_version_is_bounded_on_both_sides():
    for requirements in (PROJECT["dependencies"], *EXTRAS.values()):
        for wanted in others(requirements):
            assert {each.operator for each in wanted.specifier} == {">=", "<"}, wanted


def pinned():
    """Name → the requirements that constraints.txt has for it."""
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    found = defaultdict(list)
    for entry in re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split("--hash=")
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes)
        pin = Requirement(requirement.strip())
        assert [each.operator for each in pin.specifier] == ["=="]
        found[canonicalize_name(pin.name)].append(pin)
    return found


def test_the_constraints_hold_each_dependency_with_hashes_and_no_address():
    pins = pinned()
    for wanted in others((*PROJECT["dependencies"], *EXTRAS["test"])):
        own = pins[canonicalize_name(wanted.name)]
        versions = [each.version for pin in own for each in pin.specifier]
        assert versions, wanted
        assert all(map(wanted.specifier.contains, versions)), wanted


def test_a_python_finds_one_version_of_each():
    linux = {"sys_platform": "linux", "platform_system": "Linux"}
    for python in ("3.11", "3.12", "3.13", "3.14"):
        version = {"python_version": python, "python_full_version": f"{python}.0"}
        environment = default_environment() | linux | version
        for name, pins in pinned().items():
            fitting = [pin for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
            assert len(fitting) <= 1, (name, python)
    assert sum(not pin.marker for each in pinned().values() for pin in each) > 30


IMPORTED = """
import os, site, sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
sys.path[1:] = [p for p in sys.path[1:] if not os.path.exists(f"{p}/transformer/__init__.py")]
site.addsitedir(sys.argv[1])
import transformer
print(transformer.load, transformer.__file__)
"""


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_an_installed_package_wins_beside_a_clone_of_its_name(kind, tmp_path):
    """From the folder of the clone, whose own name is that of the package."""
    for name in ("transformer", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "transformer" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "transformer")
    build = f"from setuptools.build_meta import *; build_{kind}({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", build]
    subprocess.run(command, cwd=tmp_path / "transformer", check=True, capture_output=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    installed = {path.name for path in site.iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert installed == (set() if kind == "editable" else {"transformer"})
    command = [sys.executable, "-c", IMPORTED, str(site)]
    out = subprocess.check_output(command, cwd=tmp_path, text=True)
    home = tmp_path / "transformer" if kind == "editable" else site
    assert out.split()[-1] == str(home / "transformer" / "__init__.py")
    assert (home / "transformer" / "py.typed").exists()


def without_encoding(tree):
    """The calls that open a text file in the locale's encoding."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, call = ast.unparse(node.func), ast.unparse(node)
        opens = re.search(r"\b(?<!os\.)(?<!gzip\.)((read|write)_text|(fd)?open)$", function)
        if opens and not re.search(r"encoding=|'[rwax+]*b[rwax+]*'", call):
            yield call


def test_files_are_utf_8_whatever_the_locale():
    files = {path: tree for path, (tree, _) in tracked().items() if path.parts[0] != "tests"}
    found = {path: [*without_encoding(tree)] for path, tree in files.items()}
    assert {path: calls for path, calls in found.items() if calls} == {}
    assert [*without_encoding(ast.parse("path.open('w'); a.read_text()"))]
