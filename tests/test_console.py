"""What a run shows, where there is no terminal: a file, a pipe, a test."""

from transformer.console import facts, figure, over_replicas, table


def test_a_table_in_a_file_is_as_wide_as_its_words(capsys):
    columns = [f"a column of many words, {k}" for k in range(8)]
    table("wide", columns, [columns])
    lines = capsys.readouterr().out.splitlines()
    (heading, row) = (line for line in lines if "words" in line)
    assert all(name in line for line in (heading, row) for name in columns)
    assert lines[0].strip() == "wide"


def test_brackets_are_text_and_no_markup(capsys):
    table("", ("split", "right"), [("train[:10%]", "1 [0, 2]")])
    facts({"split": "train[:10%]"})
    shown = capsys.readouterr().out
    assert shown.count("train[:10%]") == 2
    assert "1 [0, 2]" in shown


def test_figures_have_four_digits_or_commas():
    written = [figure(x) for x in (0.123456, 12.3456, 999.96, 1000.4, 1234567.0)]
    assert written == ["0.1235", "12.35", "1000", "1,000", "1,234,567"]


def test_a_metric_of_a_population_is_its_mean_with_the_range():
    metrics = [{"loss": 1.0}, {"loss": 4.0}, {"loss": 1.0}]
    assert over_replicas(metrics, "loss", "{:.1f}".format) == "2.0 (1.0–4.0)"
    assert over_replicas(metrics[:1], "loss", "{:.1f}".format) == "1.0"
