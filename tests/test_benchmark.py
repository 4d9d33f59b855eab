"""The benchmark: what all contenders share, the arithmetic of its tables, installed peers."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from lab.benchmark import contender, measure, ours, page, task, worker
from lab.benchmark.contender import CONTENDERS, OURS, Schedule
from lab.benchmark.task import EOS, PAD

from tests.helpers import program, refused
from transformer import Run
from transformer.data import tokenizer
from transformer.training.optimizer import make_schedule

TRIAL = task.SIZES["cpu"]["trial"]
TEXT = dataclasses.replace(TRIAL, longest=51, examples=2_000, pack=64, **task.TEXT)
SCHEDULE = {"learning_rate": 4e-3, "warmup_steps": 20, "steps": 1_000}
OUR_TITLE, MARIAN = CONTENDERS[OURS].title, CONTENDERS["marian"].title


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    task.save(TRIAL, folder)
    return contender.Setting(size=TRIAL, folder=folder, device="cpu", threads=1)


@pytest.fixture
def bench(setting):
    return measure.Bench("trial", setting, [OURS, "marian"], 2, 2, 0.8, 60.0)


def test_strings_are_reversed_deterministic_and_not_held_out(setting):
    drawn = [task.draw(TRIAL, 200, held_out=False, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    train, held_out = (task.load(setting.folder, split) for split in ("train", "test"))
    assert (len(train.source), len(held_out.source)) == (TRIAL.examples, task.HELD_OUT)
    assert not {*map(bytes, train.source)} & {*map(bytes, held_out.source)}
    assert set(train.lengths.flat) == set(range(2, TRIAL.longest + 2))
    for source, target in zip(*train, strict=True):
        symbols = source[source != PAD][:-1].tolist()
        ends = [EOS] + [PAD] * (TRIAL.longest - len(symbols))
        assert source.tolist() == [*symbols, *ends]
        assert target.tolist() == [*symbols[::-1], *ends]


def test_text_has_the_statistics_of_multi30k(tmp_path):
    size = task.SIZES["cpu"]["text"]
    task.save(size, tmp_path)
    train, again = task.load(tmp_path, "train"), task.draw_text(size, size.examples, held_out=False)
    assert again == task.draw_text(size, size.examples, held_out=False)
    lengths = train.lengths - 1
    assert lengths.mean(0) == pytest.approx([13.72, 13.81], rel=0.01)  # of the corpus, as below
    assert lengths.std(0) == pytest.approx([4.41, 4.88], rel=0.03)
    assert np.corrcoef(lengths.T)[0, 1] == pytest.approx(0.865, abs=0.03)
    assert 1 <= lengths.min() < lengths.max() <= size.longest
    _, counts = np.unique(np.concatenate([x[x > EOS] for x in train]), return_counts=True)
    assert len(counts) == size.symbols
    shares = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    assert shares[[9, 99, 999]] == pytest.approx([0.272, 0.545, 0.8], abs=0.02)


@pytest.mark.parametrize("size", [TRIAL, TEXT])
def test_this_library_reads_the_tokens_of_the_peers(size, tmp_path):
    assert (task.PAD, task.BOS, task.EOS) == (tokenizer.PAD, tokenizer.BOS, tokenizer.EOS)
    task.save(size, tmp_path)
    setting = contender.Setting(size, tmp_path, "cpu", 1)
    config = ours.run_config(setting, Schedule(1e-3, 1, 2), rows=1)
    assert (config.model.dropout_rate, config.model.attention_dropout_rate) == (size.dropout, 0.0)
    assert config.label_smoothing == size.label_smoothing
    run = Run(config, data_dir=str(tmp_path / "datasets"))
    assert run.tokenizers.source.vocab_size == size.vocabulary
    pairs, strings = run.corpus.tokens(config.data.train), task.load(tmp_path, "train")
    for side, wanted in zip(pairs, strings, strict=True):
        assert sorted(side.to_padded(wanted.shape[1]).tolist()) == sorted(wanted.tolist())


def test_an_epoch_has_each_string_once_and_buckets_have_similar_lengths(rng):
    padding, steps = {}, 3 * task.POOL
    lengths = rng.integers(2, 34, steps * 16)
    for batching in ("padded", "bucketed"):
        found = (task.batches(lengths, 16, 0, batching) for _ in range(2))
        rows, again = (np.array(list(itertools.islice(each, 2 * steps))) for each in found)
        first, second = rows.reshape(2, -1)
        assert sorted(first) == sorted(second) == list(range(len(lengths)))
        assert (first != second).any()
        assert (again == rows).all()
        longest = lengths[rows].max(1)
        padding[batching] = (longest[:, None] - lengths[rows]).sum()
        assert longest[: task.POOL].tolist() != sorted(longest[: task.POOL])
    assert padding["bucketed"] < 0.3 * padding["padded"]


def test_the_peers_have_our_schedule():
    schedule = Schedule(learning_rate=3e-3, warmup_steps=7, steps=40)
    with jax.numpy_dtype_promotion("standard"):
        ours = make_schedule("linear", 40, schedule)
        expected = [float(ours(step)) for step in range(45)]
    theirs = [3e-3 * schedule.factor(step) for step in range(45)]
    assert theirs == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_training_to_the_target_ends_with_the_schedule(bench, monkeypatch):
    target = np.array([[5, 6, EOS], [7, EOS, PAD], [8, EOS, PAD], [9, EOS, PAD]])
    decoded = np.array([[5, 6, EOS, EOS], [7, EOS, PAD, PAD], [8, 3, EOS, PAD], [9, 9, 9, 9]])
    monkeypatch.setattr(task, "load", lambda *_: task.Strings(target, target))
    peer = Mock(spec=contender.Contender)
    peer.train.return_value, peer.decode.return_value = (1, 0.5), decoded
    own = worker.Worker(peer, bench.setting)
    judged = own.decode(strings=4, batch=4, beams=1, shortest=0.0)
    assert (judged["strings"], judged["exact"], judged["tokens"]) == (4, 0.5, 3.0)
    monkeypatch.setattr(worker.Worker, "save", peer.save, raising=False)
    remote = Mock(ask=lambda method, **arguments: getattr(own, method)(**arguments))
    training = SCHEDULE | {"steps": 10}, "x"
    monkeypatch.setattr(measure.Bench, "training_of", lambda *_: training)
    remote.contender = "marian"
    learned = bench.learn(remote, 0, every=4)
    assert [step for step, *_ in learned["curve"]] == [4, 8, 10]
    assert (learned["steps"], learned["reached"]) == (10, False)
    # The first step compiles; training then starts again.
    assert [call.args for call in peer.train.mock_calls] == [(n, "x") for n in (1, 4, 4, 2)]
    assert peer.start.call_count == 2


def test_a_contender_that_fails_says_why_and_a_peer_is_skipped(bench, setting, tmp_path):
    gone = dataclasses.replace(setting, folder=tmp_path / "nowhere")
    message = pytest.raises(worker.ContenderError, match=r"exited with status 1: .*nowhere")
    with worker.Remote(OURS, gone, tmp_path / "log") as remote, message:
        remote.ask("start", seed=0, schedule=SCHEDULE)
    remote, own = (Mock(spec=worker.Remote, contender=name) for name in ("marian", OURS))
    remote.ask.side_effect = [1, worker.ContenderError("out of memory")]
    own.ask.return_value = 2
    turns = {("marian", "padded"): ("train", {}), (OURS, ""): ("train", {})}
    found = bench.rotate({"marian": remote, OURS: own}, turns)
    assert found == {OUR_TITLE: [2, 2]}
    assert bench.failures == {"marian": "out of memory"}
    assert bench.able("batchings") == [OURS]
    assert bench.ask(remote, "train") is None
    own.ask.side_effect = worker.ContenderError("no memory")
    with pytest.raises(worker.ContenderError):
        bench.ask(own, "train")


def test_ratios_are_taken_round_by_round_and_the_fastest_peer_is_bold():
    values = {OUR_TITLE: [20.0, 22.0], "a": [5.0, 5.5], "b": [10.0, 11.0], "c": []}
    extra = {"memory": dict.fromkeys(values, "1 GiB")}
    table = page.comparison("speed", values, extra)
    assert table["columns"] == ["", "memory", "speed", "this library / it"]
    assert [row[2:] for row in table["rows"]] == [
        ["21 [20, 22]", ""],
        ["5 [5, 6]", "4.00 [4.00, 4.00]"],
        ["10 [10, 11]", "**2.00 [2.00, 2.00]**"],
        ["", ""],
    ]
    lower = page.comparison("seconds", {OUR_TITLE: [2.0, 30.0, 8.0], "a": [1.0, 10.0, 2.0]}, {})
    assert lower["rows"][1][2] == "**3.00 [2.00, 4.00]**"
    lower = page.comparison("seconds", values, {}, lower=True)
    assert [row[2].startswith("**") for row in lower["rows"]] == [False, True, False, False]
    for alone in (OUR_TITLE, "a"):  # without the other there is no ratio
        assert page.comparison("x", {alone: [1.0]}, {})["rows"] == [[alone, "1 [1, 1]", ""]]


def test_the_page_shows_every_part_and_a_repeated_part_replaces_itself(tmp_path):
    path = tmp_path / "benchmark.md"
    for speed, name in [(1.0, "training"), (3.0, "decoding"), (2.0, "training")]:
        table = page.comparison("speed", {OUR_TITLE: [4.0, 6.0], MARIAN: [speed, speed]}, {})
        page.write(path, "trial", name, {"tables": [table], "about": "measured on a toaster"})
    record = json.loads(path.with_suffix(".json").read_text())["trial"]
    assert list(record) == ["training", "decoding"]
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    text = path.read_text()
    assert f"| {MARIAN} | 2 [2, 2] | **2.50 [2.00, 3.00]** |\n" in text
    assert "1 [1, 1]" not in text
    assert text.count("measured on a toaster") == 2


def test_a_seed_that_gave_up_leaves_no_time_to_accuracy(bench, monkeypatch):
    def learn(bench, remote, seed):
        name = remote.contender
        asked.append((name, seed))
        reached = name == OURS or seed == 0
        return {"reached": reached, "steps": 50, "seconds": 9.0, "curve": [[50, 9.0, 0.9, 0.1]]}

    asked = []
    monkeypatch.setattr(measure, "Remote", lambda name, *_: Mock(contender=name, **CONTEXT))
    monkeypatch.setattr(measure.Bench, "learn", learn)
    (table,), _ = measure.time_to_accuracy(bench)
    assert sorted(asked) == [(name, seed) for name in ("marian", OURS) for seed in (0, 1)]
    rows = [["2 of 2", "50 [50, 50]", "9.0 [9.0, 9.0]", ""], ["1 of 2", "", "", ""]]
    assert [row[3:] for row in table["rows"]] == rows


CONTEXT = {"__enter__": lambda self: self, "__exit__": lambda *_: None}


def learner(name):
    """A contender and those that decode with its parameters; skipped where a package is missing."""
    names = [name, *(other for other in CONTENDERS if CONTENDERS[other].weights == name)]
    missing = {package for each in names for package in CONTENDERS[each].missing()}
    missing |= {"g++"} if name == "pytorch_compiled" and not shutil.which("g++") else set()
    marks = [pytest.mark.skipif(bool(missing), reason=f"not installed: {sorted(missing)}")]
    marks += [pytest.mark.slow] if name == OURS else [pytest.mark.slow, pytest.mark.oracle]
    return pytest.param(*names[:1], names[1:], marks=marks, id=name)


def check_decoding(bench, remote):
    """Greedy and beams, one at a time and many, give the same: most strings are right."""
    for beams in CONTENDERS[remote.contender].beams:
        for batch in (1, 64):
            options = {"strings": 100, "batch": batch, "beams": beams, "shortest": 0.0}
            found = bench.ask(remote, "decode", **options)
            assert found["exact"] > 0.75, (beams, batch)
            assert found["tokens"] == pytest.approx(3.5, abs=0.4)


NAMES = [name for name, entry in CONTENDERS.items() if entry.batchings]


@pytest.mark.parametrize(("name", "decoders"), [*map(learner, NAMES)])
def test_a_contender_learns_and_decodes(name, decoders, bench, setting, tmp_path):
    file, batchings = str(tmp_path / "weights"), CONTENDERS[name].batchings
    with worker.Remote(name, setting, tmp_path / "log") as remote:
        for batching in batchings:
            remote.ask("start", seed=0, schedule=SCHEDULE)
            first, second = (remote.ask("train", steps=10, batching=batching) for _ in range(2))
            assert second["loss"] < first["loss"] < 1.2 * np.log(TRIAL.vocabulary)
            # 20 steps; strings of 1 to 4 symbols have 3.5 tokens on average, EOS included.
            assert first["tokens"] + second["tokens"] == pytest.approx(70 * TRIAL.batch, rel=0.1)
        learned = dataclasses.replace(bench, target=0.97).learn(remote, 0)
        assert max(each[2] for each in learned["curve"]) > 0.8
        check_decoding(bench, remote)
        remote.ask("save", path=file)
        # New parameters know nothing; the saved ones do.
        remote.ask("start", seed=1, schedule=SCHEDULE)
        assert bench.ask(remote, "decode", strings=50, batch=50, beams=1)["exact"] < 0.1
        remote.ask("load", path=file)
        check_decoding(bench, remote)
    for decoder in decoders:
        with worker.Remote(decoder, setting, tmp_path / "log") as remote:
            remote.ask("load", path=file)
            check_decoding(bench, remote)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_compiled")])
def test_a_contender_trains_on_text(name, tmp_path):
    if CONTENDERS[name].missing():
        pytest.skip("not installed")
    task.save(TEXT, tmp_path)
    setting = contender.Setting(TEXT, tmp_path, "cpu", CONTENDERS[name].threads or 1)
    with worker.Remote(name, setting, tmp_path / "log") as remote:
        remote.ask("start", seed=0, schedule=SCHEDULE)
        batching = CONTENDERS[name].batchings[-1]
        first, second = (remote.ask("train", steps=20, batching=batching) for _ in range(2))
    assert second["loss"] < first["loss"] < 1.2 * np.log(TEXT.vocabulary)
    assert second["loss"] > 0.7 * np.log(TEXT.vocabulary)  # nothing but frequencies to learn
    for done in (first, second):
        assert done["tokens"] == pytest.approx(20 * 14.8 * TEXT.batch, rel=0.1)
        assert done["cpu_ms"] > 0.0
        assert 0.1 < done["gib"] < 4.0


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["TransformerNetwork", "MarianNetwork", "XNetwork"])
def test_the_peers_drop_what_this_library_drops(name, monkeypatch):
    """Embedded tokens and the outputs of the sublayers; neither attention weights nor others."""
    torch = pytest.importorskip("torch", reason="pip install '.[oracle]' to run these")
    if name in ("MarianNetwork", "XNetwork"):
        pytest.importorskip({"M": "transformers", "X": "x_transformers"}[name[0]])
    torch_peers = importlib.import_module("lab.benchmark.torch_peers")
    size = dataclasses.replace(TEXT, num_layers=2)
    module = getattr(torch_peers, name)(size).train()
    functional, dropped = torch.nn.functional, []
    drop, attend = functional.dropout, functional.scaled_dot_product_attention

    def record(x, p=0.5, training=True, inplace=False):
        dropped.extend([(p, tuple(x.shape))] * (p > 0.0))
        return drop(x, p, training, inplace)

    def check(*args, dropout_p=0.0, **options):
        assert not dropout_p
        return attend(*args, **options)

    monkeypatch.setattr(functional, "dropout", record)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", check)
    source, target = torch.full((3, 7), 5), torch.full((3, 6), 5)
    module(source, target)
    sides = [[(0.3, (3, n, size.d_model))] * (1 + each * 2) for n, each in ((7, 2), (6, 3))]
    assert sorted(dropped) == sorted(itertools.chain(*sides))
    module.eval()
    assert torch.equal(module(source, target), module(source, target))


@pytest.mark.slow
def test_the_script_writes_the_page(tmp_path):
    """Also where --workdir and --output are relative to another folder than the repository."""
    flags = f"--sizes=trial --threads=1 --contenders={OURS} --rounds=2 --seeds=1 --target=0.5"
    flags += " --workdir=work --output=b.md"
    words = [sys.executable, f"{worker.ROOT}/scripts/benchmark.py", *flags.split()]
    subprocess.run(words, cwd=tmp_path, check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    headings = re.findall(r"^### (.*), trial$", (tmp_path / "b.md").read_text(), re.MULTILINE)
    assert headings == [name.replace("_", " ").capitalize() for name in list(measure.PARTS)[:3]]
    record = json.loads((tmp_path / "b.json").read_text())["trial"]
    assert len(record["training"]["rounds"][f"{OUR_TITLE}, packed"]) == 2


def test_mistakes_are_explained():
    for flag, words in (
        ("--contenders=marain", r"^--contenders=marain: choose one of .*did you mean marian\?\)$"),
        ("--contenders=marian", "it must include ours"),
        ("--sizes=big", "^--sizes=big: choose one of "),
    ):
        with program("scripts/benchmark.py", flag) as script:
            refused(words, script.main)
