"""The documentation names files, options and sections that exist."""

import re

import pytest

from tests.test_layout import ROOT
from transformer.config import default_config, flat_knobs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KNOBS = flat_knobs(default_config()).keys()
FOLDERS = ("configs", "docs", "notebooks", "scripts", "tests", "transformer")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|md|toml|ipynb|png|sh)\b")
COMMAND = re.compile(r"(?m)\bpython ((?:scripts/|train|eval)[\w/]*\.py (?:[^`\n]*\\\n)*[^`\n]*)")
CREATED = {"configs/ablations/NAME.py"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def paragraphs(page):
    """The paragraphs of a page that do not cite an earlier commit."""
    found = re.split(r"(?<!:)\n\n|\n(?=\| )", page.read_text(encoding="utf-8"))
    return [each for each in found if not re.search("commit [0-9a-f]{7}", each)]


def anchors(path):
    """The anchors of the titles of a page."""
    titles = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pages
def test_the_files_that_a_page_names_exist(page):
    made = CREATED | set(re.findall(r"```python\n# (\S+)", page.read_text(encoding="utf-8")))
    for name in {name for each in paragraphs(page) for name in FILE.findall(each)} - made:
        assert (ROOT / name).exists(), name


@pages
def test_the_options_that_a_page_names_exist(page):
    for each in paragraphs(page):
        for name in re.findall(r"--config\.([a-z_][\w.]*\w)", each):
            assert name in KNOBS, name


@pages
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, section = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not section or section in anchors(path), target


@pages
def test_the_flags_of_a_command_exist(page):
    shared = (ROOT / "transformer/cli.py").read_text()
    for command in COMMAND.findall("\n\n".join(paragraphs(page))):
        program, _, words = re.sub(r"--command='[^']*'", "--command", command).partition(" ")
        text = (ROOT / program).read_text() + shared
        for flag in re.findall(r"--(\w+)(?!\w*\.)\b", words):
            assert re.search(rf'"(?:--)?{flag}"', text), command


@pages
def test_the_tests_that_a_page_selects_exist(page):
    for file, word in re.findall(r"(tests/\w+\.py) -k (\w+)", "\n".join(paragraphs(page))):
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), (file, word)


def test_the_options_page_lists_every_option():
    text = (ROOT / "docs/options.md").read_text()
    for knob in KNOBS:
        assert re.search(rf"\b{knob.split('.')[-1]}\b", text), knob
