"""The benchmark: what all contenders share, the arithmetic of the page, and each peer installed."""

import contextlib
import dataclasses
import json
import re
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from lab.benchmark import contender, measure, ours, page, rotation, task, worker
from lab.benchmark.batching import POOL, Batches, by_length
from lab.benchmark.contender import CONTENDERS, OURS, Schedule

from tests.helpers import program
from tests.test_programs import finish, start
from transformer.data.batches import Dataset
from transformer.data.tokenizer import EOS, PAD
from transformer.errors import UserError
from transformer.modules.model import Model
from transformer.training import costs
from transformer.training.optimizer import make_schedule

TRIAL = task.SIZES["cpu"]["trial"]
SCHEDULE = {"learning_rate": 4e-3, "warmup_steps": 20, "name": "linear", "steps": 1_000}
DECODERS_OF = {name: [n for n, e in CONTENDERS.items() if e.weights == name] for name in CONTENDERS}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "strings.npz"
    task.save(TRIAL, path)
    return contender.Setting(size=TRIAL, data=path, device="cpu", threads=1)


@pytest.fixture
def bench(setting, tmp_path):
    numbers = {"rounds": 2, "starts": 1, "seeds": 2, "target": 0.8, "limit": 60.0}
    return measure.Bench(setting=setting, folder=tmp_path, contenders=[OURS, "marian"], **numbers)


def test_strings_are_reversed_and_end_and_come_again_and_none_is_held_out(setting):
    strings, again = (task.draw(TRIAL, 200, held_out=False) for _ in range(2))
    for source, target in zip(strings.source, strings.target, strict=True):
        letters = source[source != PAD][:-1]
        ends = [EOS] + [PAD] * (len(source) - len(letters) - 1)
        assert source.tolist() == [*letters, *ends]
        assert target.tolist() == [*letters[::-1], *ends]
    assert set(strings.lengths()) == set(range(2, TRIAL.longest + 2))
    assert strings.source.max() < TRIAL.vocabulary
    assert (strings.source == again.source).all()
    assert (task.draw(TRIAL, 200, held_out=False, seed=1).source != again.source).any()
    train, held_out = (task.load(setting.data, part) for part in ("train", "held_out"))
    assert (len(train), len(held_out)) == (TRIAL.examples, task.HELD_OUT)
    assert not {*map(bytes, train.source)} & {*map(bytes, held_out.source)}


def test_needed_flops_are_those_of_the_program_where_nothing_is_padded():
    size = dataclasses.replace(TRIAL, batch=5, layers=2)
    cfg = ours.run_config(size, "cpu", Schedule(**SCHEDULE), rows=5)
    rows = np.full((7, 6), EOS, np.int32)
    model, data = Model(cfg.model, size.vocabulary), Dataset(rows, rows, batch_size=5)
    needed = task.useful_flops(size, np.full(5, 6), np.full(5, 6))
    assert needed == costs.step_flops(model, cfg.step_config(), data)


def test_an_epoch_has_each_string_once_and_buckets_hold_those_of_about_one_length(rng):
    padding, steps = {}, 3 * POOL
    lengths = rng.integers(2, 34, steps * 16)
    for way in ("padded", "bucketed"):
        batches, again = (Batches(lengths, batch=16, seed=0, batching=way) for _ in range(2))
        rows = np.array([batches[step] for step in range(2 * steps)])
        first, second = rows.reshape(2, -1)
        assert sorted(first) == sorted(second) == list(range(len(lengths)))
        assert (first != second).any()
        assert (again[steps + 3] == rows[steps + 3]).all()
        longest = lengths[rows].max(1)
        padding[way] = (longest[:, None] - lengths[rows]).sum()
        assert longest[:POOL].tolist() != sorted(longest[:POOL])
    assert padding["bucketed"] < 0.3 * padding["padded"]
    batches = by_length(lengths[:21], 8)
    assert [len(rows) for rows in batches] == [8, 8, 5]
    assert sorted(np.concatenate(batches)) == list(range(21))
    assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all()


def test_the_peers_have_our_schedules():
    for name in contender.SCHEDULES:
        schedule = Schedule(learning_rate=3e-3, warmup_steps=7, name=name, steps=40)
        with jax.numpy_dtype_promotion("standard"):
            expected = [float(make_schedule(name, 40, 3e-3, 7)(step)) for step in range(45)]
        theirs = [3e-3 * schedule.factor(step) for step in range(45)]
        assert theirs == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_each_has_its_turn_in_every_round_in_another_order():
    taken = []
    turns = {name: lambda name=name: taken.append(name) or len(taken) for name in "abcd"}
    found = rotation.rotate(turns, rounds=5, pause=0.0)
    rounds = [taken[i : i + 4] for i in range(0, 20, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert found["a"] == [1 + taken.index("a", 4 * i) for i in range(5)]


def test_a_worker_trains_to_the_end_checks_on_the_way_and_ignores_what_follows_an_end(setting):
    target = np.array([[5, 6, EOS], [7, EOS, PAD], [8, EOS, PAD], [9, EOS, PAD]])
    decoded = [[5, 6, EOS, EOS], [7, EOS, PAD, PAD], [8, 3, EOS, PAD], [9, 9, 9, 9]]
    assert worker.exact(worker.ended(np.array(decoded)), target) == 0.5
    peer = Mock(spec=contender.Contender)
    peer.decode = lambda source, batch, beams, room: np.zeros((len(source), room), int)
    learned = worker.Worker(peer, setting).learn(
        seed=0, schedule=SCHEDULE | {"steps": 10}, batching="x", every=4, target=0.5, limit=1e9
    )
    assert [step for step, *_ in learned["curve"]] == [4, 8, 10]
    assert (learned["steps"], learned["reached"]) == (10, False)
    # The first step compiles; training then starts anew.
    assert [call.args for call in peer.train.mock_calls] == [(n, "x") for n in (1, 4, 4, 2)]
    assert peer.start.call_count == 2


def test_a_contender_that_fails_says_why_and_a_peer_is_left_out(bench, setting, tmp_path):
    gone = dataclasses.replace(setting, data=tmp_path / "nowhere.npz")
    says = pytest.raises(rotation.ContenderError, match=r"ended with status 1: .*nowhere")
    with rotation.Remote(OURS, gone, tmp_path / "log") as remote, says:
        remote.ask("start", seed=0, schedule=SCHEDULE)
    remote = Mock(spec=rotation.Remote, contender="marian")
    remote.ask.side_effect = rotation.ContenderError("out of memory")
    assert bench.ask(remote, "train") is None
    assert bench.failures == {"marian": "out of memory"}
    assert bench.those(lambda entry: entry.batchings) == [OURS]
    found = {("marian", "padded"): [None], (OURS, "packed"): [1]}
    assert bench.complete(found) == {(OURS, "packed"): [1]}
    remote.contender = OURS
    with pytest.raises(rotation.ContenderError):
        bench.ask(remote, "train")


def test_a_search_gives_up_what_is_slower_and_goes_on_where_it_was_cut_off(bench, monkeypatch):
    def learn(bench, remote, seed, training, limit):
        rate, batching = training["schedule"]["learning_rate"], training["batching"]
        tried.append((batching, 1e3 * rate, limit))
        if len(tried) == 3:
            raise KeyboardInterrupt
        seconds = 1e4 * rate + (batching == "bucketed")
        return {"reached": seconds <= limit, "seconds": seconds, "curve": [[9, seconds, 0.9, 0]]}

    def processes(bench, names):
        return contextlib.nullcontext({name: Mock(contender=name) for name in names})

    tried = []
    monkeypatch.setattr(measure.Bench, "open", processes)
    monkeypatch.setattr(measure, "learn", learn)
    monkeypatch.setattr(measure, "GRID", [(0.5, rate) for rate in (2e-3, 1e-3)])
    with pytest.raises(KeyboardInterrupt):
        measure.search(bench)
    found = measure.search(bench)
    # The third was cut off and came again; it takes longer than the 20 s of the one before it.
    assert tried == [
        *(("packed", 2, 60), ("padded", 2, 60), ("bucketed", 2, 20), ("bucketed", 2, 20)),
        *(("packed", 1, 20), ("padded", 1, 20), ("bucketed", 1, 10)),
    ]
    assert [trial["reached"] for trial in found["marian"]["trials"]] == [True, False, True, False]
    assert [own["batching"] for own in found.values()] == ["packed", "padded"]
    schedules = [own["schedule"] for own in found.values()]
    assert {(s["learning_rate"], s["steps"]) for s in schedules} == {(1e-3, TRIAL.steps // 2)}
    # Where none reaches the target, the one that comes nearest.
    assert measure.best([{"reached": False, "right": x} for x in (0.5, 0.9)])["right"] == 0.9


def test_ratios_are_taken_round_by_round_and_the_fastest_peer_has_the_best_median():
    assert page.ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == page.Spread(3.0, 2.0, 4.0)
    own, pytorch, marian = (OURS, "packed"), ("pytorch", "padded"), ("marian", "bucketed")
    values = {own: [20.0, 22.0], pytorch: [5.0, 5.5], marian: [10.0, 11.0]}
    speed = page.Quantity("speed", values)
    assert speed.fastest() == marian
    assert page.Quantity("seconds", values, higher=False).fastest() == pytorch
    assert speed.cells(own) == ("21 [20, 22]", "")
    assert speed.cells(pytorch) == ("5 [5, 6]", "4.00 [4.00, 4.00]")
    assert speed.cells(marian)[1] == "**2.00 [2.00, 2.00]**"
    # Without ours or without peers there is no ratio.
    assert page.Quantity("x", {own: [1.0]}).fastest() is None
    assert page.Quantity("x", {marian: [1.0]}).cells(marian) == ("1 [1, 1]", "")


def test_the_page_shows_every_part_and_one_measured_again_replaces_itself_alone(tmp_path):
    def each(mine, marian):
        return {OURS: mine, "marian": marian}

    def rounds(way, work, *seconds, **more):
        found = [{"steps": 10, "tokens": work, "sequences": work, "seconds": s} for s in seconds]
        return {way: [one | more for one in found]}

    def seed(reached, right):
        return {"reached": reached, "steps": 50, "seconds": 9.0, "curve": [[50, 9.0, right, 0.1]]}

    training = {"memory": each(2**30, 2**31), "flops_per_step": each(30_000, None)}
    training |= {"best_product": 1e6, "useful_flops_per_token": 100.0}
    training["rounds"] = each(rounds("packed", 1000, 1, 2), rounds("padded", 500, 1, 4))
    way, seeds = {"schedule": SCHEDULE, "batching": "packed"}, [seed(True, 0.9), seed(False, 0.9)]
    learning = {"target": 0.999, "trainings": each(way, way), "searched": []}
    learning["seeds"] = each([seed(True, 1.0)] * 2, seeds)
    decoding = each(*(rounds("1/128", 8, s, exact=0.75, tokens=3.5) for s in (0.5, 2.0)))
    first = each({"cold": [9.0], "again": [9.0]}, {"cold": [4.0], "again": [4.0]})
    again = first | {OURS: {"cold": [6.0], "again": [3.0]}}
    parts = {"training": training, "time_to_accuracy": learning, "decoding": decoding}
    about = {"command": "c", "device": "d", "threads": 4, "load": 0.1, "size": {"width": 32}}
    about |= {"versions": {"jax": "1"}, "commit": None, "absent": {"ctranslate2": "not there"}}
    path = tmp_path / "benchmark.md"
    for name, found in [("start", first), *parts.items(), ("start", again)]:
        page.store(path, "trial", name, found, about)
        page.write(path)
    record = json.loads(path.with_suffix(".json").read_text())["trial"]
    assert {name: one["found"] for name, one in record.items()} == parts | {"start": again}
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    text, marian, way = path.read_text(), "Hugging Face Marian", "packed, linear over 1,000 steps,"
    for line in (
        # 1000 tokens/s; 750 · 100 FLOP/s of 1e6 needed, 7.5 · 30,000 carried out.
        "this code, packed | 7.50 [5.00, 10.00] | 750 [500, 1,000] |  | 7.5% | 22.5% | 1.00 GiB",
        "312 [125, 500] | **3.00 [2.00, 4.00]** | 3.1% |  | 2.00 GiB",
        f"this code | {way} 0.004 after 20 | 2 of 2 | 100.0% | 50 [50, 50] | 9.0 [9.0, 9.0] | ",
        # One seed is missing: a median of the others would flatter.
        f"{marian} | {way} 0.004 after 20 | 1 of 2 | 90.0% |  |  | ",
        f"{marian} | 4 [4, 4] | **4.00 [4.00, 4.00]** | 75.0% | 3.5",
        "4.0 [4.0, 4.0] | **1.50 [1.50, 1.50]** | 4.0 [4.0, 4.0] | **0.75 [0.75, 0.75]**",
    ):
        assert f"| {line} |\n" in text
    assert f"- greedy, batch 128, sequences/s: this code / {marian} **4.00 [4.00, 4.00]**" in text
    assert "CTranslate2, all threads on a batch: not there." in text


def installed(name):
    """A case of a parametrization that is skipped where packages are missing."""
    missing = {each for one in (name, *DECODERS_OF[name]) for each in CONTENDERS[one].missing()}
    reason = f"{', '.join(sorted(missing))} not installed: pip install '.[bench]'"
    marks = (pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=reason))
    return pytest.param(name, marks=marks if name == OURS else (*marks, pytest.mark.oracle))


def check_decoding(remote, contender):
    """Greedy and beams, one at a time and many, come to the same: most strings are right."""
    for beams in CONTENDERS[contender].beams:
        for batch in (1, 64):
            found = remote.ask("decode", strings=100, batch=batch, beams=beams, shortest=0.0)
            assert found["exact"] > 0.75, (beams, batch)
            assert found["tokens"] == pytest.approx(3.5, abs=0.4)


@pytest.mark.parametrize("name", [installed(n) for n, entry in CONTENDERS.items() if entry.learns])
def test_a_contender_learns_to_reverse_and_its_parameters_serve_others(name, setting, tmp_path):
    file, ways = str(tmp_path / "weights"), CONTENDERS[name].batchings
    with rotation.Remote(name, setting, tmp_path / "log") as remote:
        for batching in ways:
            remote.ask("start", seed=0, schedule=SCHEDULE)
            first, second = (remote.ask("train", steps=10, batching=batching) for _ in range(2))
            assert second["loss"] < first["loss"] < 1.2 * np.log(TRIAL.vocabulary)
            # 20 steps; strings of 1 to 4 letters have 3.5 tokens on average, their ends included.
            assert first["tokens"] + second["tokens"] == pytest.approx(70 * TRIAL.batch, rel=0.1)
        ends = {"every": 250, "target": 0.97, "limit": 60.0}
        learned = remote.ask("learn", seed=0, schedule=SCHEDULE, batching=ways[-1], **ends)
        assert max(each[2] for each in learned["curve"]) > 0.8
        check_decoding(remote, name)
        assert remote.ask("memory") > 2**27
        remote.ask("save", path=file)
        # Fresh parameters know nothing; those that were saved do.
        remote.ask("start", seed=1, schedule=SCHEDULE)
        assert remote.ask("decode", strings=50, batch=50, beams=1, shortest=0.0)["exact"] < 0.1
        remote.ask("load", path=file)
        check_decoding(remote, name)
    for decoder in DECODERS_OF[name]:
        with rotation.Remote(decoder, setting, tmp_path / "log") as remote:
            remote.ask("load", path=file)
            check_decoding(remote, decoder)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("compiled", [installed("pytorch_compiled")])
def test_compiled_is_the_same_training_as_eager(compiled, setting, tmp_path):
    losses, way = {}, "bucketed"
    for name in ("pytorch", compiled):
        with rotation.Remote(name, setting, tmp_path / name) as remote:
            remote.ask("start", seed=0, schedule=SCHEDULE)
            losses[name] = [remote.ask("train", steps=5, batching=way)["loss"] for _ in range(4)]
    assert losses["pytorch"][-1] < losses["pytorch"][0]
    assert losses[compiled] == pytest.approx(losses["pytorch"], rel=1e-3)


@pytest.mark.slow
def test_the_script_writes_the_page(tmp_path):
    flags = f"--sizes=trial --threads=1 --contenders={OURS} --rounds=2 --starts=1 --seeds=1"
    places = (f"--workdir={tmp_path}", f"--output={tmp_path / 'b.md'}")
    finish(start("scripts/benchmark.py", *flags.split(), "--target=0.5", *places))
    text = (tmp_path / "b.md").read_text()
    assert re.findall(r"^### (.*), trial$", text, re.MULTILINE) == list(page.TITLES.values())
    record = json.loads((tmp_path / "b.json").read_text())["trial"]
    assert len(record["training"]["found"]["rounds"][OURS]["packed"]) == 2


def test_mistakes_are_explained(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for flag, words in (
        ("--contenders=marain", r"^--contenders=marain: choose one of ours, pyt.*mean marian\?\)$"),
        ("--contenders=marian", "ours must be among them"),
        ("--sizes=big", "^--sizes=big: choose one of trial, tiny, base"),
        ("--device=gpu", "^--device=gpu: nvidia-smi finds none; leave it out for the CPU$"),
    ):
        with program("scripts/benchmark.py", flag) as script, pytest.raises(UserError, match=words):
            script.main()
