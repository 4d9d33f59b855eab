"""x-transformers' `XTransformer`."""

import importlib
from typing import Any

from lab.benchmark.task import Size
from lab.benchmark.torch_peer import TorchPeer, torch
from transformer.data.tokenizer import BOS, EOS, PAD

x_transformers: Any = importlib.import_module("x_transformers")


class Network(torch.nn.Module):
    """`XTransformer` of that size as it comes: pre-norm, learned positions; flash attention on."""

    def __init__(self, size: Size):
        super().__init__()
        sizes = {
            f"{side}_{what}": value
            for side in ("enc", "dec")
            for what, value in {
                "num_tokens": size.vocabulary,
                "max_seq_len": size.room() + 1,
                "depth": size.layers,
                "heads": size.heads,
                "attn_dim_head": size.width // size.heads,
                "ff_mult": size.ff_width // size.width,
                "attn_flash": True,
            }.items()
        }
        self.model = x_transformers.XTransformer(
            dim=size.width, tie_token_emb=True, pad_value=PAD, **sizes
        )

    def forward(self, source: Any, target_in: Any) -> Any:
        mask = source != PAD
        memory = self.model.encoder(source, mask=mask, return_embeddings=True)
        # Its own loss would shift the target; this is what it computes before that.
        return self.model.decoder.net(target_in, context=memory, context_mask=mask)


class XTransformers(TorchPeer):
    """With its `generate` and cache; its beam search knows no end of a sequence."""

    def build(self) -> Any:
        return Network(self.size)

    def outputs(self, source: Any, beams: int, length: int) -> Any:
        start = torch.full_like(source[:, :1], BOS)
        return self.module.model.generate(
            source, start, length, mask=source != PAD, temperature=0.0, eos_token=EOS
        )
