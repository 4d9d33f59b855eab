"""Evaluation: its numbers, and what eval.py prints, writes and draws."""

import contextlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests import helpers
from tests.helpers import (
    TOKENIZER,
    data_config,
    logits_of,
    program,
    random_params,
    small_model,
    strings,
)
from tests.test_average import files_of, make_run
from transformer import cli
from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers, open_corpus
from transformer.data.tokenizer import EOS, PAD, SymbolTokenizer
from transformer.inference import evaluation, plots
from transformer.inference.decoding import GREEDY, DecodingConfig
from transformer.inference.search import Hypotheses, Sources
from transformer.loss import cross_entropy
from transformer.metrics import METRICS, finalize, token_sums
from transformer.modules.model import Model

# A formula that is none, too much to draw, fields of a TSV file, characters that the font lacks.
PAIRS = [("$18_$", r"$1^\$"), ("k3", "a" * 70), ("a\tb", "c\nd\\"), ("器", "語")]


def write(path, pairs):
    lines = (json.dumps({"source": source, "target": target}) for source, target in pairs)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of `PAIRS` that was never trained, and the folder of its datasets."""
    folder = tmp_path_factory.mktemp("eval")
    file = write(folder / "pairs.jsonl", PAIRS)
    knobs = {"dataset": "files", "train": file, "validation": "train", "test": "train"}
    corpus = open_corpus(data_config(**knobs), str(folder / "data"))
    changes = {f"data.{name}": value for name, value in knobs.items()}
    changes |= {"data.metrics": ("bleu", "exact_match"), "mesh.data": 1, "decode_margin": 6}
    tokenizer, rng = corpus.tokenizers.source, np.random.default_rng(0)
    workdir = make_run(folder / "run", rng, (1,), tokenizer, **changes)[0]
    workdir.write_config(workdir.read_config(), corpus.identity())
    return workdir, folder


def evaluate(run, *words):
    """Runs eval.py in this process."""
    words = (f"--workdir={run[0].path}", f"--data_dir={run[1] / 'data'}", *words)
    set_mesh, stack = jax.set_mesh, contextlib.ExitStack()
    with stack, program("eval.py", *words) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.cli, "set_up_jax", lambda cfg: None)
        patch.setattr(jax, "set_mesh", lambda mesh: stack.enter_context(set_mesh(mesh)))
        module.main()


def test_a_split_or_a_checkpoint_that_there_is_not_is_named(run):
    message = "checkpoint=30: choose one of latest, best, 1$"
    helpers.refused(message, evaluate, run, "--checkpoint=30")
    helpers.refused("'tset' is not a split", evaluate, run, "--split=tset")


def test_an_evaluation_needs_only_the_run_folder_and_does_not_change_it(run, tmp_path, capsys):
    """Its files may be gone and its folder read-only; a text that a picture lacks is a line."""
    (run[1] / "pairs.jsonl").rename(run[1] / "moved.jsonl")
    before = files_of(run[0].path)
    evaluate(run, f"--out={tmp_path}", "--plots=all")
    assert files_of(run[0].path) == before
    record = json.loads((tmp_path / "eval_train.json").read_text())
    assert (record["examples"], record["references_beyond_margin"]) == (4, 1)
    rows = (tmp_path / "samples_train.tsv").read_text(encoding="utf-8").split("\n")
    rows = [row.split("\t")[:2] for row in rows[1:-1]]
    assert rows[0] == ["$18_$", r"$1^\\$"]
    assert rows[2] == [r"a\tb", r"c\nd\\"]
    drawn = {path.name for path in (tmp_path / "plots").glob("attention*cross.png")}
    assert drawn == {f"attention_train_{i}_cross.png" for i in (0, 2, 3)}
    said = " ".join(capsys.readouterr().out.split())
    assert "train: 4 examples" in said
    assert "1 targets are longer; --decode_margin=68 suffices for all" in said
    assert "the font lacks '\\t' '\\n' '器' '語': token numbers are" in said
    assert "drawn for 3 texts of at most 64 tokens" in said
    assert "is not drawn" not in said
    sample = "│ $18_$ │ $1^\\$ │"
    results = f"results {tmp_path}/eval_train.json samples {tmp_path}/samples_train.tsv"
    assert said.index("source length") < said.index(sample) < said.index(results)
    assert said.endswith(f"plots 10 files in {tmp_path}/plots")


def test_another_file_is_evaluated_and_a_failing_plot_is_reported(run, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    words = ("--beam_size=2", "--decode_margin=7", "--bleu_tokenizer=none")
    evaluate(run, f"--data={write(run[1] / 'other.jsonl', PAIRS[:1] * 3)}", *words)
    pattern = "eval_test_beam_size=2_decode_margin=7_data=other.jsonl-*_bleu_tokenizer=none.json"
    (file,) = run[0].path.glob(pattern)
    name, record = file.stem.removeprefix("eval_"), json.loads(file.read_text())
    assert (record["examples"], record["decode_margin"]) == (3, 7)
    assert "|tok:none|" in record["replicas"][0]["text"]["bleu"]["signature"]
    samples = (run[0].path / f"samples_{name}.tsv").read_text().splitlines()[1:]
    (best, score), (other, lower) = (line.split("\t")[2:] for line in samples[:2])
    assert (len(samples), best != other, float(score) > float(lower)) == (3 * 2, True, True)
    said = capsys.readouterr().out
    assert said.count(f"│ {best} ") == 3
    assert said.count("is not drawn (ZeroDivisionError") == 1 + 1
    assert ".png in" not in said
    assert "no reference has 4 tokens" in said
    evaluate(run, "--split=train", "--plots=none")
    assert "is not drawn" not in capsys.readouterr().out


def test_file_names_have_the_settings_that_differ_from_their_defaults(capsys):
    for name, *words in (
        ("test",),
        ("test_checkpoint=best", "--length_penalty=1.0", "--checkpoint=best"),
        ("test_beam_size=4", "--beam_size=4"),
        ("test_temperature=1.0_seed=3", "--temperature=1", "--seed=3"),
        ("test_max_length=9_prefix=98ead2", "--max_length=9", "--prefix=a /"),
        ("test_data=a.de,a.en-012345", "--data=x/a.de, x/a.en"),
    ):
        with program("eval.py", "--workdir=none", *words) as module:
            found = module.file_name(
                "test", cli.decoding(GREEDY), GREEDY, "text_pairs/0123456789/1.0.0"
            )
        assert found == name
    with pytest.raises(SystemExit), program("eval.py"):
        pass
    assert "--workdir is missing; set --workdir=…" in capsys.readouterr().err


def test_file_names_and_flags_start_from_the_settings_of_the_run():
    own = DecodingConfig(beam_size=4, min_length=5, penalty="length")
    for name, *words in (
        ("test",),
        ("test", "--beam_size=4"),
        ("test_beam_size=1", "--beam_size=1"),
        ("test_min_length=0", "--min_length=0"),
        ("test_penalty=gnmt", "--penalty=gnmt", "--nodistinct"),
        ("test_temperature=1.0_beam_size=1", "--temperature=1", "--beam_size=1"),
    ):
        with program("eval.py", "--workdir=none", *words) as module:
            found = cli.decoding(own)
            assert module.file_name("test", found, own, "text_pairs/0123456789/1.0.0") == name
            assert found.penalty == ("gnmt" if "gnmt" in name else "length")
    with program("eval.py", "--workdir=none", "--temperature=1"):
        helpers.refused(
            "sampling excludes beam search: set temperature=0 or beam_size=1", cli.decoding, own
        )


def test_the_limit_of_outputs_names_the_flags_that_lift_it():
    data = Dataset(BATCH.source, BATCH.target_out, 7)  # of 2 to 6 tokens on both sides
    for settings, margin, truncated, beyond, line in (
        ({}, 0, [0], 0, ""),
        ({}, 9, [2, 0], 0, "decode_margin=9): 0 to 2 outputs reached it"),
        (
            {"length_ratio": 0.5},
            1,
            [0],
            4,
            "decode_margin=1, length_ratio=0.5): "
            "4 targets are longer; --decode_margin=3 suffices for all",
        ),
        (
            {"max_length": 4},
            3,
            [0],
            2,
            "decode_margin=3, max_length=4): "
            "2 targets are longer; --decode_margin=3 --max_length=6 suffices for all",
        ),
    ):
        found = evaluation.limit_report(DecodingConfig(**settings), margin, data, truncated)
        assert found == (beyond, line and f"of the outputs' length ({line}")


def test_distinct_samples_are_the_first_of_each_text(tmp_path):
    data = Dataset(BATCH.source[:1], BATCH.target_out[:1], 1)
    rows = [[4, EOS, PAD], [4, PAD, PAD], [5, EOS, PAD], [PAD, PAD, PAD]]
    found = Hypotheses(np.array([rows]), np.array([[-1.0, -2.0, -3.0, -np.inf]], np.float32))
    for distinct, scores in (True, [-1.0, -3.0]), (False, found.scores[0].tolist()):
        path = tmp_path / "samples.tsv"
        evaluation.write_samples(path, Tokenizers(TOKENIZER, TOKENIZER), data, found, distinct)
        lines = path.read_text().splitlines()[1:]
        assert [float(line.split("\t")[3]) for line in lines] == scores


def test_sequence_accuracy_is_exact_match_of_decoded_outputs():
    """The scores of teacher forcing call all sequences right; one output of three is."""
    batch = strings(("ab", "ba"), ("cd", "dc"), ("e", "e"))
    data = Dataset(np.array(batch.source), np.array(batch.target_out), 1)
    tokens = np.where(np.array([[False], [True], [True]]), 7, data.target)
    tokens = np.stack([tokens, data.target], axis=1)  # the second hypothesis is not looked at
    found = Hypotheses(tokens=tokens, scores=np.zeros((3, 2), np.float32))
    totals = dict.fromkeys(("nll", "uniform", "correct", "tokens"), np.array([3.0, 3.0, 2.0]))
    record = evaluation.summarize("test", data, totals, found)
    assert record["outputs_cut"] == 2  # those without an end
    assert record["metrics"]["test/sequence_accuracy"] == pytest.approx(1 / 3)
    assert record["metrics"]["test/token_accuracy"] == 1.0
    names, rows = ("length", "sequences", "sequence_accuracy"), record["by_source_length"]
    assert [[row[name] for name in names] for row in rows] == [[1, 1, 0.0], [2, 2, 0.5]]


def test_a_plot_of_attention_has_queries_down_and_keys_across_and_a_bounded_size(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, dpi, **__: drawn.append((figure, dpi))
    )
    weights = np.random.default_rng(0).random((2, 4, 5))
    queries, keys, shown = ["q", "$r_$", "s"], ["k", "l" * 30], ["k", "l" * 19 + "…"]
    plots.attention([weights], queries, keys, "title", Path("plot.png"))
    axes, _ = drawn[0][0].axes  # and the colours' bar
    texts = {text.get_text(): text for text in axes.texts}
    across, down = (np.array([texts[x].get_position() for x in each]) for each in (shown, queries))
    for panel, head in zip(axes.images, weights, strict=True):
        np.testing.assert_array_equal(panel.get_array(), head[:3, :2])
    left, right, bottom, top = axes.images[-1].get_extent()
    assert ((left < across[:, 0]) & (across[:, 0] < right) & (across[:, 1] > bottom)).all()
    assert ((top < down[:, 1]) & (down[:, 1] < bottom) & (np.diff(down[:, 1], prepend=0) > 0)).all()
    assert not texts["$r_$"].get_parse_math()

    plots.attention([np.ones((16, 30, 30))] * 9, ["q"] * 30, ["k"] * 30, "title", Path("plot.png"))
    figure, dpi = drawn[1]
    assert len(figure.axes[0].images) == 8 * 8
    assert np.prod(figure.get_size_inches()) * dpi**2 < 1.01 * plots.PIXELS
    assert "title, 8 of 9 layers, 8 of 16 heads" in {x.get_text() for x in figure.axes[0].texts}


def test_titles_are_the_text_and_the_run_and_labels_the_tokens(tmp_path, monkeypatch, capsys):
    drawn, words = {}, SymbolTokenizer(["▁big", "dog", "語"], " ")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.update({path: figure}))
    rows = np.array([words.encode("dog ▁big"), words.encode("語 dog")])
    maps = {"cross": [np.full((2, 1, 3, 3), 1 / 3)]}
    rest = lambda _: maps, Dataset(rows, rows, 2), Tokenizers(words, words)
    by_length = [{"length": 2, "token_accuracy": 1.0}]
    plots.draw_evaluation(tmp_path, "x", by_length, *rest, title="mine, test", everything=True)
    titles = ["mine, test", "cross attention: dog ▁big", "cross attention: example 2"]
    accuracy, *attention = (figure.axes[0] for figure in drawn.values())
    assert accuracy.get_title() == titles[0]
    texts = [[text.get_text() for text in axes.texts] for axes in attention]
    assert [each[-1] for each in texts] == titles[1:]
    assert texts[0][1:7] == ["⊢", "dog", "_big", "dog", "_big", "⊣"]
    assert texts[1][1:4] == ["⊢", "#5", "dog"]
    names = "accuracy_by_length_x.png, attention_x_0_cross.png, attention_x_1_cross.png"
    assert f"plots {names} in {tmp_path}" in " ".join(capsys.readouterr().out.split())


def test_a_learning_curve_is_the_mean_and_the_range_of_the_replicas(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    values = (0, 0, 4.0), (1, 0, 2.0), (0, 1, 2.0)  # the second replica ends early
    rows = [{"step": step, "replica": k, "train/loss": loss} for step, k, loss in values]
    plots.learning_curve(rows, tmp_path / "curve.png", "mine_$_1_$")
    (figure,) = drawn
    assert figure.get_suptitle() == "mine_$_1_$"
    line, band = figure.axes[0].lines[0], figure.axes[0].collections[0]
    np.testing.assert_array_equal(line.get_xydata(), [[0, 3.0], [1, 2.0]])
    np.testing.assert_array_equal(band.get_datalim(figure.axes[0].transData).intervaly, [2.0, 4.0])


TEXTS = ("abc", "d", "efgh", "ij", "klmno", "pq", "rst")
BATCH = strings(*((text, text[::-1]) for text in TEXTS))
MODEL = small_model(tie_embeddings="none")
PARAMS = random_params(MODEL, 0)
score = jax.jit(partial(evaluation.score, MODEL, PARAMS))
decode = partial(evaluation.decode, MODEL, PARAMS, max_length=9)
LOGITS = logits_of(MODEL, PARAMS, BATCH)
PREDICTIONS = cross_entropy(LOGITS, BATCH.target_out)


def test_scores_do_not_depend_on_batches():
    losses, asked = PREDICTIONS.nll * BATCH.weights, []
    data = jax.tree.map(np.asarray, Dataset(BATCH.source, BATCH.target_out, 3))
    parts = evaluation.in_batches(score, data, 3, between=lambda: asked.append(1))
    assert len(asked) == 3  # of 7 examples
    for scores in (parts, score(data)):
        np.testing.assert_allclose(scores["nll"], losses.sum(-1), rtol=1e-4)
        np.testing.assert_array_equal(scores["tokens"], [len(text) + 1 for text in TEXTS])


def test_metrics_are_ratios_of_totals():
    totals = {"nll": [2.0, 4.0], "uniform": [6.0, 6.0], "correct": [1.0, 4.0], "tokens": [2.0, 4.0]}
    totals = {name: np.array(each) for name, each in totals.items()}
    totals = dict.fromkeys(token_sums(PREDICTIONS), np.zeros(2)) | totals
    wanted = {"loss": 1.0, "objective": 1.0, "perplexity": np.e}
    wanted |= {"token_accuracy": 5 / 6, "sequence_accuracy": 0.5}
    found = finalize(totals, "test")
    assert found.keys() == {f"test/{name}" for name in METRICS}
    assert {name: found[f"test/{name}"] for name in wanted} == pytest.approx(wanted)
    smoothed = finalize(totals, "test", label_smoothing=0.25)
    assert smoothed["test/objective"] == pytest.approx(0.75 * 1.0 + 0.25 * 2.0)


def test_a_sequence_right_by_teacher_forcing_is_an_exact_match_by_greedy_decoding():
    """Targets are what the model says, of which every other one is changed at some place."""
    outputs = np.asarray(jax.jit(decode)(BATCH.source).tokens)[:, 0]
    target = outputs.copy()
    for row in range(1, len(target), 2):
        place = row % (target[row] != PAD).sum()
        target[row, place] = EOS + 1 + target[row, place] % 5
    scores = score(Dataset(BATCH.source, jnp.asarray(target), 3))
    exact = evaluation.exact_match(outputs, target)
    np.testing.assert_array_equal(scores["correct"] == scores["tokens"], exact)
    np.testing.assert_array_equal(exact, np.arange(len(target)) % 2 == 0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"beam_size": 4}], ids=str)
def test_outputs_of_a_split_are_those_of_its_sources_in_their_order(settings):
    decoding, fold = DecodingConfig(**settings), jax.random.fold_in
    keys = jax.vmap(lambda index: fold(fold(jax.random.key(0), index), 0))(jnp.arange(7))
    method, sources = decoding.method(), Sources(BATCH.source, 9, keys)
    expected = jax.jit(lambda params: method(MODEL.bind(params), sources))(PARAMS)
    jitted = jax.jit(partial(decode, decoding=decoding))
    batched = evaluation.decode_in_batches(jitted, np.asarray(BATCH.source), 3)
    for found in (jitted(BATCH.source), batched):
        assert len(np.unique(found.tokens, axis=0)) > 3
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_sources_of_like_length_are_decoded_together():
    """Devices, which have adjacent rows of a batch, take turns with the longer ones."""
    lengths = []

    def longest(source, streams):
        lengths.append((source != PAD).sum(1).tolist())
        shape = len(source), 1
        return Hypotheses(np.zeros((*shape, 9), int), np.full(shape, max(lengths[-1])))

    found = evaluation.decode_in_batches(longest, np.asarray(BATCH.source), 3)
    assert lengths[:2] == [[2, 3, 3], [5, 4, 4]]
    # Each source says how long the longest of its batch is.
    np.testing.assert_array_equal(found.scores[:, 0], [5, 3, 5, 3, 6, 3, 5])


def test_a_batch_of_short_sources_is_decoded_in_narrow_arrays():
    """In arrays of 9, 18, 27 or 33 tokens: quarters of 33, rounded up."""
    texts, widths = ["abc", "defgh" * 3, "ijklm" * 6, "q", "rs", "abcdefghi"], []
    source = strings(*zip(texts, texts, strict=True)).source
    source = np.pad(source, ((0, 0), (0, 33 - source.shape[1])))
    assert (source != PAD).sum(1).tolist() == [4, 16, 31, 2, 3, 10]

    compiled = jax.jit(decode)

    def recorded(source, streams):
        widths.append(source.shape[1])
        return compiled(*map(jnp.asarray, (source, streams)))

    found = evaluation.decode_in_batches(recorded, source, 2)
    assert widths == [9, 18, 33]  # 2 3 | 10 4 | 16 31
    whole = compiled(jnp.asarray(source))
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-5)


def test_a_cpu_decodes_a_few_hypotheses_of_a_batch_at_once(monkeypatch):
    monkeypatch.setattr(evaluation, "row_shards", lambda: 2)
    monkeypatch.setattr(evaluation, "HYPOTHESES", 64)
    rows = partial(evaluation.rows_at_once, MODEL)
    beams = [rows(500, beam_size) for beam_size in (1, 4, 5, 100)]
    assert beams == [2 * 64, 2 * 16, 2 * 8, 2]  # powers of two: shapes of other batches
    assert rows(7, 1) == 7
    assert evaluation.rows_at_once(small_model(d_model=256), 500, 4) == 500
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows(500, 4) == 500


def test_the_model_names_the_tokens_that_pad_its_vocabulary(monkeypatch):
    def given(module, sources):
        assert (sources.num_tokens, sources.max_length, sources.margin) == (30, 6 + 3, 3)
        return Hypotheses(sources.tokens[:, None], jnp.zeros((len(sources.tokens), 1)))

    monkeypatch.setattr(DecodingConfig, "method", lambda self: given)
    model = Model(MODEL.config, MODEL.vocab_size, tokens=30)
    found = evaluation.decode(model, PARAMS, BATCH.source, margin=3)
    np.testing.assert_array_equal(found.tokens[:, 0], BATCH.source)


def test_exact_match_does_not_mind_the_width_of_the_padding():
    decoded = np.array([[5, EOS, PAD, PAD], [5, 6, EOS, PAD], [5, EOS, PAD, PAD]])
    target = np.array([[5, EOS], [5, EOS], [6, EOS]])
    for one, other in ((decoded, target), (target, decoded)):
        assert evaluation.exact_match(one, other).tolist() == [True, False, False]
