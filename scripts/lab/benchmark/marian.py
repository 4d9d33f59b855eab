"""Hugging Face's Marian, from a config alone."""

import importlib
from typing import Any

from lab.benchmark.task import Size
from lab.benchmark.torch_peer import TorchPeer, torch
from transformer.data.tokenizer import BOS, EOS, PAD

transformers: Any = importlib.import_module("transformers")


class Network(torch.nn.Module):
    """`MarianMTModel` of that size: post-norm, sinusoidal positions, one table of tokens."""

    def __init__(self, size: Size):
        super().__init__()
        self.model = transformers.MarianMTModel(
            transformers.MarianConfig(
                vocab_size=size.vocabulary,
                d_model=size.width,
                max_position_embeddings=size.room() + 1,
                **{
                    f"{side}_{what}": value
                    for side in ("encoder", "decoder")
                    for what, value in {
                        "layers": size.layers,
                        "attention_heads": size.heads,
                        "ffn_dim": size.ff_width,
                    }.items()
                },
                activation_function="relu",
                dropout=0.0,
                scale_embedding=True,
                init_std=size.width**-0.5,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                decoder_start_token_id=BOS,
                forced_eos_token_id=None,
            )
        )

    def forward(self, source: Any, target_in: Any) -> Any:
        return self.model(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            decoder_input_ids=target_in,
            use_cache=False,
        ).logits


class Marian(TorchPeer):
    """With its `generate`."""

    def build(self) -> Any:
        return Network(self.size)

    def outputs(self, source: Any, beams: int, length: int) -> Any:
        tokens = self.module.model.generate(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            max_new_tokens=length,
            num_beams=beams,
            do_sample=False,
        )
        return tokens[:, 1:]  # it begins with BOS
