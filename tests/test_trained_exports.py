"""Trained models give the same outputs in the libraries that they are exported to."""

import json
import runpy
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import numpy as np
import pytest

import transformer
from tests.hf_models import compare, make_model
from tests.test_config import of, resolved
from tests.test_export import exported as export
from tests.test_huggingface import sources_of
from transformer.config import RunConfig
from transformer.data.packing import RaggedArray
from transformer.data.tokenizer import EOS
from transformer.data.toy import SIZES, TASKS, draw
from transformer.inference.generation import TrainedModel
from transformer.interop.importing import import_run
from transformer.run import Run
from transformer.workdir import Workdir

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

LIMIT = 32  # tokens in an output
PENALTY = 1.0
BEAMS = {"beam_size": 4, "length_penalty": PENALTY}
# The rules of the other libraries: one limit for all outputs, and scores by length.
RULES = of("decoding.", max_length=LIMIT, decode_margin=2**16, penalty="length", unfinished="equal")
TRAINING = {"steps": 600, "eval_every": 600, "save_every": 600, "log_every": 100}
TRAINING |= of("model.", d_model=64, num_heads=4, d_ff=128, norm_epsilon=1e-5)  # BART-like classes
TRAINING |= of("optimizer.", learning_rate=3e-3, warmup_steps=50)
NOUNS = {"cat": "chat", "dog": "chien", "horse": "cheval", "fish": "poisson", "wolf": "loup"}
VERBS = {
    "sees": "voit",
    "hears": "entend",
    "follows": "suit",
    "finds": "trouve",
    "knows": "connaît",
}
ADJECTIVES = {"": "", " black": " noir", " white": " blanc", " calm": " calme", " old": " âgé"}

exported = partial(export, longest=())


class Trained(NamedTuple):
    """A model, 200 of its sources, and what their outputs should be."""

    workdir: Workdir
    model: TrainedModel
    texts: list[str]
    references: list[str]

    def accuracy(self, outputs: list[list[int]]) -> float:
        decode = self.model.tokenizers.target.decode
        pairs = zip(map(decode, outputs), self.references, strict=True)
        return sum(output == reference for output, reference in pairs) / len(outputs)


def sentences():
    """All of an English noun phrase, a verb and a noun phrase, with their translations."""
    phrases = [(f"the{a} {n}", f"le {NOUNS[n]}{ADJECTIVES[a]}") for a in ADJECTIVES for n in NOUNS]
    for (one, un), verb, (other, autre) in product(phrases, VERBS, phrases):
        yield f"{one} {verb} {other}", f"{un} {VERBS[verb]} {autre}"


def corpus(folder):
    """The knobs of a corpus of 2,000 sentences, and 200 others."""
    pairs = list(sentences())
    pairs = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))[:2_200]]
    lines = "".join(f"{source}\t{target}\n" for source, target in pairs[200:])
    (folder / "train.tsv").write_text(lines, encoding="utf-8")
    files = {"dataset": "files", "train": str(folder / "train.tsv")}
    knobs = of("data.", tokenizer="bpe", vocab_size=400, **files)
    knobs |= {"model.norm_placement": "post", "model.num_layers": 2, "steps": 90}
    return knobs, pairs[:200]


def strings():
    """The knobs of the task reverse, and 200 strings that are not in training."""
    held_out = [x for k in ("validation", "test") for x in draw(TASKS["reverse"], SIZES["tiny"], k)]
    return {"data.task": "reverse"}, [(text, text[::-1]) for text in held_out]


@pytest.fixture(scope="module", params=["reverse", "translation"])
def trained(request, tmp_path_factory, data_dir) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    knobs, pairs = strings() if request.param == "reverse" else corpus(folder)
    with jax.numpy_dtype_promotion("standard"):
        run = Run(resolved(TRAINING | RULES | knobs), folder / "run", data_dir=data_dir)
        run.train()
    texts, references = map(list, zip(*pairs, strict=True))
    return Trained(run.workdir, run.trained_model(), texts, references)


def check(trained, found, **decoding):
    """The token ids `found` are those that are decoded here, except where two are as likely."""
    model, different = trained.model, 0
    expected = [best for best, *_ in model.generate(trained.texts, **decoding)]
    for text, theirs, ours in zip(trained.texts, found, expected, strict=True):
        if theirs == ours.tokens:
            continue
        different += 1
        both = [ours.ids(), [*theirs, EOS] if len(theirs) < LIMIT else theirs]
        if not decoding:  # greedily they part at tokens that are as likely
            same = next(k for k, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
            both = [each[: same + 1] for each in both]
        scores = [each.log_p / each.tokens**PENALTY for each in model.score([text] * 2, both)]
        assert abs(scores[0] - scores[1]) < 1e-5, (text, *both)
    assert different <= 0.005 * len(found)


def before_end(row):
    """The tokens before EOS and padding."""
    tokens = [int(token) for token in row]
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def sources(trained, more=0):
    """The sources' token ids, padded to the longest and further."""
    rows = RaggedArray.from_lists([*map(trained.model.tokenizers.source.encode, trained.texts)])
    return rows.to_padded(int(rows.lengths().max()) + more).astype(np.int32)


def test_the_model_mostly_works(trained):
    outputs = [best.tokens for (best,) in trained.model.generate(trained.texts)]
    assert trained.accuracy(outputs) > 0.8


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_hugging_face_gives_the_same_outputs_and_tokenizes_alike(trained, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exported(trained.workdir, tmp_path / "out", to="huggingface")
    there = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(trained.texts, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(inputs["input_ids"].numpy(), sources(trained))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def generate(**options):
        with torch.no_grad():
            return [before_end(row[1:]) for row in there.generate(**given, **options).numpy()]

    found = generate()
    check(trained, found)
    decode = trained.model.tokenizers.target.decode
    assert tokenizer.batch_decode(found, skip_special_tokens=True) == [*map(decode, found)]
    beams = {"num_beams": 4, "length_penalty": PENALTY}
    for ours, theirs in (("true", True), ("false", False), ("never", "never")):
        check(trained, generate(**beams, early_stopping=theirs), early_stopping=ours, **BEAMS)


def test_ctranslate2_gives_the_same_outputs(trained, tmp_path):
    library = pytest.importorskip("ctranslate2")

    def translator(*words):
        out = tmp_path / "-".join(("out", *words))
        exported(trained.workdir, out, *words, to="ctranslate2")
        names = json.loads((out / "shared_vocabulary.json").read_text(encoding="utf-8"))
        numbers = {name: number for number, name in enumerate(names)}
        encode = trained.model.tokenizers.source.encode
        tokens = [[names[token] for token in encode(text)[:-1]] for text in trained.texts]
        never = [[name] for name in names if name in ("<pad>", "<s>") or "<unused" in name]
        there = library.Translator(str(out), compute_type="int8" if words else "float32")

        def translate(**options):
            limits = {"max_decoding_length": LIMIT, "min_decoding_length": 0}
            limits |= {"suppress_sequences": never}
            found = there.translate_batch(tokens, **limits, **options)
            return [[numbers[name] for name in each.hypotheses[0]] for each in found]

        return translate

    exact = translator()
    greedy, beams = {"beam_size": 1}, {"beam_size": 4, "length_penalty": PENALTY}
    check(trained, exact(**greedy))
    for ours, theirs in (("true", 1), ("never", 9)):
        check(trained, exact(**beams, patience=theirs), early_stopping=ours, **BEAMS)
    quantized = translator("--quantization=int8")
    for name, options in (("greedy", greedy), ("beam", beams)):
        kept = trained.accuracy(quantized(**options)), trained.accuracy(exact(**options))
        print(f"{name}: sequence accuracy {kept[0]} of int8, {kept[1]} of float32")
        assert kept[0] > kept[1] - 0.05


@pytest.mark.parametrize("beams", [{}, {"early_stopping": "never"} | BEAMS])
def test_stablehlo_gives_the_same_outputs(beams, trained, tmp_path):
    pytest.importorskip("flatbuffers")
    words = (f"--{name}={value}" for name, value in beams.items())
    exported(trained.workdir, tmp_path / "out", *words, to="stablehlo")
    decode = runpy.run_path(str(tmp_path / "out" / "load.py"))["decode"]
    tokens, _ = decode(sources(trained))
    check(trained, [before_end(row[0]) for row in np.asarray(tokens)], **beams)


def test_onnx_gives_the_same_outputs_at_two_shapes(trained, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    shapes = sources(trained).reshape(1, 200, -1), sources(trained, more=5).reshape(5, 40, -1)
    names = [f"{batch.shape[1]}x{batch.shape[2]}" for batch in shapes]
    exported(trained.workdir, tmp_path / "out", f"--shapes={','.join(names)}", to="onnx")
    for name, batches in zip(names, shapes, strict=True):
        session = runtime.InferenceSession(str(tmp_path / "out" / name / "greedy.onnx"))
        found = [session.run(["tokens"], {"source": batch})[0] for batch in batches]
        check(trained, [before_end(row) for row in np.concatenate(found)[:, 0]])


def test_a_frozen_encoder_is_bit_identical_after_import_fine_tuning_and_export(tmp_path, data_dir):
    pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    files = pytest.importorskip("safetensors.numpy")
    make_model("marian", tmp_path / "theirs")
    imported = import_run(tmp_path / "theirs", tmp_path / "imported")
    texts, inputs, _ = sources_of(imported, 14)
    pairs = "".join(f"{text}\t{' '.join(text.split()[::-1])}\n" for text in texts)
    (tmp_path / "train.tsv").write_text(pairs)
    config = transformer.config_of(tmp_path / "imported")
    config.update({"init_from": str(tmp_path / "imported"), "freeze": ("encoder/*", "embedding/*")})
    config.update({"steps": 20, "batch_size": 8, "eval_every": 20, "save_every": 20})
    config.data.update({"dataset": "files", "train": str(tmp_path / "train.tsv")})
    config.data.update({"validation": "train[:8]", "test": "train[:8]"})
    config.optimizer.update({"name": "adam", "warmup_steps": 0, "learning_rate": 1e-2})
    config.mesh.data = 1
    with jax.numpy_dtype_promotion("standard"):
        run = Run(RunConfig.from_config_dict(config), tmp_path / "tuned", data_dir=data_dir)
        run.train()
    exported(run.workdir, tmp_path / "out", to="huggingface")
    before, after = (
        files.load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out")
    )
    kept = {name for name, tensor in after.items() if np.array_equal(tensor, before[name])}
    frozen = {x for x in after if x.startswith(("model.encoder.", "model.shared."))}
    assert frozen <= kept
    assert not any(name.endswith("weight") for name in kept - frozen)
    there = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    compare(there, run.trained_model(), texts, inputs, 1)
    compare(there, run.trained_model(), texts, inputs, 4, early_stopping="true")
