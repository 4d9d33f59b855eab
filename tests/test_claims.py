import os
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import timing
from lab.claims import cost, learning, modules
from lab.claims.claim import Check, Setting, above_zero, verdict
from lab.statistics import Interval, paired
from lab.sweeps.report import Record
from matplotlib.figure import Figure

from tests.helpers import random_params, small_model
from tests.test_programs import TINY, complaint, finish, start
from transformer.modules import dot_product_attention, masking
from transformer.modules.model import Model
from transformer.modules.normalization import RMSNorm

QUICK, SLOW = (100, 110, 120), (200, 205, 225)


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A setting without pictures and with shallow models, which show what the page shows."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(modules, "model_of", partial(modules.model_of, num_layers=1))
    return Setting(tmp_path, None, 1, tmp_path)


def holding(claim):
    return {check.case: check.holds for check in claim.checks}


def test_the_verdict_follows_from_the_checks():
    some = "holds in part"
    for holds, words in (
        ((True, True), "holds"),
        ((True, False), f"{some}; not for: case 1"),
        ((True, None, False), f"{some}; not for: case 2; undecided: case 1"),
        ((False, None), "does not hold here"),
        ((True, *[None] * 4, False), f"{some}: true in 1 of 6 cases, false in 1, undecided in 4"),
        ((), "could not be measured here"),
    ):
        assert verdict([Check(f"case {i}", "", x) for i, x in enumerate(holds)]) == words


def test_masked_attention_is_blind_and_a_mask_that_leaks_is_noticed(setting, monkeypatch):
    def soft(scores, mask):
        return jax.nn.softmax(jnp.where(mask, scores, scores - 10.0), axis=-1)

    found = holding(modules.causality(setting, length=5, seeds=1))
    assert found == {f"backend {name}": True for name in modules.BACKENDS}
    assert verdict(modules.probabilities(setting, length=8, seeds=1).checks) == "holds"
    with monkeypatch.context() as patch:
        patch.setattr(dot_product_attention, "masked_softmax", soft)
        found = holding(modules.probabilities(setting, length=8, seeds=1))
    assert not found["causal mask, backend einsum, scores × 1"]
    assert found["causal mask, backend xla, scores × 1"]  # it has a softmax of its own
    right = masking.causal
    monkeypatch.setattr(masking, "causal", lambda n, keys, offset: right(n, keys, offset + 1))
    backends = {name: modules.BACKENDS[name] for name in ("einsum", "splash")}
    monkeypatch.setattr(modules, "BACKENDS", backends)
    found = holding(modules.causality(setting, length=5, seeds=1))
    assert not found["backend einsum"]
    assert found["backend splash"]  # the kernel has a mask of its own


def test_heads_are_judged_by_distance_by_loss_and_by_number(setting, monkeypatch):
    def judged(trained, untrained, one_head, four_heads):
        each = {"trained": trained, "untrained": untrained, "lost": [9.0, 10.0, 11.0]}
        heads = {f"{kind}, {what}": x for kind in modules.KINDS for what, x in each.items()}
        found = {"1 head": one_head, "4 heads": four_heads}
        records = {k: [planted(1, accuracy=each)[0] for each in x] for k, x in found.items()}
        monkeypatch.setattr(modules, "records", lambda *_: records)
        monkeypatch.setattr(modules, "measure_heads", lambda *_: heads)
        return holding(modules.heads(setting))

    one, other = np.eye(3), np.roll(np.eye(3), 1, axis=1)
    p, real = np.stack([one, other, (one + other) / 2])[None], np.ones((1, 3), bool)
    assert [modules.distance(p[:, h], real) for h in ([0, 0], [0, 1], [0, 1, 2])] == [0, 1, 0.5]
    p[0, 1, 2] = p[0, 0, 2]  # the same where there is padding
    assert modules.distance(p[:, :2], np.array([[True, True, False]])) == 1.0
    few, many = [0.90, 0.91, 0.89], [0.95, 0.965, 0.935]
    apart, alike = [0.5, 0.6, 0.7], [0.01, 0.02, 0.04]
    assert set(judged(apart, alike, few, many).values()) == {True}
    found = judged(alike, apart, many, few)
    assert found == {case: "most useful" in case for case in found}


@pytest.mark.slow
def test_the_heads_of_a_trained_population_are_measured(setting, data_dir):
    folder = setting.root / "run"
    more = ("--config.steps=40", "--config.replicas=2", f"--data_dir={data_dir}")
    finish(start("train.py", *TINY, *more, f"--workdir={folder}"))
    heads = modules.measure_heads(folder, data_dir, examples=20)
    assert type(heads) is dict  # dataclasses.asdict fails on a defaultdict
    assert {len(seeds) for seeds in heads.values()} == {2}
    for kind in modules.KINDS:
        trained, untrained, _ = (heads[f"{kind}, {x}"] for x in ("trained", "untrained", "lost"))
        assert trained != untrained
        assert all(0.0 < x < 1.0 for x in trained + untrained)


def test_norms_have_their_moments_and_scales_and_what_has_not_is_noticed(setting, monkeypatch):
    model = small_model(num_layers=4)
    monkeypatch.setattr(modules, "trained", lambda _: [(model, random_params(model, 0))])
    found = holding(modules.same_scale(setting, layers=4, width=32))
    # What attention reads, then the residual stream; post-norm first.
    assert [*found.values()] == [True, True, True, True, False, False]
    found = holding(modules.moments(setting, rows=64))
    assert not found["weights × 0.0001"]  # epsilon shows
    assert all(found[f"weights × {scale:g}"] for scale in (0.1, 1, 10, 10_000))
    assert found["one example's output, others of its batch changed"]
    assert [holds for case, holds in found.items() if "batch norm" in case] == [True] * 2
    monkeypatch.setattr(modules, "LayerNorm", RMSNorm)  # keeps the mean
    assert not holding(modules.moments(setting, rows=64))["weights × 1"]


def planted(*steps, accuracy=0.9, target=0.5):
    """Records of a variant whose seeds arrive at the target at these steps, or never."""
    records, at = [], np.arange(10, 410, 10)
    for step in steps:
        right = 0.0 * at if step is None else np.clip(target + (at - step) / 100, 0, 1)
        curve = list(zip(at.tolist(), right.tolist(), strict=True))
        records.append(Record(0, {"sequence_accuracy": accuracy}, 1.0, 1e3, 10_000, 10, curve, {}))
    return records


def rated(kinds, target=0.5):
    """Records of a sweep in which every kind is best at the rate in the middle."""
    return {
        f"{kind}, {rate}": planted(*(steps * 2 if rate == 0.2 else [None] * 6), target=target)
        for kind, steps in kinds.items()
        for rate in (0.1, 0.2, 0.4)
    }


def test_each_kind_is_taken_at_its_best_rate_and_tested_on_other_seeds():
    found = {
        "a, 0.1": planted(100, 100, None, 10, 10),
        "a, 0.2": planted(200, 210, 220, 231, None),
        "a, 0.4": planted(300, 300, 310, 10, 10),
        "b, 0.1": planted(None, None, None, 10, accuracy=0.2),
        "b, 0.2": planted(None, None, None, None, accuracy=0.3),
    }
    a, b = learning.bests(found, 0.5).values()
    assert (a.rate, a.arrivals, a.at_end) == (0.2, [pytest.approx(231), None], False)
    assert (b.rate, b.arrivals) == (0.2, [None])
    del found["a, 0.4"]
    assert learning.bests(found, 0.5)["a"].at_end


def race(ours, theirs, seconds=(1.0,), at_end=(False, False)):
    """Two kinds; a step of the first takes 1 s, of the second `seconds`, one value per process."""
    times = [1.0] * len(seconds), seconds
    return tuple(
        learning.Best("x", 0.1, last, planted(*steps), [s and float(s) for s in steps], each)
        for steps, last, each in zip((ours, theirs), at_end, times, strict=True)
    )


def judged(*races):
    return [each.holds for each in learning.judge(dict(enumerate(races)))]


def test_who_wins_a_race_and_what_many_of_them_show():
    for ours, theirs, holds in (
        (QUICK, SLOW, True),
        (SLOW, QUICK, False),
        ((100, 200, 300), (105, 190, 310), None),
        (QUICK, (360, 380, None), True),
        ((100, 390, 390), (390, 390, None), None),  # their last step, 400, says little
        ((10, 11, None), (390, 395, 399), None),
        (SLOW, (100, 110, None), None),
        ((None,) * 3, (None,) * 3, None),
    ):
        assert judged(race(ours, theirs))[0] is holds, (ours, theirs)
    # Who loses at the last rate that was tried has not lost.
    for at_end, wins, loses in (((False, True), None, False), ((True, False), True, None)):
        found = [judged(race(*x, at_end=at_end))[0] for x in ((QUICK, SLOW), (SLOW, QUICK))]
        assert found == [wins, loses]
    # Fewer steps that take longer are no win in seconds.
    for ratios, holds in (([0.1, 0.11, 0.105], False), ([0.1, 10.0, 1.0], None)):
        assert judged(race(QUICK, SLOW, ratios)) == [True, holds]
    # Races and ratios are corrected for each other.
    close, noise = race((100, 110, 120), (110, 125, 130)), race((1, 200, 3), (300, 2, 100))
    assert [judged(close, *[noise] * n)[0] for n in (0, 9)] == [True, None]
    up, many = {"a": [1.0, 1.1, 1.3]}, {str(i): [1.0, -1.0, 0.1] for i in range(9)}
    for values, holds in ((up, True), (up | many, None), ({"a": [-1.0, -1.1, -1.3]}, False)):
        found = above_zero(values, Interval.text)[0]
        assert found.holds is holds
        assert ("; smallest detectable: " in found.found) is (holds is None)
    # What is not shown states what could have been, at the level of the smallest of ten p-values.
    size = paired(up["a"], np.zeros(3), 1.0 - 0.05 / 10).detectable
    said = above_zero(up | many, Interval.text)[0].found
    assert said.endswith(f"; smallest detectable: {size:.2f})")
    said = learning.judge({"close": close, "other": noise})[0].found
    assert said.endswith("; smallest detectable: 1.17 times)")


def measured(monkeypatch, found, times):
    """Sets the records of a sweep, and the seconds per step of some kinds."""
    steps = {name: times.get(name.split(", ")[0], [1.0, 1.1]) for name in found}
    monkeypatch.setattr(learning, "records", lambda *_: found)
    monkeypatch.setattr(learning, "step_times", lambda *_: steps)


@pytest.mark.parametrize("batch", [4, 128])
def test_convergence_is_judged_by_batch_depth_and_rival(setting, batch, monkeypatch):
    layer, none = (QUICK, SLOW) if batch == 4 else (SLOW, QUICK)
    steps = {"layer": layer, "batch": (100, 190, 150), "none": none}
    depths = ("4 layers", "1 layer")
    found = rated({f"{norm}, {n}": each for n in depths for norm, each in steps.items()})
    measured(monkeypatch, found, {"none": [0.1, 0.11]})
    verdicts = holding(learning.convergence(setting, batches=[batch]))
    # Against batch norm and none, in steps and seconds.
    assert [*verdicts.values()] == [None, None, batch == 4, False] * 2
    assert list(verdicts)[-1] == f"batch {batch}, 1 layer, against no norm, seconds"


def test_learning_is_judged_in_steps_and_in_seconds(setting, monkeypatch):
    found = rated({"transformer": QUICK, "lstm": (50, 55, 75), "gru": SLOW}, target=0.8)
    measured(monkeypatch, found, {"lstm": [9.0, 9.5], "gru": [9.0, 9.5]})
    verdicts = holding(learning.learning(setting))
    assert [*verdicts.values()] == [False, True, True, True]  # LSTM, GRU; steps, seconds


@pytest.mark.slow
def test_what_a_step_takes_is_measured_in_processes_of_their_own(data_dir, monkeypatch):
    monkeypatch.setattr(learning, "PROCESSES", 1)
    variants = ["transformer, 0.004", "lstm, 0.004"]
    found = learning.step_times("recurrence", variants, data_dir)
    assert list(found) == variants
    assert all(0.0 < each < 10.0 for (each,) in found.values())
    mine = os.sched_getaffinity(0)
    found = [timing.in_process(number, os.sched_getaffinity, 0) for number in (1, None)]
    assert found == [{min(mine)}, mine]


def test_the_layers_cost_what_the_page_says_and_are_timed_in_every_round():
    n, d = 24, 32
    products = {
        "attention core": 4 * n * n * d,
        "attention projections": 8 * n * d * d,
        "attention layer": 4 * n * n * d + 8 * n * d * d,
        "recurrent layer": 16 * n * d * d,
    }
    found = cost.measure([(part, n, d) for part in products], rounds=2)
    # The compiler counts the additions and divisions of the softmax, too.
    for (part, _, _), each in found.items():
        assert 1.0 <= each["FLOPs"][0] / (cost.ROWS * products[part]) < 1.1, part
    assert {len(each["time"]) for each in found.values()} == {2}


def test_growth_and_meeting_hold_for_the_laws_of_the_text_and_for_no_other(setting, monkeypatch):
    def judged(
        claim, core=lambda n, d: n * n * d, recurrent=lambda n, d: 4 * n * d * d, noise=0.01
    ):
        """What a claim says if costs are exactly these, times but for some noise."""
        rng = np.random.default_rng(0)

        def cost_of(part, n, d):
            projections = 2.0 * n * d * d * (part in ("attention projections", "attention layer"))
            value = projections + core(n, d) * (part in ("attention core", "attention layer"))
            value += recurrent(n, d) * (part == "recurrent layer")
            seconds = 1e-9 * value * np.exp(noise * rng.normal(size=5))
            return {"FLOPs": [value], "memory": [value], "time": seconds.tolist()}

        monkeypatch.setattr(cost, "measure", lambda sizes, _: {x: cost_of(*x) for x in sizes})
        return holding(claim(setting))

    assert set(judged(cost.growth).values()) == {True}
    found = judged(cost.growth, core=lambda n, d: n * d * d)
    core = [f"{what} of the attention core against" for what in ("FLOPs", "time", "memory")]
    wrong = [*(f"{each} {axis}" for each in core[:2] for axis in "nd"), f"{core[2]} n"]
    assert [case for case, holds in found.items() if not holds] == wrong
    noisy = judged(cost.growth, noise=1.0)
    assert None in noisy.values()
    assert noisy["FLOPs of the attention core against n"] is True
    for power, holds, where in ((1, False, "≥ 16"), (2, True, "> 256")):
        found = judged(cost.meeting, recurrent=lambda n, d, p=power: 4 * n * d**p, noise=1e-4)
        assert set(found.values()) == {holds}
        assert f" n {where} (attention core, d = 64)" in cost.meeting(setting).method


@pytest.mark.slow
def test_loops_are_as_long_as_the_text_says(setting, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # XLA's older generators make a loop of each lookup too
    claim = timing.in_process(None, partial(cost.sequential, setting, lengths=(4, 6)))
    assert verdict(claim.checks) == "holds"


def test_an_unrolled_or_a_looping_transformer_is_noticed(setting, monkeypatch):
    def compiled(function, *args):
        return jax.jit(partial(function, *args)).lower(x).compile().as_text()

    def loop(length, x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=length)[0]

    def judged(transformer, lstm):
        found = {"transformer": transformer, "lstm": lstm, "gru": loop}
        monkeypatch.setattr(cost, "compiled", lambda kind, n: compiled(found[kind], n))
        return list(holding(cost.sequential(setting, lengths=(4, 16))).values())

    x = jnp.ones((3, 3))
    assert judged(jnp.multiply, loop) == [True, True, True]
    assert judged(loop, jnp.multiply) == [False, False, True]
    unrolled = judged(lambda n, x: sum(jnp.sin(x @ x * i) for i in range(n)), loop)
    assert unrolled == [False, True, True]
    assert cost.trip_counts(compiled(lambda x: loop(9, loop(5, x)))) == [9, 5]
    endless = compiled(jax.lax.while_loop, lambda x: x.sum() < 1e6, lambda x: x @ x)
    with pytest.raises(ValueError, match="no known number"):
        cost.trip_counts(endless)


def test_times_and_gains_from_cores_are_measured_in_turns_and_compared(setting, monkeypatch):
    def process(cores, function, lengths):
        """The LSTM takes twice the Transformer's time, the GRU less up to n = 24."""
        asked.append(cores)
        return {
            (kind, n): n * each / gains[kind][(cores or 1) // 2] * (1 + 0.01 * rng.normal())
            for n in lengths
            for kind, each in {"transformer": 1, "lstm": 2, "gru": n / 24}.items()
        }

    rng, asked = np.random.default_rng(0), []
    gains = {"transformer": (1, 1.9, 3.5), "lstm": (1, 1.2, 1.3), "gru": (1, 2.5, 4.5)}
    monkeypatch.setattr(cost, "in_process", process)
    monkeypatch.setattr(cost, "cpu_cores", lambda: 5)
    found = holding(cost.parallel(setting, length=4))
    assert [*found.values()] == [True, True, False, False]  # LSTM, GRU; 2 and 4 cores
    found = holding(cost.wall_time(setting, lengths=(8, 16, 32, 64)))
    assert [*found.values()] == [True] * 4 + [False, False, True, True]
    assert asked == [1, 2, 4] * 5 + [None] * 5
    monkeypatch.delattr(os, "sched_setaffinity")
    assert verdict(cost.parallel(setting).checks) == "could not be measured here"
    small = Model(small_model(architecture="recurrent").config, cost.VOCABULARY)
    monkeypatch.setattr(cost, "model_of", lambda kind: small)
    assert 0.0 < cost.gradient_seconds((4,))["gru", 4] < 10.0


@pytest.mark.slow
def test_the_script_writes_the_page_and_keeps_the_claims_of_an_earlier_version(tmp_path):
    (folder := tmp_path / "claims").mkdir()
    shutil.copy("docs/results/claims/moments.json", folder)
    (folder / "wall_time.json").write_text((folder / "moments.json").read_text())
    out = finish(start("scripts/claims.py", "--only=probabilities,moments", f"--output={tmp_path}"))
    assert "Probabilities of masked values: holds" in out
    text = (tmp_path / "claims.md").read_text()
    anchors = ["probabilities-of-masked-values", *["mean-0-and-variance-1"] * 2]
    assert re.findall(r"\(#(.*?)\)", text) == anchors
    for picture in ("claims/probabilities.png", "claims/moments.png"):
        assert f"]({picture})" in text
        assert (tmp_path / picture).exists()
    assert text.count("| **no** |") == 6
    assert complaint("scripts/claims.py", "--only=momenst").endswith("(did you mean moments?)")
