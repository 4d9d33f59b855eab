"""The claims page: its rules, its measurements, and that it notices what is not so."""

import json
import os
import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_params, small_model, strings
from tests.test_programs import TINY, complaint, finish, start
from transformer import attention as attention_module
from transformer import costs, masking
from transformer.experiments.claims import (
    attention,
    complexity,
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
        ((False, False), "does not hold here"),
        ((), "could not be measured here"),
    ],
)
def test_the_verdict_follows_from_the_checks(holds, verdict):
    checks = [Check(f"case {i}", "", each) for i, each in enumerate(holds)]
    assert Claim("a", "b", "c", checks, "d.png").verdict() == verdict


def test_the_page_has_every_claim_and_the_numbers_are_beside_it(setting):
    planned = [
        Claim("A b, c", "says", "method", [Check("x", "1", True)], "p.png", ["| t |"], {"n": 1}),
        Claim("D", "says", "method", [Check("y", "2", False)], "q.png"),
    ]
    facts = {"command": "command", "devices": "cpu", "commit": None, "jax": "1"}
    path = page.write(planned, setting.folder, facts)
    text = path.read_text()
    assert path == setting.folder.parent / "claims.md"
    anchors = re.findall(r"\(#(.*?)\)", text)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert anchors == ["a-b-c", "d"]
    assert headings == ["A b, c", "D"]
    assert "| [D](#d) | says | **does not hold here** |" in text
    assert "(claims/q.png)" in text
    record = json.loads((setting.folder / "claims.json").read_text())
    assert [each["verdict"] for each in record["claims"]] == ["holds", "does not hold here"]
    assert record["claims"][0]["data"] == {"n": 1}


# Measuring


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_fit_finds_the_exponent_of_a_power_law(exponent, rng):
    x = np.array([8, 16, 32, 64, 128])
    exact = measuring.slope(x, 3.0 * x**exponent)
    np.testing.assert_allclose(exact, exponent)
    inside = 0
    for _ in range(500):
        fit = measuring.slope(x, x**exponent * np.exp(0.1 * rng.normal(size=5)))
        inside += fit.low <= exponent <= fit.high
    assert 460 <= inside <= 490  # 95% ± 3 standard errors


def test_a_crossing_is_where_the_lines_meet_and_none_is_made_up():
    x = np.array([16, 32, 64, 128])
    assert measuring.crossing(x, 4.0 * x**2, 160.0 * x) == pytest.approx(40.0)
    assert measuring.crossing(x, x**2, 1e9 * x) is None
    assert measuring.crossing(x, x**2, 1e-9 * x) is None


def loop_rounds(function, *args):
    return measuring.trip_counts(jax.jit(function).lower(*args).compile().as_text())


def test_trip_counts_are_the_lengths_of_the_loops():
    def scans(x):
        for length in (5, 9):
            x = jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=length)[0]
        return x

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
    assert "".join(order[-6:]) == "ababab"


def test_a_process_has_the_cores_that_it_is_given():
    assert measuring.on_cores(1, os.sched_getaffinity, 0) == {min(os.sched_getaffinity(0))}


# Attention


def test_the_future_has_no_gradient(setting):
    claim = attention.causality(setting, length=5, seeds=1)
    assert claim.verdict() == "holds"
    assert (setting.folder / claim.picture).stat().st_size > 10_000


def test_a_mask_that_lets_one_later_token_through_is_noticed(setting, monkeypatch):
    right = masking.causal
    monkeypatch.setattr(masking, "causal", lambda n: right(n, n, 1))
    assert attention.causality(setting, length=5, seeds=1).verdict() == "does not hold here"


def test_masked_keys_have_no_probability(setting):
    assert attention.probabilities(setting, length=8, seeds=1).verdict() == "holds"


def test_a_mask_that_only_lowers_scores_is_noticed(setting, monkeypatch):
    def soft(scores, mask):
        return jax.nn.softmax(jnp.where(mask, scores, scores - 10.0), axis=-1)

    monkeypatch.setattr(attention_module, "masked_softmax", soft)
    found = holding(attention.probabilities(setting, length=8, seeds=1))
    assert not found["causal mask, scores × 1"]


def test_the_distance_of_maps():
    same = np.tile(np.eye(3), (1, 2, 1, 1))
    apart = np.stack([np.eye(3), np.roll(np.eye(3), 1, axis=1)])[None]
    half = np.stack([np.eye(3), 0.5 * (np.eye(3) + np.roll(np.eye(3), 1, axis=1))])[None]
    real = np.ones((1, 3), bool)
    assert [attention.distance(maps, real) for maps in (same, apart, half)] == [0.0, 1.0, 0.5]
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


# Norms


def test_layer_norm_has_its_moments_but_where_epsilon_shows(setting):
    found = holding(norms.moments(setting, rows=64))
    assert not found["weights × 0.0001"]
    assert all(found[f"weights × {scale:g}"] for scale in (0.1, 1, 10, 10_000))
    assert found["one example's output, others of its batch changed"]


def test_a_norm_that_keeps_the_mean_is_noticed(setting, monkeypatch):
    monkeypatch.setattr(norms, "LayerNorm", RMSNorm)
    assert not holding(norms.moments(setting, rows=64))["weights × 1"]


def test_scales_are_those_of_the_stream(setting):
    found = holding(norms.same_scale(setting, layers=6, width=32))
    assert found == {
        "what sublayers read, post-norm": True,
        "what sublayers read, pre-norm": True,
        "the residual stream, post-norm": True,
        "the residual stream, pre-norm": False,
    }


# Sweeps


def planted(variant, steps, accuracy=0.9, curve=((50, 0.1), (100, 0.8))):
    """Records of a variant whose seeds arrive at these steps."""
    return [
        Record(Run(variant, seed), accuracy, 0.1, each, 1.0, 1e3, 10_000, 10, list(curve), {})
        for seed, each in enumerate(steps)
    ]


def test_each_kind_is_taken_at_its_best_rate():
    found = {
        "a, 0.1": planted("a, 0.1", [100, 100, None]),
        "a, 0.2": planted("a, 0.2", [300, 300, 310]),
        "a, 0.4": planted("a, 0.4", [200, 210, 220]),
        "b, 0.1": planted("b, 0.1", [None] * 3, accuracy=0.2),
        "b, 0.2": planted("b, 0.2", [None] * 3, accuracy=0.3),
    }
    best = sweeps.bests(found)
    assert {kind: each.rate for kind, each in best.items()} == {"a": 0.4, "b": 0.2}
    assert best["b"].steps() == []


def race(ours, theirs, ours_step=1.0, theirs_step=1.0):
    best = [sweeps.Best("x", 0.1, planted("x", steps)) for steps in (ours, theirs)]
    return sweeps.Race("x", *best, ours_step, theirs_step)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        ([100, 110, 120], [200, 205, 225], True),
        ([200, 205, 225], [100, 110, 120], False),
        ([100, 200, 300], [105, 190, 310], False),
        ([100, 110, 120], [200, 205, None], True),
        ([100, 110, None], [200, 205, 210], False),
        ([100, 110, None], [None, None, None], False),
    ],
)
def test_who_wins_a_race(ours, theirs, steps):
    assert sweeps.judge([race(ours, theirs)])[0].holds == steps


def test_fewer_steps_that_take_longer_are_no_win_in_seconds():
    checks = sweeps.judge([race([100, 110, 120], [200, 205, 225], ours_step=5.0)])
    assert [check.holds for check in checks] == [True, False]


def test_races_are_corrected_for_each_other():
    close = race([100, 110, 120], [104, 117, 121])
    alone, among = sweeps.judge([close]), sweeps.judge([close] + [race([1, 2, 3], [3, 2, 1])] * 9)
    p = [float(re.search(r"p (.*)\)", checks[0].found)[1]) for checks in (alone, among)]
    assert p[1] > p[0]


@pytest.mark.parametrize("name", ["convergence_4", "convergence_128", "recurrence"])
def test_every_kind_has_the_same_effort(name):
    rates = {}
    for variant in load_sweep(sweeps.file_of(name)).variants:
        kind, _, rate = variant.rpartition(", ")
        rates.setdefault(kind, []).append(rate)
    assert len({tuple(each) for each in rates.values()}) == 1


def test_convergence_is_judged_by_batch_depth_and_rival(setting):
    def variants(layer, none):
        return {
            f"{norm}, {depth}, 0.1": planted("", steps)
            for depth in ("4 layers", "1 layer")
            for norm, steps in (("layer", layer), ("batch", layer), ("none", none))
        }

    quick, slow = [100, 110, 120], [200, 205, 225]
    found = {"convergence_4": variants(quick, slow), "convergence_128": variants(slow, quick)}
    seconds = {sweep: {name: [1.0] for name in each} for sweep, each in found.items()}
    verdicts = holding(norms.judge_convergence(setting, found, seconds))
    assert len(verdicts) == 16
    for depth, unit in product(("4 layers", "1 layer"), ("steps", "seconds")):
        assert verdicts[f"batch 4, {depth}, against no norm, {unit}"]
        assert not verdicts[f"batch 4, {depth}, against batch norm, {unit}"]
        assert not verdicts[f"batch 128, {depth}, against no norm, {unit}"]


def test_learning_is_judged_in_steps_and_in_seconds(setting):
    found = {
        "transformer, 0.1": planted("", [100, 110, 120]),
        "lstm, 0.1": planted("", [50, 55, 75]),
        "gru, 0.1": planted("", [200, 205, 225]),
    }
    seconds = {"transformer, 0.1": [1.0], "lstm, 0.1": [9.0], "gru, 0.1": [9.0]}
    assert holding(recurrence.judge_learning(setting, found, seconds)) == {
        "against the LSTM, steps": False,
        "against the LSTM, seconds": True,
        "against the GRU, steps": True,
        "against the GRU, seconds": True,
    }


@pytest.mark.slow
def test_heads_are_judged_from_a_trained_population(setting, data_dir):
    folder = setting.root / "run"
    finish(
        start(
            *("train.py", *TINY, "--config.steps=40", "--config.replicas=2"),
            *(f"--workdir={folder}", f"--data_dir={data_dir}"),
        )
    )
    found = {
        name: planted("", [1, 2], accuracy=share)
        for name, share in (("1 head", 0.25), ("4 heads", 1.0))
    }
    setting = page.Setting(setting.root, data_dir, 1, setting.folder)
    claim = attention.judge_heads(setting, found, folder, examples=20)
    assert [len(claim.data[name]) for name in ("trained", "untrained")] == [2, 2]
    assert all(0.0 < each < 1.0 for seed in claim.data["trained"] for each in seed.values())
    assert holding(claim)["one head as wide as four loses accuracy"]


@pytest.mark.slow
def test_what_a_step_takes_is_measured_for_each_variant(data_dir):
    sweep = load_sweep(sweeps.file_of("recurrence"))
    variants = ["transformer, 0.004", "lstm, 0.004"]
    found = sweeps.seconds_a_step(sweep, variants, data_dir, rounds=2, steps=1)
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(variants, 2)


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


def laws(core=lambda n, d: n * n * d, recurrent=lambda n, d: 4 * n * d * d):
    """What measuring would give if costs were exactly these."""
    law = {
        "attention core": core,
        "attention projections": lambda n, d: 2 * n * d * d,
        "recurrent layer": recurrent,
    }
    return {
        (part, n, d): Measured(value := float(law[part](n, d)), value, [1e-9 * value] * 3)
        for part, n, d in complexity.all_sizes()
    }


def test_growth_holds_for_the_laws_of_the_text_and_for_no_other(setting):
    assert complexity.growth(setting, laws()).verdict() == "holds"
    found = holding(complexity.growth(setting, laws(core=lambda n, d: n * d * d)))
    failed = [case for case, holds in found.items() if not holds]
    assert failed == [
        f"{quantity} of the attention core against {axis}"
        for quantity, axes in (("FLOPs", "nd"), ("time", "nd"), ("memory", "n"))
        for axis in axes
    ]


def test_the_meeting_is_found_where_it_is(setting):
    claim = complexity.meeting(setting, laws())
    assert claim.verdict() == "holds"
    assert re.findall(r"n = (.*?) d", claim.tables[0]) == ["4.0", "2.0"] * 6
    slow = complexity.meeting(setting, laws(recurrent=lambda n, d: n * d))
    assert slow.verdict() == "does not hold here"


def test_sizes_are_measured_once_and_in_rounds():
    sizes = [("attention core", 8, 4), ("recurrent layer", 8, 4)]
    found = complexity.measure(sizes, rounds=2)
    assert list(found) == sizes
    assert all(len(each.seconds) == 2 and each.flops > 0 for each in found.values())


# Recurrence


def test_loops_are_as_long_as_the_text_says(setting):
    claim = recurrence.sequential(setting, lengths=(4, 6))
    assert claim.verdict() == "holds"
    assert claim.data["transformer"] == [[], []]


def test_the_kinds_have_about_equal_parameters():
    counts = [recurrence.model_of(kind).count_parameters() for kind in recurrence.KINDS]
    assert max(counts) < 1.05 * min(counts)


@pytest.mark.slow
def test_times_are_measured_for_each_kind(setting):
    claim = recurrence.wall_time(setting, lengths=(4, 6, 8, 10), rounds=2)
    assert len(claim.checks) == 8
    assert (setting.folder / claim.picture).exists()


def test_without_a_choice_of_cores_nothing_is_said_of_them(setting, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    claim = recurrence.parallel(setting)
    assert claim.verdict() == "could not be measured here"
    assert "![" not in page.section(claim, "claims")


# The script


@pytest.mark.slow
def test_the_script_writes_the_page(tmp_path):
    only = "--only=probabilities,moments"
    out = finish(start("scripts/claims.py", only, f"--output={tmp_path}"))
    assert "Masked values have no probability: holds" in out
    text = (tmp_path / "claims.md").read_text()
    pictures = re.findall(r"\((claims/.*?\.png)\)", text)
    assert pictures == ["claims/probabilities.png", "claims/moments.png"]
    assert all((tmp_path / each).exists() for each in pictures)
    refusal = complaint("scripts/claims.py", "--only=momenst")
    assert refusal.startswith("error: --only=momenst: choose one of causality, probabilities, ")
    assert refusal.endswith("(did you mean moments?)")
