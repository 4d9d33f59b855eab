"""The peers in PyTorch, which share one training loop: `nn.Transformer`, Marian, x-transformers."""

import contextlib
import importlib
import math
from functools import partial
from typing import Any

import numpy as np

from lab.benchmark import task
from lab.benchmark.contender import Contender, Schedule, Setting
from lab.benchmark.task import BOS, EOS, PAD, Size

torch: Any = importlib.import_module("torch")  # an extra, unknown to the type checker
nn, functional = torch.nn, torch.nn.functional


class TorchPeer(Contender):
    """A network: Size → module from (source [B, S], target_in [B, T]) to logits [B, T, V].

    Its `generate(source, beams, length)` returns outputs [B, at most length]. `torch.compile` has
    its defaults: it compiles for one length, then once more for all others.
    """

    def __init__(self, network: Any, setting: Setting, compiled: bool = False):
        self.network, self.compiled, self.size = network, compiled, setting.size
        torch.set_num_threads(setting.threads)
        self.device = torch.device("cuda" if setting.device == "gpu" else "cpu")
        strings = task.load(setting.folder, "train")
        self.lengths = strings.lengths
        self.source, self.target = torch.from_numpy(np.stack(strings)).long().to(self.device)

    def start(self, seed: int, schedule: Schedule) -> None:
        torch.manual_seed(seed)
        self.module = self.network(self.size).to(self.device)
        self.forward = torch.compile(self.module) if self.compiled else self.module
        parameters, rate = self.module.parameters(), schedule.learning_rate
        self.optimizer = torch.optim.Adam(parameters, rate, (0.9, 0.98), eps=1e-9, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule.factor)
        batches = partial(task.batches, self.lengths.max(1), self.size.batch, seed)
        self.batches = {name: batches(name) for name in ("padded", "bucketed")}

    def train(self, steps: int, batching: str) -> tuple[int, float]:
        self.module.train()
        total, tokens = torch.zeros((), device=self.device), 0
        for _ in range(steps):
            rows = next(self.batches[batching])
            tokens += int(self.lengths[rows, 1].sum())
            total += self.train_step(rows)
        return tokens, float(total) / steps  # waits for the device

    def train_step(self, rows: np.ndarray) -> Any:
        """One update from these pairs, padded to the longest of each side; returns the loss."""
        longest, index = self.lengths[rows].max(0), torch.from_numpy(rows).to(self.device)
        source, target = self.source[index, : longest[0]], self.target[index, : longest[1]]
        target_in = functional.pad(target[:, :-1], (1, 0), value=BOS)
        with self.precision():
            logits = self.forward(source, target_in).flatten(0, 1)
            options = {"ignore_index": PAD, "label_smoothing": self.size.label_smoothing}
            loss = functional.cross_entropy(logits, target.flatten(), **options)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def precision(self) -> Any:
        """float32 on a CPU, bfloat16 matrix products on a GPU; float32 parameters on both."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        self.module.eval()
        lengths = (source != PAD).sum(1)
        order = np.argsort(-lengths, kind="stable")
        decoded = np.full((len(source), length), PAD, source.dtype)
        with torch.inference_mode(), self.precision():
            for rows in np.split(order, range(batch, len(order), batch)):
                part = torch.from_numpy(source[rows, : lengths[rows].max()]).long()
                out = self.module.generate(part.to(self.device), beams, length).cpu().numpy()
                decoded[rows, : out.shape[1]] = out
        return decoded

    def save(self, path: str) -> None:
        torch.save(self.module.state_dict(), path)

    def load(self, path: str) -> None:
        self.module = self.network(self.size).to(self.device)
        self.module.load_state_dict(torch.load(path, map_location=self.device))


class TransformerNetwork(nn.Module):
    """`nn.Transformer`, pre-norm, with the embeddings and positions that PyTorch lacks."""

    def __init__(self, size: Size):
        super().__init__()
        sizes = size.d_model, size.num_heads, size.num_layers, size.num_layers, size.d_ff
        self.model = nn.Transformer(*sizes, dropout=0.0, batch_first=True, norm_first=True)
        for name, module in self.model.named_modules():
            if name.endswith(("dropout1", "dropout2", "dropout3")):  # of sublayer outputs
                module.p = size.dropout
        self.dropout = nn.Dropout(size.dropout)
        self.embedding = nn.Embedding(size.vocabulary, size.d_model, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=size.d_model**-0.5)
        rates = 10_000.0 ** -(torch.arange(0, size.d_model, 2) / size.d_model)
        angles = torch.arange(size.room + 1)[:, None] * rates
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))

    def embed(self, tokens: Any) -> Any:
        scaled = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scaled + self.positions[: tokens.shape[1]])

    def encode(self, source: Any) -> Any:
        return self.model.encoder(self.embed(source), src_key_padding_mask=source == PAD)

    def decode(self, target_in: Any, memory: Any, source: Any) -> Any:
        length = target_in.shape[1]
        # Causality keeps the target's padding, which follows its tokens, from them.
        causal = torch.ones(length, length, dtype=torch.bool, device=target_in.device).triu(1)
        masks = {"tgt_mask": causal, "memory_key_padding_mask": source == PAD}
        x = self.model.decoder(self.embed(target_in), memory, tgt_is_causal=True, **masks)
        return functional.linear(x, self.embedding.weight)

    def forward(self, source: Any, target_in: Any) -> Any:
        return self.decode(target_in, self.encode(source), source)

    def generate(self, source: Any, beams: int, length: int) -> Any:
        """Greedy. PyTorch has no cache, so each token recomputes the whole target."""
        memory, tokens = self.encode(source), torch.full_like(source[:, :1], BOS)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while tokens.shape[1] <= length and not done.all():
            token = self.decode(tokens, memory, source)[:, -1].argmax(-1).masked_fill(done, PAD)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            done |= token == EOS
        return tokens[:, 1:]


class MarianNetwork(nn.Module):
    """Hugging Face's `MarianMTModel`: post-norm, sinusoidal positions, one embedding."""

    def __init__(self, size: Size):
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        side = {"layers": size.num_layers, "attention_heads": size.num_heads, "ffn_dim": size.d_ff}
        config = transformers.MarianConfig(
            **{f"{name}_{key}": side[key] for name in ("encoder", "decoder") for key in side},
            vocab_size=size.vocabulary,
            d_model=size.d_model,
            max_position_embeddings=size.room + 1,
            activation_function="relu",
            dropout=size.dropout,  # of the attention weights and inside of feed-forward: 0
            scale_embedding=True,
            init_std=size.d_model**-0.5,
            **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
            decoder_start_token_id=BOS,
            forced_eos_token_id=None,
        )
        self.model = transformers.MarianMTModel(config)

    def forward(self, source: Any, target_in: Any) -> Any:
        inputs = {"input_ids": source, "attention_mask": (source != PAD).long()}
        return self.model(**inputs, decoder_input_ids=target_in, use_cache=False).logits

    def generate(self, source: Any, beams: int, length: int) -> Any:
        inputs = {"input_ids": source, "attention_mask": (source != PAD).long()}
        options = {"max_new_tokens": length, "num_beams": beams, "do_sample": False}
        return self.model.generate(**inputs, **options)[:, 1:]  # without BOS


class XNetwork(nn.Module):
    """`XTransformer` with its defaults: pre-norm, learned positions; and flash attention."""

    def __init__(self, size: Size):
        super().__init__()
        side = {
            "num_tokens": size.vocabulary,
            "max_seq_len": size.room + 1,
            "depth": size.num_layers,
            "heads": size.num_heads,
            "attn_dim_head": size.d_model // size.num_heads,
            "ff_mult": size.d_ff // size.d_model,
            "attn_flash": True,
            **{f"{name}_dropout": size.dropout for name in ("emb", "attn_sublayer", "ff_sublayer")},
        }
        sides = {f"{name}_{key}": side[key] for name in ("enc", "dec") for key in side}
        make: Any = importlib.import_module("x_transformers").XTransformer
        self.model = make(dim=size.d_model, tie_token_emb=True, pad_value=PAD, **sides)

    def forward(self, source: Any, target_in: Any) -> Any:
        mask = source != PAD
        memory = self.model.encoder(source, mask=mask, return_embeddings=True)
        # What its own loss computes after shifting the target.
        return self.model.decoder.net(target_in, context=memory, context_mask=mask)

    def generate(self, source: Any, beams: int, length: int) -> Any:
        """Greedy: its beam search does not stop at EOS."""
        start, mask = torch.full_like(source[:, :1], BOS), source != PAD
        options = {"temperature": 0.0, "eos_token": EOS}
        return self.model.generate(source, start, length, mask=mask, **options)


PyTorch = partial(TorchPeer, TransformerNetwork)
Compiled = partial(TorchPeer, TransformerNetwork, compiled=True)
Marian = partial(TorchPeer, MarianNetwork)
CompiledMarian = partial(TorchPeer, MarianNetwork, compiled=True)
XTransformers = partial(TorchPeer, XNetwork)
