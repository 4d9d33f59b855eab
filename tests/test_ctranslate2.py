import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import program, random_params, refused, small_model
from tests.test_average import make_run
from transformer import load
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.interop import ctranslate2
from transformer.modules.config import ModelConfig

CONFIGS = [
    {},
    {"norm_placement": "post", "attention_bias": True, "norm_epsilon": 1e-3},
    {"position_encoding": "learned", "tie_embeddings": "none", "feed_forward": "gelu"},
    {"norm": "rms", "position_encoding": "rotary", "feed_forward": "swiglu", "num_kv_heads": 1},
]
UNFIT = [{"position_encoding": each} for each in ("alibi", "transformer_xl")]
UNFIT += [{"norm": "none"}, {"normalize_qk": True}, {"window": 4}]


@pytest.mark.parametrize("changes", UNFIT)
def test_a_model_that_ctranslate2_cannot_hold_is_refused_by_the_name_of_its_knob(changes):
    (knob,) = changes
    refused(f"model.{knob}=", ctranslate2.check, ModelConfig(**changes))


def test_projections_are_rows_of_outputs_in_the_order_of_queries_keys_values():
    model = small_model()
    weights = {name: np.asarray(x) for name, x in random_params(model, 0).items()}
    found = ctranslate2.variables(model.config, weights)
    x = np.arange(16, dtype=np.float32)
    one = "encoder/layers/0/self_attention"
    for k, name in enumerate(("query", "key", "value")):
        rows = found["encoder/layer_0/self_attention/linear_0/weight"][16 * k : 16 * (k + 1)]
        expected = np.einsum("d,dnh->nh", x, weights[f"{one}/{name}/kernel"]).reshape(-1)
        np.testing.assert_allclose(rows @ x, expected, rtol=1e-4, atol=1e-4)
    rows = found["encoder/layer_0/self_attention/linear_1/weight"]
    expected = np.einsum("nh,nhd->d", x.reshape(2, 8), weights[f"{one}/out/kernel"])
    np.testing.assert_allclose(rows @ x, expected, rtol=1e-4, atol=1e-4)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in found.values())


@pytest.mark.oracle
@pytest.mark.parametrize("changes", CONFIGS)
def test_ctranslate2_gives_the_same_log_probabilities(changes, tmp_path, rng):
    library = pytest.importorskip("ctranslate2")
    knobs = {f"model.{name}": value for name, value in changes.items()}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), **knobs)
    out = tmp_path / "out"
    words = f"--workdir={workdir.path}", "--to=ctranslate2", f"--out={out}"
    with program("scripts/export.py", *words) as export:
        export.main()
        refused("not an empty folder", export.main)
    model = load(str(workdir.path))
    names = ctranslate2.vocabulary(model.tokenizers.source, model.tokenizers.source.vocab_size)
    texts = ["abc", "b", "cab"]
    tokens = [[names[i] for i in model.tokenizers.source.encode(text)[:-1]] for text in texts]
    translator = library.Translator(str(out), compute_type="float32")
    theirs = translator.score_batch(tokens, tokens[::-1])
    assert names[BOS] == "<s>"
    assert names[EOS] == "</s>"
    for score, ours in zip(theirs, model.score(texts, texts[::-1]), strict=True):
        assert abs(sum(score.log_probs) - ours.log_p) < 1e-4


@pytest.mark.oracle
def test_greedy_and_beam_search_give_the_same_outputs(tmp_path, rng):
    library = pytest.importorskip("ctranslate2")
    knobs = {"model.norm_placement": "both", "model.position_encoding": "relative"}
    knobs |= {"model.logits_bias": True, "replicas": 2}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), **knobs)
    model, out = load(str(workdir.path), replica=1), tmp_path / "out"
    pieces = len(model.tokenizers.target.pieces)
    # Translator renormalises without suppressed tokens: those here have no probability.
    bias = np.array(model.variables["logits_bias"])
    bias[[PAD, BOS, *range(pieces, len(bias))]] = -1e4
    model.variables["logits_bias"] = jnp.asarray(bias)
    out.mkdir()
    ctranslate2.export(model, out)
    names = ctranslate2.vocabulary(model.tokenizers.source, len(bias))
    texts = ["".join(rng.choice(list("abc"), size)) for size in rng.integers(1, 8, 12)]
    tokens = [[names[i] for i in model.tokenizers.source.encode(text)[:-1]] for text in texts]
    translator = library.Translator(str(out), compute_type="float32")
    limit = {"max_decoding_length": 30, "min_decoding_length": 0}
    rules = {"penalty": "length", "length_penalty": 1.0, "unfinished": "equal", "beam_size": 4}
    for theirs, ours in (
        ({"beam_size": 1}, {}),
        ({"beam_size": 4, "patience": 1}, rules | {"early_stopping": "true"}),
        ({"beam_size": 4, "patience": 9}, rules | {"early_stopping": "never"}),
    ):
        found = translator.translate_batch(tokens, **limit, **theirs)
        expected = model.generate(texts, max_length=30, decode_margin=2**16, **ours)
        for each, (best, *_) in zip(found, expected, strict=True):
            assert each.hypotheses[0] == [names[i] for i in best.tokens]
