"""Overrides at random: the front door starts a run, or refuses it with a line that names a knob.

FUZZ_TRIES=2000 pytest -m slow tests/test_fuzz.py tries more of them.
"""

import os

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from tests.helpers import data_config
from tests.test_programs import answer
from transformer.config import RunConfig, default_config, flat_knobs
from transformer.data.corpus import open_corpus
from transformer.data.toy import TASKS
from transformer.knobs import Choice

TRIES = int(os.environ.get("FUZZ_TRIES", "60"))
KNOBS = flat_knobs(default_config())
JUNK = ["", " ", "None", "nan", "abc", "☃", "a b", "'", '"', "{}", "[1]", "(1,)", "--", "=", "0x10"]
WHOLE = ["0", "-1", "1", "2", "3", "4", "7", "8", "16", "64", "100", "4294967296", "9" * 25, "1.5"]
NUMBERS = ["0", "0.0", "-0.1", "0.1", "0.5", "0.999", "1.0", "2", "1e-3", "1e30", "inf", "-inf"]
FLAGS = ["true", "false", "True", "1", "0", "yes"]
CHOICES = {k: list(c.table) for k, _, c in RunConfig().constrained() if isinstance(c, Choice)}
NAMES = [name for table in CHOICES.values() for name in table]
NAMES += ["float16", "Layer", "train[:10%]", "train[", "test+validation", "..", "/"]
TUPLES = ["()", "(1,)", "(1,2)", "(0.1,0.2)", "(1,'a')", "((1,),2)", "(", "(nan,1)", "(1,2,3)"]
# What a knob takes, so that runs start and the knobs meet inside of the step.
ENTRIES = CHOICES | {
    "model.num_layers": ["1", "2", "3"],  # each is traced
    **{"data.dataset": ["toy_strings"], "data.source": ["source"], "data.target": ["target"]},
    **{"data.target_tokenizer": CHOICES["data.tokenizer"], "data.size": ["tiny"]},
    **{"data.bleu_tokenizer": ["13a", "zh", "char"], "data.train": ["train", "train[:10%]"]},
    **{"init_from": ["runs/none"], "init_new": ["()", "('*',)"], "freeze": ["('encoder/*',)"]},
    **{"data.metrics": ["('bleu',)", "('chrf','exact_match')"], "decoding.prefix": ["", "a", "ab"]},
    **{"data.validation": ["validation", "test"], "data.test": ["test_longer", "train[:100]"]},
}
USUAL = {bool: ["true", "false"], float: ["0.0", "0.1", "0.5", "1e-3"]}
USUAL |= {int: ["1", "2", "3", "4", "8", "16", "64"], type(None): ["1", "2", "3", "4", "8", "16"]}
USUAL |= {tuple: ["()", "(1,2)", "(0.1,0.2)"]}


def values(name):
    kind = type(KNOBS[name])
    usual = st.sampled_from(ENTRIES.get(name) or USUAL[kind])
    strange = {bool: FLAGS, int: WHOLE, type(None): WHOLE, float: NUMBERS, str: NAMES}
    strange = st.sampled_from(strange.get(kind, TUPLES) + JUNK + WHOLE + NAMES)
    return st.integers(0, 9).flatmap(lambda n: usual if n else strange)


VALUES = {name: values(name) for name in KNOBS}  # a new knob without values fails here


@st.composite
def overrides(draw):
    names = draw(st.lists(st.sampled_from(sorted(KNOBS)), min_size=1, max_size=4, unique=True))
    pairs = [(name, draw(VALUES[name])) for name in names]
    if draw(st.integers(0, 19)) == 0:  # a misspelt one
        pairs[0] = (names[0][:-1] or "x", pairs[0][1])
    return pairs


@pytest.fixture(scope="module")
def prepared(data_dir):
    for task in TASKS:
        open_corpus(data_config(task=task), data_dir)
    return data_dir


def check(pairs, data_dir):
    first = [("data.size", "tiny")] if "data.size" not in dict(pairs) else []
    words = [f"--config.{name}={value}" for name, value in (*first, *pairs)]
    status, said = answer(["--config=configs/base.py", *words], data_dir)
    event(f"status {status}")
    lines = said.splitlines()
    assert (status, len(lines)) in ((0, 0), (2, 1)), said
    if lines:
        assert said.startswith("error: ")
        assert any(name.split(".")[-1] in said for name, _ in pairs), said


def fuzzed(tries):
    how = {"derandomize": tries < TRIES, "database": None, "deadline": None}
    how["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=tries, **how)


@fuzzed(8)
@given(pairs=overrides())
@example(pairs=[("data.metrics", "(1,)")])  # a traceback once
def test_overrides_start_a_run_or_are_refused_by_name(prepared, pairs):
    check(pairs, prepared)


@pytest.mark.slow
@fuzzed(TRIES)
@given(pairs=overrides())
def test_many_overrides_start_a_run_or_are_refused_by_name(prepared, pairs):
    check(pairs, prepared)
