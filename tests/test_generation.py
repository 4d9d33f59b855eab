"""From texts to texts, by a model whose parameters are drawn instead of trained."""

import re
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_average
from tests.helpers import TOKENIZER, logits_of, maps_of, random_params, refused, strings
from tests.test_programs import ROOT
from transformer import load
from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.text import cleaned
from transformer.data.tokenizer import EOS, Tokenizer
from transformer.inference.decoding import DecodingConfig, DecodingOptions
from transformer.inference.generation import Output, TrainedModel, bucket
from transformer.modules.model import Model
from transformer.parallel.mesh import one_device_mesh
from transformer.training.step import TrainState
from transformer.workdir import Workdir

REACH, MARGIN = 20, 4  # positions
BEAM: dict[str, Any] = {"beam_size": 5}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}
# Of several lengths, so of several programs; two are the same; 18 tokens are more than 16.
TEXTS = ["abcde", "", "q", "zyxwvutsrqponmlkj", "abcde", "fedcba"]


def make_run(
    folder: Any,
    replicas: int = 1,
    tokenizer: Tokenizer = TOKENIZER,
    kind: str = "transformer",
    **changes: Any,
) -> Workdir:
    """The folder of a run that was never trained, of so many replicas."""
    knobs: dict[str, Any] = {"replicas": replicas, "decode_margin": MARGIN, "model.num_layers": 1}
    knobs["model.architecture"] = kind
    knobs |= {"model.position_encoding": "learned", "model.max_length": REACH}
    knobs |= {"model.tie_embeddings": "none"}
    knobs["data.tokenizer"] = "characters" if tokenizer is TOKENIZER else "bytes"
    knobs |= changes

    def state(model: Model, like: TrainState, *_: Any) -> TrainState:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        each = [params_of(model, seed, tokenizer) for seed in range(replicas)]
        params = {name: np.stack([one[name] for one in each]) for name in like.params}
        params = {name: x.reshape(like.params[name].shape) for name, x in params.items()}
        where = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.device_put(zeros._replace(params=params), where)

    return test_average.make_run(folder, None, (0,), tokenizer, state, **knobs)[0]


def params_of(model: Model, seed: int, tokenizer: Tokenizer = TOKENIZER) -> dict[str, Any]:
    """Random ones, by which outputs vary, end, and hold no special tokens."""
    params = random_params(model, seed)
    if model.config.architecture == "recurrent":
        return params
    names = ("decoder/final_norm/scale", "decoder/final_norm/bias", "output_embedding/embedding")
    changed = {name: np.array(params[name]) for name in names}
    gain, bias, table = changed.values()
    gain[0], bias[0] = 0.0, 1.0  # one feature is 1: what reads it is a bias
    table[:, 0] = -50.0
    table[EOS : len(tokenizer.pieces), 0] = 0.0
    table[EOS, 0] = 1.0
    return params | jax.tree.map(jnp.asarray, changed)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def trained(run) -> TrainedModel:
    return load(str(run.path), mesh=one_device_mesh())


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("runs") / "recurrent"
    return load(str(make_run(folder, kind="recurrent").path), mesh=one_device_mesh())


@pytest.fixture(params=["transformer", "recurrent"])
def each_kind(request) -> TrainedModel:
    """A model of each architecture."""
    of = {"transformer": "trained"}
    return request.getfixturevalue(of.get(request.param, request.param))


@pytest.fixture(scope="module")
def found(trained) -> dict[str, list[list[Output]]]:
    """Outputs of `TEXTS`, all that come."""
    asked = {"greedy": ({}, 1), "drawn": (DRAWN, 3), "beam": (BEAM, 5)}
    return {name: trained.generate(TEXTS, **x, n_best=n) for name, (x, n) in asked.items()}


def check_alike(one: list[list[Output]], other: list[list[Output]]) -> None:
    """The same texts, with scores that are so to rounding."""
    for own, wanted in zip(one, other, strict=True):
        assert [each.text for each in own] == [each.text for each in wanted]
        scores = [[each.score for each in outputs] for outputs in (own, wanted)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


def room(text: str) -> int:  # in tokens of its output
    return min(len(text) + 1 + MARGIN, REACH)


def test_outputs_depend_on_neither_batches_nor_devices(run, trained, found):
    """Though those of like length are decoded together, in whatever batches and on all devices."""
    for name in ("greedy", "beam"):
        check_alike([found[name][0]], [found[name][4]])  # of the same text
    for i in (2, 3):
        check_alike(trained.generate([TEXTS[i]]), [found["greedy"][i]])
    assert len({output.text for (output,) in found["greedy"]}) > 2
    check_alike(trained.generate(TEXTS, **DRAWN, n_best=3, batch_size=4), found["drawn"])
    check_alike(trained.generate(TEXTS, **BEAM, n_best=5, batch_size=2), found["beam"])
    check_alike(load(str(run.path)).generate(TEXTS[:3], **DRAWN, n_best=3), found["drawn"][:3])
    # What is drawn depends on a text's number and the seed.
    check_alike(trained.generate(TEXTS[2:], **DRAWN, n_best=3, offset=2), found["drawn"][2:])
    first, again = found["drawn"][0], found["drawn"][4]  # of the same text
    other = trained.generate(TEXTS[:1], temperature=1.0, seed=6, n_best=3)[0]
    assert len({tuple(output.text for output in own) for own in (first, again, other)}) == 3
    # Lengths have some room, and few widths.
    widths = bucket(lengths := np.arange(1, 1000))
    assert ((lengths <= widths) & (widths < np.maximum(2 * lengths, 9))).all()
    assert set(widths[:128]) == {8, 16, 24, 32, 48, 64, 96, 128}


def test_samples_are_sorted_and_beam_search_ranks_truncated_outputs_last(trained, found):
    """One that found no end stands behind those that did, even where it is the likelier."""
    for outputs in found["drawn"]:
        assert outputs == sorted(outputs, key=lambda output: -output.score)
    unsorted = 0
    for text, outputs in zip(TEXTS, found["beam"], strict=True):
        keys = [(len(output.tokens) < room(text), output.score) for output in outputs]
        assert keys == sorted(keys, reverse=True)
        unsorted += outputs != sorted(outputs, key=lambda output: -output.score)
    assert unsorted
    check_alike(trained.generate(TEXTS, **BEAM), [own[:1] for own in found["beam"]])
    # Of an empty text come empty ones.
    assert found["drawn"][1] == [Output("", [], 0.0)] * 3
    assert trained.generate([]) == []
    assert trained.generate(["", ""]) == [[Output("", [], 0.0)]] * 2


@pytest.mark.parametrize(
    ("message", "text", "options"),
    [
        ("'C' in 'abCd' is not one of the tokenizer's symbols", "abCd", {}),
        (r"texts\[1\]: 21 tokens, .* the model's 20 positions; shorten or", "a" * REACH, {}),
        (r"texts\[1\]: it has a lone surrogate", "\ud800", {}),
        ("n_best=2 exceeds beam_size=1", "a", {"n_best": 2}),
        ("n_best=6 exceeds beam_size=5", "a", {"n_best": 6, **BEAM}),
        ("n_best=0: it must be at least 1", "a", {"n_best": 0}),
        ("batch_size=0: it must be at least 1", "a", {"batch_size": 0}),
    ],
)
def test_refused_texts_and_wrong_arguments_are_user_errors(message, text, options, trained):
    refused(message, trained.generate, ["a", text], **options)


def test_a_string_in_place_of_a_list_and_contradictory_settings_are_user_errors(trained):
    refused(r"a single string .* pass a list: \[text\]", trained.generate, "hello")
    for wrong in (b"hello", None, 3):
        with pytest.raises(TypeError, match=r"^a text must be a str, not "):
            cleaned(wrong)
    for message, settings in (
        ("sampling excludes beam search", {"temperature": 1.0, "beam_size": 2}),
        ("only sampling uses top_k", {"top_k": 3}),
        ("only sampling uses top_k", {"top_p": 0.5}),
        ("temperature=1e-40: it must be at least 1e-06", {"temperature": 1e-40}),
        ("temperature=nan", {"temperature": float("nan")}),
        ("min_length=5 leaves no room for EOS in max_length=5", {"min_length": 5, "max_length": 5}),
        ("length_ratio=0.0: it must be at least 0.01", {"length_ratio": 0.0}),
        ("repetition_penalty=0.0: it must be at least 0.01", {"repetition_penalty": 0.0}),
        ("max_length=0: it must be at least 1", {"max_length": 0}),
    ):
        refused(message, DecodingConfig, **settings)


def test_the_keywords_of_generate_are_the_fields_of_its_config(trained):
    assert get_type_hints(DecodingOptions) == get_type_hints(DecodingConfig)
    message = r"option=beamsize: choose one of .* \(did you mean beam_size\?\)"
    refused(message, trained.generate, ["a"], beamsize=4)


@pytest.mark.parametrize("decoding", [{}, BEAM | {"length_penalty": 0.0}, BEAM, DRAWN])
def test_teacher_forcing_scores_outputs_as_decoding_does(decoding, each_kind):
    """Of all lengths in one call, finished and truncated, given as outputs, ids or texts."""
    outputs = each_kind.generate(TEXTS, **decoding, n_best=5 if decoding else 1)
    pairs = [(text, one) for text, own in zip(TEXTS, outputs, strict=True) for one in own]
    assert all(one.truncated == (len(one.tokens) == room(text)) for text, one in pairs if text)
    sources, outputs = zip(*pairs, strict=True)
    ids = [np.array(one.ids() if text else [], int) for text, one in pairs]
    scores, tokens = each_kind.score(sources, outputs), np.array([len(one) for one in ids])
    log_p, counts, perplexity = np.array(scores).T
    penalty = ((5.0 + tokens) / 6.0) ** (0.6 if decoding is BEAM else 0.0)
    np.testing.assert_allclose(log_p, [one.score for one in outputs] * penalty, rtol=1e-5)
    np.testing.assert_array_equal(counts, tokens)
    wanted = np.exp(-log_p / np.where(tokens, tokens, np.nan))
    np.testing.assert_allclose(perplexity, wanted, rtol=1e-6)
    again = np.array(each_kind.score(sources, ids, batch_size=3))
    np.testing.assert_allclose(again[:, 0], log_p, rtol=1e-5)
    ended = [k for k, (text, one) in enumerate(pairs) if text and not one.truncated]
    texts = [sources[k] for k in ended], [outputs[k].text for k in ended]
    again = [score.log_p for score in each_kind.score(*texts)]
    np.testing.assert_allclose(again, log_p[ended], rtol=1e-5)
    both = 0 < len(ended) < np.count_nonzero(tokens)
    assert both or each_kind.config.model.architecture == "recurrent"


def test_encoded_texts_are_those_of_the_module(each_kind):
    """Whatever batch they are in; the module is the model's, with its variables."""
    memory, mask = each_kind.encode(TEXTS)
    assert memory.shape == (*mask.shape, 16)
    np.testing.assert_array_equal(mask.sum(1), [len(text) + 1 for text in TEXTS])
    assert not memory[~mask].any()
    module = each_kind.module
    assert module is not each_kind.module
    batch = strings((TEXTS[0], "ab"))
    compute = jax.jit(lambda x: (module.encode(x.source), module(**x.inputs())))
    encoded, logits = compute(batch)
    np.testing.assert_allclose(memory[0, mask[0]], encoded[0], rtol=1e-4, atol=1e-5)
    wanted = logits_of(each_kind.model, each_kind.variables, batch)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    assert (each_kind.config.decode_margin, type(each_kind.tokenizers)) == (MARGIN, Tokenizers)


def test_attention_is_that_of_real_tokens(trained, recurrent, found):
    """In the order of the texts, of a finished output, one that is truncated, and a text."""
    whole = Output("a" * REACH, [3] * REACH, 0.0, truncated=True)
    texts, outputs = ["q", TEXTS[0], "", "ab"], [whole, "bad", Output("", [], 0.0), [5, 4]]
    end = TOKENIZER.symbol(EOS)
    for model, layers in ((trained, (1, 1, 1)), (recurrent, (0, 0, 1))):
        results = model.attention(texts, outputs)
        sides = [(one.source, one.output) for one in results]
        assert sides == [
            (["q", end], ["a"] * REACH),
            ([*TEXTS[0], end], [*"bad", end]),
            ([end], []),
            ([*"ab", end], ["c", "b"]),
        ]
        for one in results:
            s, t = len(one.source), len(one.output)
            shapes = [(2, s, s), (2, t, t), (2, t, s)]
            assert [x.shape for x in one[2:]] == [
                (n, *x) for n, x in zip(layers, shapes, strict=True)
            ]
            for weights in one[2:]:
                np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
        batch = strings((TEXTS[0], "bad"))
        data = Dataset(batch.source, batch.target_out, 1)
        maps = maps_of(model.model, model.variables, data)
        for kind, expected in maps.items():
            own = getattr(results[1], kind)
            for layer, weights in zip(own, expected, strict=True):
                np.testing.assert_allclose(layer, weights[0], rtol=1e-4, atol=1e-6)


def test_empty_lists_have_empty_results_and_misuse_is_refused_in_a_line(trained):
    assert trained.score([], []) == trained.attention([], []) == []
    assert [each.shape for each in trained.encode([])] == [(0, 0, 16), (0, 0)]
    for function in (trained.score, trained.attention):
        for message, texts, targets in (
            ("a single string was given; pass a list", ["a"], "a"),
            ("2 texts, 1 targets: pass one for each", ["a", "b"], ["a"]),
            (r"texts\[1\]: 'C' in 'C' is not one of", ["a", "b"], ["a", "C"]),
            (r"texts\[1\]: the target's 21 tokens, .* the model's 20", "ab", ["a", "a" * 20]),
            (r"texts\[0\]: the target has token 0; .* from 2 to 28", ["a"], [[3, 0]]),
            (r"texts\[0\]: the target has token 29", ["a"], [[29]]),
            (r"texts\[0\]: the target is neither a text, nor an Output", ["a"], [np.array([2.5])]),
        ):
            refused(message, function, [*texts], targets)
    refused("texts have no targets: prepare", trained.score, trained.prepare(["a"]))
    refused("batch_size=0: it must be at least 1", trained.encode, ["a"], batch_size=0)
    for message, option in (
        ("max_length=2.5: it takes a whole number", {"max_length": 2.5}),
        ("beam_size=True: it takes a whole number", {"beam_size": True}),
        ("temperature='1': it takes a number", {"temperature": "1"}),
        ("prefix=3: it takes a text", {"prefix": 3}),
        ("distinct='yes': it takes True or False", {"distinct": "yes"}),
    ):
        refused(message, trained.generate, ["a"], **option)


def test_models_are_loaded_side_by_side_and_print_nothing(run, tmp_path, monkeypatch, capfd):
    other = make_run(tmp_path / "other", replicas=2).path
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    one, two = load(str(run.path)), load("other", replica=1)  # on all devices
    pairs = ["abc", "q"], ["b", "dcba"]
    first, second = one.score(*pairs), two.score(*pairs)
    assert one.score(*pairs) == first != second
    alone = load(str(other), replica=1, mesh=one_device_mesh()).score(*pairs)
    np.testing.assert_allclose(second, alone, rtol=1e-5)
    assert one.generate(pairs[0]) != two.generate(pairs[0])
    assert capfd.readouterr() == ("", "")


def test_the_examples_of_the_documentation_run(run, capsys):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"(?m)^ {4}(.*\n)", text)).replace("runs/x", str(run.path))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (1, 6, TOKENIZER.vocab_size)
    assert names["means"].shape == (2, 16)
    best = names["best"]
    assert capsys.readouterr().out.startswith(f"{best.text} {best.tokens} {best.score}")


def test_a_replica_of_a_population_has_its_own_parameters(tmp_path):
    folder = make_run(tmp_path / "population", replicas=2).path
    one = load(str(folder), replica=1, mesh=one_device_mesh())
    jax.tree.map(np.testing.assert_array_equal, dict(one.variables), params_of(one.model, 1))
    refused("replica=2: it must be at most 1", load, str(folder), replica=2, mesh=one_device_mesh())
    refused("holds no run", load, str(tmp_path))
