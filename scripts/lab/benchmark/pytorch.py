"""PyTorch's own `nn.Transformer`, eager and compiled."""

import math
from typing import Any

from lab.benchmark.contender import Schedule
from lab.benchmark.task import Size
from lab.benchmark.torch_peer import TorchPeer, greedy, torch
from transformer.data.tokenizer import PAD


class Network(torch.nn.Module):
    """`nn.Transformer` of that size, pre-norm, with sinusoidal positions and one table of tokens.

    PyTorch has neither embeddings nor positions for it: these are what its users write.
    """

    def __init__(self, size: Size):
        super().__init__()
        nn, common = torch.nn, {"batch_first": True, "norm_first": True, "dropout": 0.0}
        sizes = (size.width, size.heads, size.ff_width)
        encoder, decoder = (
            kind(*sizes, **common)
            for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        )
        self.encoder = nn.TransformerEncoder(
            encoder, size.layers, nn.LayerNorm(size.width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder, size.layers, nn.LayerNorm(size.width))
        for matrix in self.parameters():
            if matrix.dim() > 1:
                nn.init.xavier_uniform_(matrix)
        self.embedding = nn.Embedding(size.vocabulary, size.width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        self.scale = math.sqrt(size.width)
        self.register_buffer("positions", sinusoids(size.room() + 1, size.width))

    def embed(self, tokens: Any) -> Any:
        return self.embedding(tokens) * self.scale + self.positions[: tokens.shape[1]]

    def encode(self, source: Any) -> Any:
        return self.encoder(self.embed(source), src_key_padding_mask=source == PAD)

    def decode(self, target_in: Any, memory: Any, source: Any) -> Any:
        length = target_in.shape[1]
        mask = torch.triu(
            torch.ones(length, length, dtype=torch.bool, device=target_in.device), diagonal=1
        )
        # Padding follows the target's tokens: being causal keeps it from them.
        return self.decoder(
            self.embed(target_in),
            memory,
            tgt_mask=mask,
            tgt_is_causal=True,
            memory_key_padding_mask=source == PAD,
        )

    def logits(self, x: Any) -> Any:
        return torch.nn.functional.linear(x, self.embedding.weight)

    def forward(self, source: Any, target_in: Any) -> Any:
        return self.logits(self.decode(target_in, self.encode(source), source))


def sinusoids(length: int, width: int) -> Any:
    """[length, width]: sines, then cosines, of the wavelengths of Vaswani et al. 2017."""
    rates = 10_000.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class PyTorch(TorchPeer):
    """Eager. It has no cache: each token computes the whole target so far, and no beam search."""

    def build(self) -> Any:
        return Network(self.size)

    def outputs(self, source: Any, beams: int, length: int) -> Any:
        memory = self.module.encode(source)

        def step(tokens):
            return self.module.logits(self.module.decode(tokens, memory, source)[:, -1])

        return greedy(step, source, length)


class Compiled(PyTorch):
    """Through `torch.compile` as it comes: for one length, and once more for all others."""

    def start(self, seed: int, schedule: Schedule) -> None:
        super().start(seed, schedule)
        self.forward = torch.compile(self.module)
