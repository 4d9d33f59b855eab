import io
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.helpers import refused
from transformer.data.tokenizer import BOS, EOS, PAD, SPECIALS, TOKENIZERS, UNKNOWN, SymbolTokenizer
from transformer.data.tokenizer import GivenTokenizer as Given

TEXTS = ["the house is green", "the tree is tall", "a  house,\tand a tree é"] * 20
KINDS = [name for name in TOKENIZERS if name != "imported"]  # test_imported.py
LEARNED = {name: TOKENIZERS[name].learn(TEXTS, 300) for name in KINDS}
each_tokenizer = pytest.mark.parametrize("name", KINDS)


@each_tokenizer
def test_what_it_learned_from_comes_back_from_its_tokens(name):
    tokenizer = LEARNED[name]
    assert tokenizer.pieces[: len(SPECIALS)] == SPECIALS
    for text, tokens in zip(TEXTS, tokenizer.encode_all(TEXTS[:3]), strict=False):
        assert tokens == tokenizer.encode(text)
        assert tokens[-1] == EOS
        assert not {PAD, BOS, EOS} & set(tokens[:-1])
        assert max(tokens) < len(tokenizer.pieces) <= tokenizer.vocab_size
        back = " ".join(text.split()) if name == "words" else text
        assert tokenizer.decode([*tokens, 7, PAD]) == back
        assert tokenizer.decode([*tokens[:-1], PAD, PAD]) == back  # no room for EOS
        assert all(tokenizer.symbol(token) for token in tokens)
    assert tokenizer.vocab_size % 8 == 0
    # Invalid tokens are shown and do not fail.
    shown = tokenizer.decode([BOS, tokenizer.vocab_size + 5, *tokenizer.encode("a")]).strip()
    assert shown.endswith("a")
    assert len(shown) > 1


@pytest.mark.parametrize("name", ["bytes", "bpe", "unigram"])
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_comes_back_where_bytes_are_pieces(name, text):
    text = text.replace("▁", "_")  # SentencePiece writes a space as ▁
    assert LEARNED[name].decode(LEARNED[name].encode(text)) == text


@each_tokenizer
def test_it_is_the_same_once_saved_and_read_and_once_learned_again(name):
    tokenizer, kind = LEARNED[name], TOKENIZERS[name]
    again = kind.read(tokenizer.to_bytes())
    assert again.pieces == tokenizer.pieces
    assert again.digest() == tokenizer.digest() == kind.learn(TEXTS, 300).digest()
    for text in ("zebra 東", TEXTS[0]):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        pickle.loads(tokenizer.to_bytes())  # nothing that could run code


def test_what_was_never_seen_is_unknown_or_refused():
    tokenizer = LEARNED["characters"]
    assert tokenizer.decode(tokenizer.encode("tqz")) == f"t{UNKNOWN}{UNKNOWN}"
    message = r"'B' in 'aBc' .* symbols abc .did you mean b\?"
    refused(message, SymbolTokenizer("abc").encode, "aBc")
    words = TOKENIZERS["words"].learn(["b a", "b a c", "b"], len(SPECIALS) + 1 + 2)
    assert words.pieces == (*SPECIALS, "b", "a", UNKNOWN)  # the most common ones
    assert words.decode(words.encode("a  c b")) == f"a {UNKNOWN} b"
    assert len({SymbolTokenizer(symbols).digest() for symbols in ("ab", "ba", "abc")}) == 3


@each_tokenizer
def test_special_tokens_spelt_in_a_text_are_text(name):
    """Whether the text was learned from or not."""
    text, kind = " ".join([*SPECIALS, "a", UNKNOWN, "".join(SPECIALS)]), TOKENIZERS[name]
    learned = kind.learn([text] * 20, 300)
    for tokenizer in (LEARNED[name], learned, kind.read(learned.to_bytes())):
        assert not {PAD, BOS, EOS} & set(tokenizer.encode(text)[:-1])
    assert learned.decode(learned.encode(text)) == text
    # A run of 0.1.0 learned some of the names as words, and keeps its ids.
    saved = b'{"symbols": ["w", "<eos>", "<unk>"], "separator": " ", "unknown": true}'
    words = TOKENIZERS["words"].read(saved)
    assert words.encode("<eos> w <unk> <pad> x") == [4, 3, 6, 6, 6, EOS]
    assert words.unknown_id == 6
    assert words.to_bytes() == saved


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_pieces_are_no_more_than_asked_for_and_fewer_of_little_text(name):
    learn = TOKENIZERS[name].learn
    assert len(LEARNED[name].pieces) <= 300
    assert len(learn(["ab"], 4_000).pieces) < 300
    for texts, size, message in (
        (["abcdefghijklmnop"], 264, r"need 277; raise it, or choose bytes$"),
        (["", ""], 300, "there is no text to learn from; name a split"),
    ):
        refused(f"^data.tokenizer={name}, data.*={size}: .*{message}", learn, texts, size)
    # No text is skipped, neither a long one nor one with SentencePiece's own sign.
    long = " ".join(TEXTS * 20), "▅".join(TEXTS * 20), "東京" * 40_000
    for text, part in zip(long, (TEXTS[0], TEXTS[0], "東京"), strict=True):
        tokenizer = learn([text], 300)
        assert "<0x" not in "".join(map(tokenizer.symbol, tokenizer.encode(part)))


# Where a model has its special tokens, and what else may differ.
MODELS = {
    "T5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "Marian": {"eos_id": 0, "unk_id": 1, "bos_id": -1},
    "default": {},
    "last": {"unk_id": 0, "bos_id": 1, "pad_id": 19, "eos_id": 20},
    "normalised": {"normalization_rule_name": "nmt_nfkc_cf"},
    "bytes": {"byte_fallback": True, "vocab_size": 330},
    "bpe": {"model_type": "bpe", "control_symbols": ["q"], "user_defined_symbols": ["<pad>"]},
}


def model_of(name):
    """The bytes of a model that SentencePiece has learned."""
    model, options = io.BytesIO(), {"vocab_size": 60, "hard_vocab_limit": False} | MODELS[name]
    where = {"sentence_iterator": iter(TEXTS), "model_writer": model, "minloglevel": 2}
    SentencePieceTrainer.Train(**where, **options)
    return model.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_a_given_model_has_its_pieces_under_our_ids(name):
    model = model_of(name)
    theirs, tokenizer = SentencePieceProcessor(model_proto=model), Given(model)
    special = {theirs.pad_id(), theirs.bos_id(), theirs.eos_id()}
    pieces = [theirs.IdToPiece(each) for each in range(len(theirs)) if each not in special]
    assert tokenizer.pieces == (*SPECIALS, *pieces)
    names = [theirs.IdToPiece(each) for each in range(len(theirs)) if theirs.IsControl(each)]
    texts = [*TEXTS[:3], "The  house 東", "", "a".join([*names, *SPECIALS, UNKNOWN, "q"])]
    for text, tokens in zip(texts, tokenizer.encode_all(texts), strict=True):
        own = theirs.Encode(text)
        assert [tokenizer.pieces[each] for each in tokens[:-1]] == [*map(theirs.IdToPiece, own)]
        assert tokens == tokenizer.encode(text)
        assert tokens[-1] == EOS
        assert not {PAD, BOS, EOS} & set(tokens[:-1])
        assert tokenizer.decode([*tokens, 7, PAD]) == theirs.Decode(own)
        assert tokenizer.count_unknown(tokens) == own.count(theirs.unk_id())
    shown = tokenizer.decode([BOS, tokenizer.vocab_size + 5, *tokenizer.encode("a")])
    assert shown.split()[-2:] == ["⁇", "a"]  # an invalid token is shown


def test_models_of_the_same_pieces_that_encode_otherwise_have_other_digests():
    one, other = (Given(model_of(name)) for name in ("default", "normalised"))
    assert one.pieces == other.pieces
    assert one.encode("THE") != other.encode("THE")
    assert one.digest() != other.digest()
