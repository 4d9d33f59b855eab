import re

import pytest

from tests.test_layout import ROOT
from transformer.config import default_config, flat_knobs

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCS}
KNOBS = flat_knobs(default_config()).keys()
FOLDERS = ("configs", "docs", "notebooks", "scripts", "tests", "transformer")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|md|toml|ipynb|png|sh)\b")
COMMAND = re.compile(r"(?m)\bpython ((?:scripts/|train|eval)[\w/]*\.py (?:[^`\n]*\\\n)*[^`\n]*)")
pages = pytest.mark.parametrize("page", TEXTS)


def paragraphs(page):
    """What a page says, but for paragraphs and table rows that cite an earlier commit."""
    found = re.split(r"(?<!:)\n\n|\n(?=\| )", TEXTS[page])
    return "\n\n".join(each for each in found if not re.search("commit [0-9a-f]{7}", each))


@pages
def test_the_files_options_and_tests_that_a_page_names_exist(page):
    made = {"configs/ablations/NAME.py", *re.findall(r"```python\n# (\S+)", TEXTS[page])}
    names = set(FILE.findall(paragraphs(page))) - made
    assert not [name for name in names if not (ROOT / name).exists()]
    assert set(re.findall(r"--config\.([a-z_][\w.]*\w)", paragraphs(page))) <= KNOBS
    for file, word in re.findall(r"(tests/\w+\.py) -k (\w+)", paragraphs(page)):
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), (file, word)


@pages
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXTS[page]):
        file, _, section = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        titles = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8") if section else "")
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not section or section in anchors, target


@pages
def test_the_flags_of_a_command_exist(page):
    shared = (ROOT / "transformer/cli.py").read_text()
    for command in COMMAND.findall(paragraphs(page)):
        program, _, words = re.sub(r"--command='[^']*'", "--command", command).partition(" ")
        text = (ROOT / program).read_text() + shared
        for flag in re.findall(r"--(\w+)(?!\w*\.)\b", words):
            assert re.search(rf'"(?:--)?{flag}"', text), command


def test_the_options_page_lists_every_option():
    text = (ROOT / "docs/options.md").read_text()
    assert not [k for k in KNOBS if not re.search(rf"\b{k.split('.')[-1]}\b", text)]
