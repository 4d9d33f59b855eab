"""The claims page: its rules, its measurements, and that it notices what is not so."""

import json
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params, small_model, strings
from tests.test_programs import TINY, complaint, finish, start
from transformer import costs, dot_product_attention, masking
from transformer.experiments.claims import (
    attention,
    complexity,
    judging,
    measuring,
    norms,
    page,
    recurrence,
    sweeps,
)
from transformer.experiments.claims.complexity import Measured
from transformer.experiments.claims.page import Check, Claim
from transformer.experiments.report import Record
from transformer.experiments.sweep import Run, load_sweep
from transformer.normalization import RMSNorm


@pytest.fixture
def setting(tmp_path):
    folder = tmp_path / "claims"
    folder.mkdir()
    return page.Setting(tmp_path, None, 1, folder)


def holding(claim):
    """Case → whether it holds."""
    return {check.case: check.holds for check in claim.checks}


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        ((True, True), "holds"),
        ((True, False), "holds with a condition; not for: case 1"),
        ((True, None, False), "holds with a condition; not for: case 2; undecided: case 1"),
        ((False, None), "does not hold here"),
        (
            (True,) + (None,) * 4 + (False,),
            "holds with a condition: in 1 of 6 cases, not in 1, undecided in 4",
        ),
        ((), "could not be measured here"),
    ],
)
def test_the_verdict_follows_from_the_checks(holds, verdict):
    checks = [Check(f"case {i}", "", each) for i, each in enumerate(holds)]
    assert page.verdict(checks) == verdict


def test_the_page_has_every_claim_that_was_measured_whenever_that_was(setting):
    first = Claim("x", "A b, c", "says", "method", [Check("u", "1", True)], ["| t |"], {"n": 1})
    second = Claim("y", "D", "says", "method", [Check("v", "2", False), Check("w", "3", None)])
    facts = {"devices": "cpu", "commit": None, "jax": "1"}
    (setting.folder / "x.png").touch()
    page.store(second, setting.folder, facts)
    page.store(first, setting.folder, facts)
    path = page.write(setting.folder, ["x", "y", "z"])
    text = path.read_text()
    assert path == setting.folder.parent / "claims.md"
    assert re.findall(r"\(#(.*?)\)", text) == ["a-b-c", "d"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["A b, c", "D"]
    assert "| [D](#d) | says | **does not hold here** |" in text
    assert "| v | 2 | **no** |\n| w | 3 | undecided |" in text
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["claims/x.png"]
    record = json.loads((setting.folder / "x.json").read_text())
    assert record["data"] == {"n": 1}


# Measuring


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_fit_finds_the_exponent_of_a_power_law(exponent):
    x = np.array([8, 16, 32, 64, 128])
    assert measuring.slope(x, 3.0 * x**exponent) == pytest.approx(exponent)


def test_a_crossing_is_where_the_lines_meet_and_none_is_made_up():
    x = np.array([16, 32, 64, 128])
    assert measuring.crossing(x, 4.0 * x**2, 160.0 * x) == pytest.approx(40.0)
    assert measuring.crossing(x, x**2, 1e9 * x) == np.inf
    assert measuring.crossing(x, x**2, 1e-9 * x) == 0.0
    assert complexity.where(0.0, 64) == "below 0.25 d"
    assert complexity.where(np.inf, 64) == "beyond 8 d"
    assert complexity.where(96.0, 64) == "1.5 d"


def loop_rounds(function, *args):
    return measuring.trip_counts(jax.jit(function).lower(*args).compile().as_text())


def scan(x, length):
    return jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=length)[0]


def test_trip_counts_are_the_lengths_of_the_loops():
    def scans(x):
        return scan(scan(x, 5), 9)

    x = jnp.ones((3, 3))
    assert loop_rounds(scans, x) == [9, 5]
    assert loop_rounds(jnp.sin, x) == []
    with pytest.raises(ValueError, match="no known number"):
        loop_rounds(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x), x)


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measuring.interleaved(calls, rounds=3, shortest=0.0)
    assert {name: len(each) for name, each in found.items()} == {"a": 3, "b": 3}
    assert [sorted(order[-6:][i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3


def test_a_process_has_the_cores_that_it_is_given():
    mine = os.sched_getaffinity(0)
    assert measuring.in_a_process(1, os.sched_getaffinity, 0) == {min(mine)}
    assert measuring.in_a_process(None, os.sched_getaffinity, 0) == mine


# Attention


def test_the_future_has_no_gradient(setting):
    claim = attention.causality(setting, length=5, seeds=1)
    assert page.verdict(claim.checks) == "holds"
    assert (setting.folder / f"{claim.name}.png").stat().st_size > 10_000


def test_a_mask_that_lets_one_later_token_through_is_noticed(setting, monkeypatch):
    right = masking.causal
    monkeypatch.setattr(masking, "causal", lambda n, keys, offset: right(n, keys, offset + 1))
    found = holding(attention.causality(setting, length=5, seeds=1))
    assert not any(found[f"backend {name}"] for name in ("auto", "einsum", "xla", "chunked"))
    assert found["backend splash"]  # the kernel has a mask of its own


def test_masked_keys_have_no_probability(setting):
    assert page.verdict(attention.probabilities(setting, length=8, seeds=1).checks) == "holds"


def test_a_mask_that_only_lowers_scores_is_noticed(setting, monkeypatch):
    def soft(scores, mask):
        return jax.nn.softmax(jnp.where(mask, scores, scores - 10.0), axis=-1)

    monkeypatch.setattr(dot_product_attention, "masked_softmax", soft)
    found = holding(attention.probabilities(setting, length=8, seeds=1))
    assert not found["causal mask, backend einsum, scores × 1"]
    assert found["causal mask, backend xla, scores × 1"]  # it has a softmax of its own


def test_the_distance_of_the_two_heads_most_alike():
    same = np.tile(np.eye(3), (1, 2, 1, 1))
    apart = np.stack([np.eye(3), np.roll(np.eye(3), 1, axis=1)])[None]
    half = np.stack([np.eye(3), 0.5 * (np.eye(3) + np.roll(np.eye(3), 1, axis=1))])[None]
    real = np.ones((1, 3), bool)
    assert [attention.distance(maps, real) for maps in (same, apart, half)] == [0.0, 1.0, 0.5]
    three = np.concatenate([apart, half[:, 1:]], axis=1)
    assert attention.distance(three, real) == 0.5
    apart[0, 1, 2] = apart[0, 0, 2]  # the same where there is padding
    assert attention.distance(apart, np.array([[True, True, False]])) == 1.0


def test_without_its_cross_heads_a_model_does_not_see_the_source():
    model = small_model(layers=2)
    variables = random_params(model, 0)

    def difference(variables):
        one, other = (
            model.bind(variables)(b.source, b.source_segments, b.target_in, b.target_segments)
            for b in (strings(("abc", "cba")), strings(("xyz", "cba")))
        )
        return float(jnp.abs(one - other).max())

    assert difference(variables) > 0.01
    for head in range(2):
        variables = attention.without_head(variables, "cross", head)
        assert (difference(variables) == 0.0) == (head == 1)


@pytest.mark.parametrize(
    ("kind", "where"),
    [("encoder", "encoder"), ("decoder", "decoder.*self"), ("cross", "decoder.*cross")],
)
def test_a_head_is_silenced_in_its_own_kind_of_attention(kind, where):
    model = small_model(layers=2)
    variables = random_params(model, 0)
    silent = attention.without_head(variables, kind, 1)
    changed = {name for name in variables if not (silent[name] == variables[name]).all()}
    assert changed == {
        f"{stack}/layers/{i}/{attention_}/out/kernel"
        for i in range(2)
        for stack in ("encoder", "decoder")
        for attention_ in ("self_attention", "cross_attention")
        if re.match(where, f"{stack} {attention_}")
        and (stack, attention_) != ("encoder", "cross_attention")
    }


def test_heads_are_judged_by_distance_by_loss_and_by_number(setting):
    kinds = attention.KINDS
    heads = attention.Heads(
        trained={kind: [0.5, 0.6, 0.7] for kind in kinds},
        untrained={kind: [0.1, 0.2, 0.31] for kind in kinds},
        lost={
            (kind, rank): [9.0 / rank, 10.0 / rank, 11.0 / rank]
            for kind in kinds
            for rank in (1, 2)
        },
    )
    accuracy = {"1 head": [90.0, 91.0, 89.0], "4 heads": [95.0, 96.5, 93.5]}
    assert page.verdict(attention.judge_heads(setting, heads, accuracy).checks) == "holds"
    swapped = {"1 head": accuracy["4 heads"], "4 heads": accuracy["1 head"]}
    found = holding(attention.judge_heads(setting, heads, swapped))
    assert [case for case, holds in found.items() if holds is False] == [
        "points lost with one head as wide as four"
    ]
    alike = heads._replace(trained={kind: [0.01, 0.02, 0.03] for kind in kinds})
    found = holding(attention.judge_heads(setting, alike, accuracy))
    assert [case for case, holds in found.items() if not holds] == [
        case for case in found if "apart" in case
    ]


# Norms


def test_layer_norm_has_its_moments_but_where_epsilon_shows(setting):
    found = holding(norms.moments(setting, rows=64))
    assert not found["weights × 0.0001"]
    assert all(found[f"weights × {scale:g}"] for scale in (0.1, 1, 10, 10_000))
    assert found["one example's output, others of its batch changed"]


def test_a_norm_that_keeps_the_mean_is_noticed(setting, monkeypatch):
    monkeypatch.setattr(norms, "LayerNorm", RMSNorm)
    assert not holding(norms.moments(setting, rows=64))["weights × 1"]


def test_batch_norm_is_not_like_it(setting, monkeypatch):
    assert all(
        holds
        for case, holds in holding(norms.moments(setting, rows=64)).items()
        if "batch norm" in case
    )
    monkeypatch.setattr(norms, "BatchNorm", norms.LayerNorm)  # were it layer norm itself
    monkeypatch.setattr(norms.LayerNorm, "mean", np.zeros(64), raising=False)
    monkeypatch.setattr(norms.LayerNorm, "variance", np.zeros(64), raising=False)
    found = holding(norms.moments(setting, rows=64))
    assert [found[case] for case in found if "batch" in case] == [False] * 3


def test_scales_are_those_of_the_stream(setting):
    model = small_model(layers=4)
    found = norms.judge_scales(setting, [(model, random_params(model, 0))], layers=6, width=32)
    assert holding(found) == {
        "what attention reads, post-norm": True,
        "what attention reads, pre-norm": True,
        "what attention reads, pre-norm, trained": True,
        "the residual stream, post-norm": True,
        "the residual stream, pre-norm": False,
        "the residual stream, pre-norm, trained": False,
    }


# Sweeps


def planted(*steps, accuracy=0.9, target=0.5):
    """Records of a variant whose seeds arrive at the target at these steps, or never."""
    records = []
    for seed, step in enumerate(steps):
        curve = [(at, 0.0 if step is None or at < step else 1.0) for at in range(10, 410, 10)]
        if step is not None:  # the evaluations before and after, to either side of the target
            low = step // 10 * 10
            curve = [
                (at, target + (at - step) / 100 if at in (low, low + 10) else y) for at, y in curve
            ]
        records.append(Record(Run("", seed), accuracy, 0.1, None, 1.0, 1e3, 10_000, 10, curve, {}))
    return records


@pytest.mark.parametrize("step", [14, 123, 387])
def test_a_run_arrives_where_its_curve_crosses_the_target(step):
    (record,) = planted(step)
    assert judging.arrival(record, 0.5) == pytest.approx(step)
    assert judging.arrival(record, 1.1) is None
    assert judging.arrival(planted(None)[0], 0.5) is None


def test_each_kind_is_taken_at_its_best_rate_and_tested_on_other_seeds():
    found = {
        "a, 0.1": planted(100, 100, None, 10, 10),
        "a, 0.2": planted(200, 210, 220, 231, None),
        "a, 0.4": planted(300, 300, 310, 10, 10),
        "b, 0.1": planted(None, None, None, 10, accuracy=0.2),
        "b, 0.2": planted(None, None, None, None, accuracy=0.3),
        "b, 0.4": planted(None, None, None, 10, accuracy=0.2),
    }
    best = judging.bests(found, 0.5)
    assert {kind: each.rate for kind, each in best.items()} == {"a": 0.2, "b": 0.2}
    assert best["a"].arrivals == [pytest.approx(231), None]
    assert not best["a"].at_end
    assert best["b"].arrived() == []
    found.pop("a, 0.4")
    assert judging.bests(found, 0.5)["a"].at_end


def race(ours, theirs, step_times=(0.0,), ours_at_end=False, theirs_at_end=False):
    best = [
        judging.Best("x", 0.1, at_end, planted(*steps), [s and float(s) for s in steps], 400)
        for steps, at_end in ((ours, ours_at_end), (theirs, theirs_at_end))
    ]
    return judging.Race("x", *best, step_times)


QUICK, SLOW = (100, 110, 120), (200, 205, 225)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        (QUICK, SLOW, True),
        (SLOW, QUICK, False),
        ((100, 200, 300), (105, 190, 310), None),
        (QUICK, (360, 380, None), True),
        ((100, 390, 390), (390, 390, None), None),  # their last step, 400, says little
        ((100, 110, None), SLOW, None),
        ((10, 11, None), (390, 395, 399), None),
        (SLOW, (100, 110, None), None),
        ((None,) * 3, (None,) * 3, None),
    ],
)
def test_who_wins_a_race(ours, theirs, steps):
    assert judging.judge([race(ours, theirs)])[0].holds is steps


def test_who_loses_at_the_last_rate_that_was_tried_has_not_lost():
    assert judging.judge([race(QUICK, SLOW, theirs_at_end=True)])[0].holds is None
    assert judging.judge([race(QUICK, SLOW, ours_at_end=True)])[0].holds is True
    assert judging.judge([race(SLOW, QUICK, ours_at_end=True)])[0].holds is None
    assert judging.judge([race(SLOW, QUICK, theirs_at_end=True)])[0].holds is False


def test_fewer_steps_that_take_longer_are_no_win_in_seconds():
    longer = tuple(np.log([0.1, 0.11, 0.105]))  # theirs take a tenth of ours
    assert [each.holds for each in judging.judge([race(QUICK, SLOW, longer)])] == [True, False]
    unsure = tuple(np.log([0.1, 10.0, 1.0]))
    assert [each.holds for each in judging.judge([race(QUICK, SLOW, unsure)])] == [True, None]


def test_races_and_ratios_are_corrected_for_each_other():
    close, noise = race((100, 110, 120), (110, 125, 130)), race((1, 200, 3), (300, 2, 100))
    (alone, *_), (among, *_) = (judging.judge([close] + [noise] * n) for n in (0, 9))
    assert (alone.holds, among.holds) == (True, None)
    values = {"a": [1.0, 1.1, 1.3]}
    many = values | {str(i): [1.0, -1.0, 0.1] for i in range(9)}
    assert judging.above_zero(values, judging.shown)[0].holds is True
    assert judging.above_zero(many, judging.shown)[0].holds is None
    assert judging.above_zero({"a": [-1.0, -1.1, -1.3]}, judging.shown)[0].holds is False


@pytest.mark.parametrize("name", ["convergence_4", "convergence_128", "recurrence"])
def test_every_kind_has_the_same_effort(name):
    rates = {}
    for variant, overrides in load_sweep(sweeps.file_of(name)).variants.items():
        kind, _, rate = variant.rpartition(", ")
        assert float(rate) == overrides["optimizer.learning_rate"]
        rates.setdefault(kind, []).append(rate)
    assert len({tuple(each) for each in rates.values()}) == 1
    assert load_sweep(sweeps.file_of(name)).seeds >= judging.CHOOSING + 5


def rated(**kinds):
    """Sweep records in which every kind is best at the rate in the middle."""
    never = [None] * 6
    return {
        f"{kind}, {rate}": planted(*(steps * 2 if rate == 0.2 else never), target=0.8)
        for kind, steps in kinds.items()
        for rate in (0.1, 0.2, 0.4)
    }


def test_convergence_is_judged_by_batch_depth_and_rival(setting):
    def variants(layer, none):
        return {
            f"{norm}, {depth}, {rate}": planted(*(steps * 2 if rate == 0.2 else [None] * 6))
            for depth in ("4 layers", "1 layer")
            for norm, steps in (("layer", layer), ("batch", (100, 190, 150)), ("none", none))
            for rate in (0.1, 0.2, 0.4)
        }

    found = {"convergence_4": variants(QUICK, SLOW), "convergence_128": variants(SLOW, QUICK)}
    times = {
        sweep: {name: [0.1, 0.11] if "none" in name else [1.0, 1.1] for name in each}
        for sweep, each in found.items()
    }
    verdicts = holding(norms.judge_convergence(setting, found, times))
    assert len(verdicts) == 16
    for depth in ("4 layers", "1 layer"):
        assert verdicts[f"batch 4, {depth}, against no norm, steps"] is True
        assert verdicts[f"batch 4, {depth}, against no norm, seconds"] is False
        assert verdicts[f"batch 128, {depth}, against no norm, steps"] is False
        assert verdicts[f"batch 4, {depth}, against batch norm, steps"] is None


def test_learning_is_judged_in_steps_and_in_seconds(setting):
    found = rated(transformer=QUICK, lstm=(50, 55, 75), gru=SLOW)
    times = {name: [1.0, 1.1] if "transformer" in name else [9.0, 9.5] for name in found}
    claim = recurrence.judge_learning(setting, found, times)
    assert holding(claim) == {
        "against the LSTM, steps": False,
        "against the LSTM, seconds": True,
        "against the GRU, steps": True,
        "against the GRU, seconds": True,
    }
    assert claim.data["arrivals"]["lstm, 0.2"][:3] == pytest.approx([50, 55, 75])


@pytest.mark.slow
def test_the_heads_of_a_trained_population_are_measured(setting, data_dir):
    folder = setting.root / "run"
    finish(
        start(
            *("train.py", *TINY, "--config.steps=40", "--config.replicas=2"),
            *(f"--workdir={folder}", f"--data_dir={data_dir}"),
        )
    )
    heads = attention.measure_heads(folder, data_dir, examples=20)
    for each in (heads.trained, heads.untrained):
        assert all(0.0 < apart < 1.0 for seeds in each.values() for apart in seeds)
    assert all(len(seeds) == 2 for each in heads for seeds in each.values())
    assert heads.trained != heads.untrained
    assert set(heads.lost) == {(kind, rank) for kind in attention.KINDS for rank in (1, 2)}


@pytest.mark.slow
def test_what_a_step_takes_is_measured_in_processes_of_their_own(data_dir, monkeypatch):
    variants = ["transformer, 0.004", "lstm, 0.004"]
    found = sweeps.step_times("recurrence", variants, data_dir, processes=1)
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(variants, 1)
    assert all(0.0 < each < 10.0 for (each,) in found.values())


# Complexity


@pytest.mark.parametrize(
    ("part", "exact"),
    [
        ("attention core", lambda n, d: 4 * n * n * d),
        ("attention projections", lambda n, d: 8 * n * d * d),
        ("recurrent layer", lambda n, d: 16 * n * d * d),
    ],
)
def test_the_layers_cost_what_the_page_says(part, exact):
    n, d = 24, 32
    function, args = complexity.layer(part, n, d)
    assert costs.matmul_flops(function, *args) == complexity.ROWS * exact(n, d)
    program = jax.jit(function).lower(*args).compile()
    # The compiler's count has the rest too, such as softmax and gates.
    ratio = complexity.compiled_flops(program, part, n, d) / (complexity.ROWS * exact(n, d))
    assert 1.0 <= ratio < 1.15


def laws(core=lambda n, d: n * n * d, recurrent=lambda n, d: 4 * n * d * d, noise=0.01):
    """What measuring would give if costs were exactly these, times but for some noise."""
    law = {
        "attention core": core,
        "attention projections": lambda n, d: 2 * n * d * d,
        "attention layer": lambda n, d: core(n, d) + 2 * n * d * d,
        "recurrent layer": recurrent,
    }
    rng = np.random.default_rng(0)
    found = {}
    for part, n, d in {*complexity.growth_sizes(), *complexity.meeting_sizes()}:
        value = float(law[part](n, d))
        seconds = (1e-9 * value * np.exp(noise * rng.normal(size=5))).tolist()
        found[part, n, d] = Measured(value, value, seconds)
    return found


def test_growth_holds_for_the_laws_of_the_text_and_for_no_other(setting):
    assert page.verdict(complexity.judge_growth(setting, laws()).checks) == "holds"
    found = holding(complexity.judge_growth(setting, laws(core=lambda n, d: n * d * d)))
    assert [case for case, holds in found.items() if not holds] == [
        "FLOPs of the attention core against n",
        "FLOPs of the attention core against d",
        "time of the attention core against n",
        "time of the attention core against d",
        "memory of the attention core against n",
    ]
    noisy = holding(complexity.judge_growth(setting, laws(noise=1.0)))
    assert None in noisy.values()
    assert noisy["FLOPs of the attention core against n"] is True


def test_the_meeting_is_found_where_it_is(setting):
    claim = complexity.judge_meeting(setting, laws(noise=0.0001))
    assert page.verdict(claim.checks) == "holds"
    assert re.findall(r" ([0-9.]+) d", claim.tables[0]) == (["4.0"] * 4 + ["2.0"] * 4) * 3
    slow = complexity.judge_meeting(setting, laws(recurrent=lambda n, d: n * d))
    assert set(holding(slow).values()) == {False}
    assert "below 0.25 d" in slow.tables[0]


def test_every_size_is_measured_in_every_round():
    sizes = [("attention core", 8, 4), ("recurrent layer", 8, 4), ("attention layer", 8, 4)]
    found = complexity.measure(sizes, rounds=2)
    assert list(found) == sizes
    assert all(len(each.seconds) == 2 and each.flops > 0 for each in found.values())


# Recurrence


def test_loops_are_as_long_as_the_text_says(setting, monkeypatch):
    """XLA's older code generators would make a loop of each lookup too."""
    monkeypatch.setenv("XLA_FLAGS", "")
    sequential = partial(recurrence.sequential, setting, lengths=(4, 6))
    claim = measuring.in_a_process(None, sequential)
    assert page.verdict(claim.checks) == "holds"
    assert claim.data["transformer"] == [[], []]


def test_an_unrolled_or_a_looping_transformer_is_noticed(setting):
    def text(function, *args):
        return jax.jit(function).lower(*args).compile().as_text()

    def unrolled(x, n):
        for i in range(n):
            x = jnp.sin(x @ x) * i
        return x

    x, lengths = jnp.ones((3, 3)), (4, 16)
    loop = {n: text(lambda x, n=n: scan(x, n), x) for n in lengths}
    straight = dict.fromkeys(lengths, text(jnp.sin, x))
    unrolled_ = {n: text(lambda x, n=n: unrolled(x, float(n) and n), x) for n in lengths}

    def judged(transformer, lstm=loop, gru=loop):
        programs = {
            (kind, n): each[n]
            for kind, each in zip(recurrence.KINDS, (transformer, lstm, gru), strict=True)
            for n in lengths
        }
        return holding(recurrence.judge_sequential(setting, lengths, programs))

    assert judged(straight) == {"transformer": True, "lstm": True, "gru": True}
    assert judged(loop)["transformer"] is False
    assert judged(unrolled_)["transformer"] is False
    assert judged(straight, lstm=straight)["lstm"] is False


def test_the_kinds_have_about_equal_parameters():
    counts = [recurrence.model_of(kind).count_parameters() for kind in recurrence.KINDS]
    assert max(counts) < 1.05 * min(counts)


def test_times_are_judged_at_each_length(setting):
    lengths, rng = (8, 16, 32, 64), np.random.default_rng(0)
    found = {("transformer", n): (n * (1 + 0.01 * rng.normal(size=5))).tolist() for n in lengths}
    found |= {("lstm", n): [2.0 * each for each in found["transformer", n]] for n in lengths}
    found |= {("gru", n): [n * n / 24 * (1 + 0.01 * rng.random())] * 5 for n in lengths}
    claim = recurrence.judge_wall_time(setting, lengths, found)
    assert holding(claim) == {
        **{f"lstm, n = {n}": True for n in lengths},
        "gru, n = 8": False,
        "gru, n = 16": False,
        "gru, n = 32": True,
        "gru, n = 64": True,
    }


def test_gains_from_cores_are_compared(setting):
    rng = np.random.default_rng(0)
    gains = {"transformer": {1: 1, 2: 1.9, 4: 3.5}, "lstm": {1: 1, 2: 1.2, 4: 1.3}}
    gains["gru"] = {1: 1, 2: 2.5, 4: 4.5}
    found = {
        (kind, cores): [10 / gain * (1 + 0.01 * rng.normal()) for _ in range(5)]
        for kind, each in gains.items()
        for cores, gain in each.items()
    }
    assert holding(recurrence.judge_parallel(setting, 64, [1, 2, 4], found)) == {
        "2 cores, against the LSTM": True,
        "4 cores, against the LSTM": True,
        "2 cores, against the GRU": False,
        "4 cores, against the GRU": False,
    }


def test_gradients_are_timed_on_so_many_cores_in_turns(setting, monkeypatch):
    asked = []

    def process(cores, function, kinds, lengths, rounds):
        asked.append(cores)
        return {
            (kind, n): (1.0 + 0.1 * len(asked)) / (cores or 1) for kind in kinds for n in lengths
        }

    monkeypatch.setattr(recurrence, "in_a_process", process)
    monkeypatch.setattr(recurrence, "cores", lambda: 5)
    claim = recurrence.parallel(setting, length=4, processes=2)
    assert asked == [1, 2, 4, 1, 2, 4]
    assert {name: len(each) for name, each in claim.data.items()} == {
        f"{kind}, {cores} cores": 2 for kind in recurrence.KINDS for cores in (1, 2, 4)
    }
    assert set(holding(claim).values()) == {None}  # all gain alike
    claim = recurrence.wall_time(setting, lengths=(4, 8, 16, 32), processes=3)
    assert asked[6:] == [None] * 3
    assert set(holding(claim).values()) == {None}


def test_gradients_are_timed():
    found = recurrence.gradient_seconds(("gru",), (4,), 1)
    assert 0.0 < found["gru", 4] < 10.0


def test_without_a_choice_of_cores_nothing_is_said_of_them(setting, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    claim = recurrence.parallel(setting)
    assert page.verdict(claim.checks) == "could not be measured here"


# The script


@pytest.mark.slow
def test_the_script_writes_the_page(tmp_path):
    only = "--only=probabilities,moments"
    out = finish(start("scripts/claims.py", only, f"--output={tmp_path}"))
    assert "Probabilities of masked values: holds" in out
    text = (tmp_path / "claims.md").read_text()
    pictures = re.findall(r"\((claims/.*?\.png)\)", text)
    assert pictures == ["claims/probabilities.png", "claims/moments.png"]
    assert all((tmp_path / each).exists() for each in pictures)
    refusal = complaint("scripts/claims.py", "--only=momenst")
    assert refusal.startswith("error: --only=momenst: choose one of causality, probabilities, ")
    assert refusal.endswith("(did you mean moments?)")
