"""Imported tokenizers, and runs whose tokenizers are imported."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.helpers import data_config, logits_of, refused
from tests.test_generation import MARGIN, make_run
from transformer import load
from transformer.config import RunConfig
from transformer.data.batches import make_batch
from transformer.data.corpus import Tokenizers, saved_tokenizers
from transformer.data.imported import CODECS, ImportedTokenizer, TokenIds
from transformer.data.tokenizer import EOS, PAD, TOKENIZERS, ByteTokenizer
from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run

TEXTS = ["low lower lowest", "a new wide bed", "widest ☃ newer"]


def trained_model(texts, **options):
    """A SentencePiece model learned from texts."""
    model, options = io.BytesIO(), {"vocab_size": 30, "hard_vocab_limit": False} | options
    SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


SOURCE_MODEL, TARGET_MODEL = (trained_model(texts) for texts in (TEXTS[:2], ["tief tiefer neu"]))


def pieces_of(model):
    own = SentencePieceProcessor(model_proto=model)
    return [own.IdToPiece(number) for number in range(own.GetPieceSize())]


# As Marian numbers them: one vocabulary for two models, languages, padding at the end.
PIECES = dict.fromkeys(pieces_of(SOURCE_MODEL)[3:] + pieces_of(TARGET_MODEL)[3:])
VOCABULARY = ["</s>", "<unk>", *PIECES, ">>deu<<", ">>fra<<", "<pad>"]
LAST = len(VOCABULARY) - 1
MARIAN = TokenIds(pad=LAST, eos=0, start=LAST, unk=1, banned=(LAST,))


def marian(ids=MARIAN, **options):
    options = {"target_model": TARGET_MODEL, "pieces": VOCABULARY, "size": LAST + 1} | options
    return ImportedTokenizer.make("sentencepiece", SOURCE_MODEL, ids=ids, **options)


def library():
    """A byte-level `tokenizer.json` as of BART."""
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    options = {"special_tokens": ["<s>", "<pad>", "</s>", "<unk>"], "show_progress": False}
    options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=300, **options))
    own.enable_truncation(3)
    ids = TokenIds(pad=1, eos=2, start=2, bos=0, unk=3, forced_first=0)
    return ImportedTokenizer.make(
        "tokenizers", own.to_str().encode(), ids=ids, size=304, prefix=[0]
    )


def make(kind):
    match kind:
        case "sentencepiece":
            return marian()
        case "tokenizers":
            return library()
        case "bytes":  # the table has rows without a meaning, as that of ByT5
            return ImportedTokenizer.make("bytes", b"", ids=TokenIds(0, 1, 0, unk=2), size=384)
    words = ["<unk>", "<pad>", "<sos>", "<eos>", *sorted({*" ".join(TEXTS).split()})]
    ids = TokenIds(pad=1, eos=3, start=2, bos=2, unk=0, banned=(0,))
    return ImportedTokenizer.make("pieces", b"", pieces=words, ids=ids, size=len(words))


EACH = [pytest.param(kind, marks=[pytest.mark.oracle] * (kind == "tokenizers")) for kind in CODECS]


@pytest.mark.parametrize("kind", EACH)
def test_every_row_has_an_id_and_text_comes_back(kind):
    first = make(kind)
    for tokenizer in (first, TOKENIZERS["imported"].read(first.to_bytes())):
        source, target = tokenizer.sides()
        roles, size = first.roles, first.record["size"]
        assert tokenizer.vocab_size == len(tokenizer.pieces) == size
        assert sorted(tokenizer.theirs.tolist()) == [*range(size)]
        ids = tokenizer.theirs[[PAD, EOS, tokenizer.start]].tolist()
        assert ids == [roles.pad, roles.eos, roles.start]
        assert tokenizer.theirs[[*tokenizer.banned]].tolist() == [*roles.banned]
        for text in TEXTS if kind != "sentencepiece" else TEXTS[:2]:
            assert source.encode_all([text, ""]) == [source.encode(text), [EOS]]
            assert source.decode(source.encode(text)) == text
            for special in filter(None, (first.pieces[PAD], first.pieces[EOS])):
                inside = source.encode(f"{special}{text} {special}")[len(source.prefix) : -1]
                assert not {PAD, EOS} & {*inside}
        assert target.decode([size + 3, *target.encode(text)]).endswith("�")
    if kind in ("tokenizers", "bytes"):
        assert source.decode(source.encode("☃ é")) == "☃ é"


def test_pieces_have_the_numbers_of_the_vocabulary():
    """Each side has its own model; text is never a language token, whatever it says."""
    source, target = marian(prefix=[VOCABULARY.index(">>deu<<")]).sides()
    for side, model, text in ((source, SOURCE_MODEL, TEXTS[0]), (target, TARGET_MODEL, "tiefer")):
        own = SentencePieceProcessor(model_proto=model).Encode(text, out_type=str)
        expected = [">>deu<<"] * (side is source) + own + ["</s>"]
        assert side.theirs[side.encode(text)].tolist() == [*map(VOCABULARY.index, expected)]
        assert side.decode(side.encode(text)) == text
    tokens = source.encode(">>fra<< </s> <pad>")[1:-1]
    assert not {"</s>", "<pad>", ">>fra<<", ">>deu<<"} & {source.pieces[token] for token in tokens}
    assert source.count_unknown(source.encode("low ☃")) == 1
    assert source.symbol(EOS) == "⊣"


def test_prefixes_are_replaced_by_names():
    numbers = {name: VOCABULARY.index(name) for name in (">>deu<<", ">>fra<<")}
    german, french = numbers.values()
    plain = marian()
    source, target = plain.prefixed(">>fra<<", ">>deu<<").sides()
    assert source.theirs[source.encode("low")[0]] == french
    assert target.theirs[target.encode("neu")[0]] == german == target.theirs[target.forced_first]
    # mBART's source has its language after EOS, and its decoder starts with that of the target.
    last = marian(MARIAN._replace(start=german), suffix=[german]).prefixed(">>fra<<", ">>fra<<")
    tokens = last.encode("low")
    assert tokens[-2] == EOS
    assert last.theirs[[tokens[-1], last.start]].tolist() == [french, french]
    assert last.forced_first is None
    assert last.decode(tokens) == "low"
    text = plain.prefixed("low lower ")
    assert text.encode("lowest") == plain.encode("low lower lowest")
    assert text.encode(" ") == [EOS]
    assert text.sides()[1].encode("neu") == plain.sides()[1].encode("neu")
    message = "source_prefix='>>due<<': no token is >>due<< .did you mean >>deu<<"
    refused(message, plain.prefixed, ">>due<<")
    refused("target_prefix='': it is one token", plain.prefixed, None, "")
    ours = Tokenizers(*ByteTokenizer().sides())
    refused("target_prefix='x': only imported models have one", ours.prefixed, None, "x")
    assert ours.prefixed(None, None) == ours


def test_the_digest_by_which_tokens_are_cached_depends_on_prefixes():
    tokenizers = [marian().prefixed(*each) for each in ((), (">>deu<<",), (None, ">>deu<<"))]
    assert tokenizers[0].pieces == tokenizers[1].pieces == tokenizers[2].pieces
    digests = [each.digest() for each in tokenizers]
    assert len({*digests}) == 3
    assert digests == [ImportedTokenizer(each.to_bytes()).digest() for each in tokenizers]


@pytest.mark.parametrize(("changes", "message"), [
    ({"size": LAST}, f"{LAST + 1} tokens and the model's table {LAST} rows"),
    ({"ids": MARIAN._replace(start=LAST + 1)}, "token id .* is not in the model's table"),
    ({"ids": MARIAN._replace(eos=LAST)}, "needs different tokens"),
    ({"target_model": b"none"}, "the SentencePiece model is damaged"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    refused(message, partial(marian, **changes))


def test_both_sides_are_saved_in_one_file_or_in_two(tmp_path):
    one, other = marian(), make("pieces")
    for tokenizers, files, changes in (
        (Tokenizers(*one.sides()), {"shared"}, {}),
        (Tokenizers(one, other.sides()[1]), {"source", "target"}, {"target_tokenizer": "imported"}),
    ):
        folder = tmp_path / str(len(files))
        tokenizers.save(folder)
        assert {path.name for path in folder.iterdir()} == files
        read = saved_tokenizers(data_config(tokenizer="imported", **changes), folder)
        assert read.shared() == (len(files) == 1)
        assert read.digests() == tokenizers.digests()
        for own, wanted in zip(read, tokenizers, strict=True):
            assert own.encode("low tiefer") == wanted.encode("low tiefer")
    refused("imported tokenizers come with a run", TOKENIZERS["imported"].learn, TEXTS, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An imported run: the first token is German, and the decoder starts with padding."""
    german = VOCABULARY.index(">>deu<<")
    tokenizer = marian(MARIAN._replace(forced_first=german, forced_last=0), suffix=[german])
    knobs = {"data.tokenizer": "imported", "decoding.beam_size": 2, "decoding.penalty": "length"}
    knobs |= {"decoding.early_stopping": "true", "decoding.unfinished": "equal"}
    return make_run(tmp_path_factory.mktemp("runs") / "imported", tokenizer=tokenizer, **knobs)


def test_an_imported_model_decodes_by_its_own_settings(run):
    model = load(str(run.path), mesh=one_device_mesh())
    own, text = model.tokenizers, "low lower"
    for output in model.generate([text], n_best=2)[0]:  # two beams are the run's default
        assert output.tokens[0] == own.target.forced_first
        assert not output.truncated  # the last token is forced
        assert ">>deu<<" not in output.text
    ((greedy,),) = model.generate([text], beam_size=1)
    source, target = (np.array([tokens]) for tokens in (own.source.encode(text), greedy.ids()))
    batch = make_batch(jnp.asarray(source), jnp.asarray(target), start=own.target.start)
    log_p = np.array(jax.nn.log_softmax(logits_of(model.model, model.variables, batch)))[0]
    chosen = log_p[np.arange(target.shape[1]), target[0]]
    (scored,) = model.score([text], [greedy])
    np.testing.assert_allclose(scored.log_p, chosen.sum(), rtol=1e-4)
    free = chosen[1:] if len(chosen) < source.shape[1] + MARGIN else chosen[1:-1]
    np.testing.assert_allclose(greedy.score, free.sum(), rtol=1e-4)  # forced tokens cost nothing
    log_p[:, [*own.target.banned]] = -np.inf
    assert (log_p[1:-1].argmax(1) == target[0, 1:-1]).all()
    french = load(str(run.path), mesh=one_device_mesh(), target_prefix=">>fra<<")
    assert french.generate(["low"])[0][0].tokens[0] == own.target.numbers[">>fra<<"]
    refused("the target has token 0; outputs have those from 1", model.score, ["low"], [[0]])


def test_training_an_imported_model_starts_with_its_token(run, data_dir):
    """Whichever way its batches come; tokens after EOS cannot be packed."""

    def tuned(**changes):
        data, model = data_config(tokenizer="imported", **changes), Run.saved(run.path).config.model
        config = RunConfig(init_from=str(run.path), batch_size=4, steps=90, data=data, model=model)
        return Run(config, data_dir=data_dir, mesh=one_device_mesh())

    for workers in (0, 1):
        own = tuned(num_workers=workers, max_length=20)
        batch = own.feed.batch(jax.random.key(0), jnp.int32(3))
        assert (np.asarray(batch.target_in)[:, 0] == PAD).all()
        assert (np.asarray(batch.target_out)[:, 0] == own.tokenizers.target.forced_first).all()
        assert own.feed.empty_window().start == PAD
    packed = tuned(pack_length=64, max_length=20)
    refused("data.pack_length=64: packed rows need", lambda: packed.rows)
