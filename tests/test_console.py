import re
import subprocess
import sys

import pytest
from rich.console import Console

from transformer.console import facts, status, table
from transformer.metrics import figure
from transformer.parallel.replicas import format_replicas
from transformer.training.loop import ProgressBar

PROGRAM = """
import sys
from transformer.console import console, tolerate_closed_output

tolerate_closed_output()
for _ in range(2):
    print("printed")
    console.print("shown")
print("said", file=sys.stderr)
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("closed", [("stdout",), ("stdout", "stderr")], ids=len)
def test_a_program_goes_on_when_nobody_reads_what_it_prints(closed, tmp_path):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "result")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        for name in closed:  # before anything is printed
            getattr(process, name).close()
        said = "" if "stderr" in closed else process.stderr.read()
    assert process.returncode == 0, said
    assert (tmp_path / "result").exists()
    if said:
        assert re.fullmatch("standard output is closed: .*\nsaid\n", said)


def test_a_narrow_terminal_shows_whole_figures(capsys, monkeypatch):
    for width, shown in ((60, "│ 1,234.5678 │"), (20, "  perplexity: 1,234.5678")):
        terminal = Console(force_terminal=True, width=width, soft_wrap=True, highlight=False)
        monkeypatch.setattr("transformer.console.console", terminal)
        table("title", ("length", "perplexity", "right"), [("1", "1,234.5678", "100.00%")])
        assert shown in capsys.readouterr().out


def test_a_table_in_a_file_is_as_wide_as_its_words_and_brackets_are_text(capsys):
    columns = [f"a column of many words, {k}" for k in range(8)]
    table("wide", columns, [columns])
    lines = capsys.readouterr().out.splitlines()
    (heading, row) = (line for line in lines if "words" in line)
    assert all(name in line for line in (heading, row) for name in columns)
    assert lines[0].strip() == "wide"
    table("", ("split", "right"), [("train[:10%]", "1 [0, 2]")])
    facts({"split": "train[:10%]"})
    shown = capsys.readouterr().out
    assert (shown.count("train[:10%]"), shown.count("1 [0, 2]")) == (2, 1)  # no markup


def test_figures_have_four_digits_or_commas_and_of_a_population_the_mean_with_the_range():
    written = [figure(x) for x in (0.123456, 12.3456, 999.96, 1000.4, 1234567.0)]
    assert written == ["0.1235", "12.35", "1000", "1,000", "1,234,567"]
    values = [1.0, 4.0, 1.0]
    assert format_replicas(values, "{:.1f}".format) == "2.0 (1.0–4.0)"
    assert format_replicas(values[:1], "{:.1f}".format) == "1.0"


def test_nothing_takes_long_without_a_word(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("transformer.console.time.monotonic", lambda: now[0])
    monkeypatch.setattr("transformer.console.time.perf_counter", lambda: now[0])
    with status("compiling", "compiled"):
        assert capsys.readouterr().out == "compiling …\n"
        now[0] = 7.0
    assert capsys.readouterr().out.split() == ["compiled", "in", "7.0", "s"]
    with ProgressBar(0, 1_000) as bar:
        for step in range(1, 101):  # of a second each
            now[0] += 1.0
            bar.show_step(step)
    assert capsys.readouterr().out.splitlines() == [f"step {n}/1000" for n in (31, 62, 93)]
