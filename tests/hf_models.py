"""Small random models of Hugging Face's own classes, in folders as their authors publish them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformer.data.tokenizer import EOS
from transformer.inference.generation import TrainedModel

STOPPING = {"false": False, "true": True, "never": "never"}
BART = {
    "vocab_size": 16,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
T5 = {
    "vocab_size": 16,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 1,  # Transformers has too small a cache for more than num_layers
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
SWISH = {"scale_embedding": True, "activation_function": "swish"}
LAST = {
    "bos_token_id": 0,
    "pad_token_id": 15,
    "decoder_start_token_id": 15,
    "bad_words_ids": [[15]],
}
TWO = {"decoder_vocab_size": 14, "share_encoder_decoder_embeddings": False}
NEXT = {"pad_token_id": 13, "decoder_start_token_id": 13, "bad_words_ids": [[13]]}
BAD_PAD = {"bad_words_ids": [[0]]}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
UNTIED = {"lm_head"}
# Name → class, config, and options: which tensors to untie.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "marian": ("MarianMTModel", "MarianConfig", BART | SWISH | LAST),
    "marian_two": ("MarianMTModel", "MarianConfig", BART | SWISH | NEXT | TWO),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART | BAD_PAD | SWISH),
    "m2m_100": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        BART | {"forced_bos_token_id": 7, "bad_words_ids": [[1]]},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART | {"forced_bos_token_id": 0, "bad_words_ids": [[1]]},
    ),
    "mbart": (
        "MBartForConditionalGeneration",
        "MBartConfig",
        BART | SWISH | {"decoder_start_token_id": 5, "bad_words_ids": [[1]]},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | BAD_PAD),
    "t5_v1_1": ("T5ForConditionalGeneration", "T5Config", T5 | BAD_PAD | GATED),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | BAD_PAD),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5 | BAD_PAD),
}


def make_model(name: str, folder: Path) -> Any:
    """Saves a random model with a vocabulary of its own in `folder`; returns it as read again."""
    import torch
    import transformers

    kind, config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                gain = "norm" in key and key.endswith("weight")
                parameter.normal_(mean=float(gain), std=0.3 if "t5" in name else 0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if name in ("t5_v1_1", "mt5"):
        state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    if "bad_words_ids" in values:
        model.generation_config.bad_words_ids = values["bad_words_ids"]
    model.generation_config.renormalize_logits = name == "marian"  # as in OPUS-MT
    for key in ("forced_bos_token_id", "decoder_start_token_id"):
        if key in values:
            setattr(model.generation_config, key, values[key])
    model.generation_config.max_length = 12
    model.save_pretrained(folder, state_dict=state)
    for side, size in (("vocab", 16), ("target_vocab", values.get("decoder_vocab_size"))):
        if size:
            pieces = {f"p{number}": number for number in range(size)}
            (folder / f"{side}.json").write_text(json.dumps(pieces))
    return getattr(transformers, kind).from_pretrained(folder).eval()


def compare(
    model: Any, trained: TrainedModel, texts: list[str], given: dict, beams: int, **options
):
    """Checks that the outputs of `generate` for texts and their tensors are those of `trained`.

    They may differ where their scores do not, but that is rare.
    """
    import torch

    own = options | {"do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    if "early_stopping" in own:
        own["early_stopping"] = STOPPING[own["early_stopping"]]
    with torch.no_grad():
        record = {"return_dict_in_generate": True, "output_scores": True}
        expected = model.generate(**given, **own, **record)
    rows = expected.sequences.numpy()[:, 1:].reshape(len(texts), beams, -1)
    scores = expected.sequences_scores.numpy().reshape(-1, beams) if beams > 1 else None
    found = trained.generate(texts, beam_size=beams, n_best=beams, **options)
    theirs, different = trained.tokenizers.target.theirs, 0
    for i, k in np.ndindex(len(texts), beams):
        row, ids = rows[i, k].tolist(), theirs[found[i][k].tokens].tolist()
        end = row.index(theirs[EOS]) if theirs[EOS] in row else len(row)
        different += row[:end] != ids
        if scores is not None:
            assert found[i][k].score == pytest.approx(scores[i, k], rel=1e-5, abs=1e-5)
    assert different <= (0.005 * len(texts) * beams if beams > 1 else 0)
