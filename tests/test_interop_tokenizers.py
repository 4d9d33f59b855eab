"""Tokenizers of Hugging Face folders, read and written."""

import io
import json

import pytest

from transformer.data.corpus import Tokenizers
from transformer.data.imported import TokenIds
from transformer.data.tokenizer import ByteTokenizer, PieceTokenizer, SymbolTokenizer
from transformer.errors import UserError
from transformer.interop import tokenizer_files

spm = pytest.importorskip("sentencepiece")
TEXTS = ["low lower lowest", "new newer newest", "wide wider widest", "a low new wide bed"]
FAIRSEQ = {"pad": 1, "eos": 2, "start": 2, "bos": 0}


@pytest.fixture(scope="module")
def sentences():
    """Trains a SentencePiece model with special tokens of these ids; -1: none."""

    def train(**ids):
        model = io.BytesIO()
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=32,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
        return model.getvalue()

    return train


def read(folder, family, size, ids, **config):
    """The tokenizers of a folder; ids without a role are left out."""
    config = {"model_type": family, "vocab_size": size} | config
    return tokenizer_files.read(folder, config, TokenIds(**ids), (size, size), None)


def check_written(found, folder, family, size, ids):
    """What is written is read again as the same."""
    folder.mkdir()
    tokenizer_files.write(found, family, folder)
    again = read(folder, family, size, ids)
    assert [side.to_bytes() for side in again] == [side.to_bytes() for side in found]


def ids_of(tokenizer, text):
    """Their ids of a text."""
    return tokenizer.theirs[tokenizer.encode(text)].tolist()


def pieces_of(data):
    own = spm.SentencePieceProcessor(model_proto=data)
    return own, [own.IdToPiece(number) for number in range(own.GetPieceSize())]


@pytest.mark.parametrize("two", [False, True])
def test_marian_has_numbers_of_its_own(two, sentences, tmp_path):
    data = sentences()
    own, pieces = pieces_of(data)
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(data)
    names = ["</s>", "<unk>", *reversed(pieces[3:]), ">>deu<<", "<pad>"]
    size = len(names)
    (tmp_path / "vocab.json").write_text(json.dumps({n: k for k, n in enumerate(names)}))
    if two:
        (tmp_path / "target_vocab.json").write_text((tmp_path / "vocab.json").read_text())
    ids = {"pad": size - 1, "eos": 0, "start": size - 1}
    found = read(tmp_path, "marian", size, ids)
    assert found.shared() == (not two)
    expected = [names.index(piece) for piece in own.Encode(TEXTS[0], out_type=str)]
    assert ids_of(found.source, TEXTS[0]) == [*expected, 0]
    assert found.target.decode(found.target.encode(TEXTS[0])) == TEXTS[0]
    german = found.prefixed(">>deu<<", None)
    assert ids_of(german.source, TEXTS[0]) == [names.index(">>deu<<"), *expected, 0]
    assert ids_of(found.source, "low ☃")[-2:] == [1, 0]
    check_written(found, tmp_path / "out", "marian", size, ids)


def test_t5_has_sentinels_after_its_pieces(sentences, tmp_path):
    data = sentences(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    own, pieces = pieces_of(data)
    (tmp_path / "spiece.model").write_bytes(data)
    size = len(pieces) + 104
    ids = {"pad": 0, "eos": 1, "start": 0}
    found = read(tmp_path, "t5", size, ids)
    assert ids_of(found.source, TEXTS[1]) == [*own.Encode(TEXTS[1]), 1]
    assert found.source.pieces[len(pieces) + 99] == "<extra_id_0>"
    assert len(found.source.theirs) == size
    check_written(found, tmp_path / "out", "t5", size, ids)


def test_pegasus_and_fairseq_shift_their_pieces(sentences, tmp_path):
    data = sentences(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    own, pieces = pieces_of(data)
    for family in ("pegasus", "mbart"):
        (tmp_path / family).mkdir()
    (tmp_path / "pegasus" / "spiece.model").write_bytes(data)
    ids = {"pad": 0, "eos": 1, "start": 0}
    size = len(pieces) + 103
    found = read(tmp_path / "pegasus", "pegasus", size, ids)
    assert ids_of(found.source, TEXTS[2]) == [*(n + 103 for n in own.Encode(TEXTS[2])), 1]
    assert int(found.source.theirs[found.source.unknown_id]) == 105
    check_written(found, tmp_path / "out", "pegasus", size, ids)

    data = sentences()  # <unk>, <s>, </s>
    own, pieces = pieces_of(data)
    folder = tmp_path / "mbart"
    (folder / "sentencepiece.bpe.model").write_bytes(data)
    size = len(pieces) + 3
    added = {"en_XX": size - 2, "de_DE": size - 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    found = read(folder, "mbart", size, FAIRSEQ | {"start": size - 1})
    shifted = [number + 1 for number in own.Encode(TEXTS[2])]
    assert ids_of(found.source, TEXTS[2]) == [*shifted, 2, size - 2]  # the language follows EOS
    german = found.prefixed("de_DE", None)
    check_written(german, tmp_path / "de", "mbart", size, FAIRSEQ | {"start": size - 1})
    found = read(folder, "mbart", size, FAIRSEQ)  # mBART-50
    assert ids_of(found.source, TEXTS[2]) == [size - 2, *shifted, 2]


def test_m2m_100_has_a_vocabulary_and_languages(sentences, tmp_path):
    data = sentences()
    own, pieces = pieces_of(data)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(data)
    names = ["<s>", "<pad>", "</s>", "<unk>", *reversed(pieces[3:])]
    (tmp_path / "vocab.json").write_text(json.dumps({n: k for k, n in enumerate(names)}))
    languages = {"additional_special_tokens": ["__de__", "__en__"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(languages))
    size = len(names) + 10
    found = read(tmp_path, "m2m_100", size, FAIRSEQ)
    expected = [names.index(piece) for piece in own.Encode(TEXTS[3], out_type=str)]
    assert ids_of(found.source, TEXTS[3]) == [len(names) + 1, *expected, 2]
    german = found.prefixed("__de__", "__en__")
    assert ids_of(german.source, TEXTS[3])[0] == len(names)
    check_written(found.prefixed("__de__", None), tmp_path / "out", "m2m_100", size, FAIRSEQ)
    assert ids_of(german.target, TEXTS[3])[0] == len(names) + 1
    with pytest.raises(UserError, match="source_prefix='__xx__'"):
        found.prefixed("__xx__", None)


def test_byt5_has_no_files(tmp_path):
    size, ids = 384, {"pad": 0, "eos": 1, "start": 0}
    found = read(tmp_path, "t5", size, ids, tokenizer_class="ByT5Tokenizer")
    assert ids_of(found.source, "é") == [3 + 0xC3, 3 + 0xA9, 1]
    assert found.target.decode(found.target.encode("é ☃")) == "é ☃"
    check_written(found, tmp_path / "out", "t5", size, ids)


def test_bart_has_a_tokenizer_json(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    made.save(str(tmp_path / "tokenizer.json"))
    made.save_model(str(tmp_path))
    size, ids = made.get_vocab_size() + 1, {"pad": 1, "eos": 2, "start": 2, "bos": 0}
    found = read(tmp_path, "bart", size, ids)
    assert ids_of(found.source, TEXTS[0] + " é") == [0, *made.encode(TEXTS[0] + " é").ids, 2]
    assert found.target.decode(found.target.encode(TEXTS[0])) == TEXTS[0]
    check_written(found, tmp_path / "out", "bart", size, ids)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer .*tokenizer\.json"):  # not split by spaces
        read(tmp_path, "bart", size, ids)


OWN = {
    "characters": lambda: SymbolTokenizer(" abdehilnorstw"),
    "words": lambda: SymbolTokenizer(["a", "bed", "low", "new", "wide"], " ", unknown=True),
    "bytes": ByteTokenizer,
    "bpe": lambda: PieceTokenizer.learn("bpe", iter(TEXTS), 300),
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("kind", OWN)
def test_the_library_reads_our_tokenizers(kind, tmp_path):
    hf = pytest.importorskip("transformers")
    own = OWN[kind]()
    tokenizer_files.write(Tokenizers(own, own), "pegasus", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pegasus"}))
    there = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a low new wide bed", "low bed", *["é ☃"] * (kind == "bytes")):
        tokens = own.encode(text)
        assert there(text).input_ids == tokens
        assert there.decode(tokens, skip_special_tokens=True) == own.decode(tokens) == text
