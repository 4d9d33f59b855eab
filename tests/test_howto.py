"""The how-tos of docs/howto.md, applied to a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.test_layout import ROOT

TEXT = (ROOT / "docs/howto.md").read_text()
SECTIONS = dict(re.findall(r"(?ms)^## (.+?)\n(.+?)(?=^## |\Z)", TEXT))
BLOCK = re.compile(r"(?ms)^```python\n# (\S+)\n(.+?)^```\n")
TABLE = re.compile(r"(?ms)^(\w+) = \{\n    \.\.\.\n(.+?)^\}\n")


def apply(block, folder):
    """Writes a block into the file that it names, as a reader would."""
    name, code = block
    path = folder / name
    if not path.exists():
        path.write_text(code)
        return
    text = path.read_text()
    table = TABLE.search(code)
    assert table, f"{name}: the block has no table"
    entries, above = table[2], code[: table.start()]
    text, count = re.subn(
        rf"(?m)^{table[1]}\b[^\n]*= \{{", lambda found: f"{above}\n{found[0]}\n{entries}", text
    )
    assert count == 1, f"{name} has no table {table[1]}"
    path.write_text(text)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_recipe_is_short(title):
    lines = [line for line in SECTIONS[title].splitlines() if line and not line.startswith("```")]
    assert len(lines) <= 15


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with every recipe applied."""
    folder = tmp_path_factory.mktemp("howto")
    for name in ("transformer", "configs", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for section in SECTIONS.values():
        for block in BLOCK.findall(section):
            apply(block, folder)
    return folder


def run(tree, *command):
    """Runs Python in the copy."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
