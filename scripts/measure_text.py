"""What text costs: preparing a corpus of a given size, and training on it beside the toy strings.

The corpus is made up, of words by Zipf's law. It is prepared from nothing: the dataset, the pieces,
the tokens. Then the train step of one model takes turns on packed rows of toy strings that lie on
the devices, of the text that lies there, and of the text that workers stream. At the end it streams
alone, and the memory of its processes is read now and then.

Usage:
    python scripts/measure_text.py [--pairs=1000000] [--workers=1]
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from lab.claims.measuring import interleaved

from transformer import cli
from transformer.config import RunConfig, load_config
from transformer.console import facts, table
from transformer.data.batches import Dataset
from transformer.data.load import open_corpus
from transformer.data.rows import Rows, alone, learnable, pack
from transformer.data.streaming import Resident, Stream
from transformer.modules.model import Model
from transformer.parallel import sharding
from transformer.training.loop import make_programs
from transformer.training.step import abstract_state, zero_sums

PAIRS = flags.DEFINE_integer("pairs", 1_000_000, "Of the corpus.", lower_bound=10_000)
WORKERS = flags.DEFINE_integer("workers", 1, "Processes that make batches.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps in a turn.", lower_bound=1)
STREAMED = flags.DEFINE_integer("streamed", 500, "Steps while memory is read.", lower_bound=10)

CONFIGS = Path(__file__).parent.parent / "configs"
WORDS = 50_000
LENGTHS = (5, 40)  # words of a text, uniform
LOOKS = 10  # at the memory


def main() -> None:
    """Prepares, lets them take turns, and looks at the memory."""
    config = load_config(CONFIGS / "translate.py")
    config.data.num_workers = WORKERS.value
    config.steps = 2**24
    config.model.num_layers, config.model.d_model, config.model.d_ff = 2, 128, 512
    config.batch_size = 16
    config.data.vocab_size = 2_000
    cli.set_up_jax(RunConfig.resolve(config))
    toy = RunConfig.resolve(load_config(CONFIGS / "toy_reverse.py"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.tsv"
        make_corpus(file, PAIRS.value)
        config.data.train = str(file)
        cfg = RunConfig.resolve(config)
        text, model = prepare(cfg, folder)
        strings = pack(
            alone(open_corpus(toy.data, folder).tokens(toy.data.train)), cfg.data.pack_length
        )
        train(cfg, text, strings, model)


def make_corpus(file: Path, pairs: int) -> None:
    """Texts, and the same with their words in the other order."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(letters[rng.zipf(1.3, size) % 26]) for size in rng.integers(2, 12, WORDS)]
    chances = 1.0 / (np.arange(WORDS) + 3.0)
    below = np.cumsum(chances / chances.sum())
    with file.open("w", encoding="utf-8") as out:
        for size in rng.integers(*LENGTHS, pairs):
            text = [words[place % WORDS] for place in np.searchsorted(below, rng.random(size))]
            out.write(" ".join(text) + "\t" + " ".join(reversed(text)) + "\n")
    facts({"corpus": f"{pairs:,} pairs, {file.stat().st_size / 2**20:,.0f} MiB"})


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long something takes."""
    started = time.perf_counter()
    yield
    facts({what: f"{time.perf_counter() - started:.1f} s"})


def prepare(cfg: RunConfig, folder: str) -> tuple[Rows, Model]:
    """The packed rows of the corpus, from nothing, and their model."""
    with timed("in all"):
        with timed("dataset"):
            corpus = open_corpus(cfg.data, folder)
        with timed("tokens"):
            pairs = corpus.tokens(cfg.data.train)
            kept, _ = learnable(pairs, cfg.data.max_length)
        with timed("packing"):
            rows = pack(alone(pairs, kept), cfg.data.pack_length)
    with timed("again"):
        open_corpus(cfg.data, folder).tokens(cfg.data.train)
    return rows, Model.of(cfg.model, *corpus.tokenizers)


def train(cfg: RunConfig, text: Rows, strings: Rows, model: Model) -> None:
    """Turns of the train step on each kind of rows; then the stream alone."""
    mesh = sharding.make_mesh(cfg.mesh)
    like = abstract_state(model, cfg.recipe(), mesh, 1, cfg.numbers())
    stream = Stream(
        text,
        cfg.batch_size,
        cfg.seeds(),
        steps=cfg.steps,
        workers=WORKERS.value,
        mesh=mesh,
    )
    with jax.set_mesh(mesh), ExitStack() as stack:
        programs = make_programs(cfg, model, like)
        some = text.take(np.arange(min(len(text), 50_000)))
        resident = {
            "toy strings, on the devices": Dataset.of(strings, cfg.batch_size),
            "text, on the devices": Dataset(*some, cfg.batch_size, packed=True),
        }
        everywhere = sharding.replicated(mesh)
        feeds: dict[str, Resident | Stream] = {
            name: Resident(sharding.place(data, everywhere)) for name, data in resident.items()
        }
        state = [programs.init(cfg.seeds(), {})]
        nothing = sharding.place(jax.device_get(zero_sums()), everywhere)
        tokens: dict[str, list[float]] = {}

        def take(name: str, feed: Resident | Stream) -> None:
            sums, taken = nothing, 0
            while taken < STEPS.value:
                data, left = feed.following(state[0].taken())
                steps = min(left, STEPS.value - taken)
                state[0], sums = programs.train_steps(state[0], sums, data, jnp.int32(steps))
                taken += steps
            tokens.setdefault(name, []).append(float(sums["tokens"]))  # waits

        streamed = f"text, streamed by {WORKERS.value}"
        feeds[streamed] = stream
        calls: dict[str, Callable[[], None]] = {
            name: partial(take, name, feed) for name, feed in feeds.items()
        }
        stack.enter_context(stream.running(0))
        seconds = interleaved(calls, ROUNDS.value, 0.0)
        show(seconds, tokens)
        stream.waited()
        memory = []
        for _ in range(LOOKS):
            for _ in range(STREAMED.value // LOOKS // STEPS.value + 1):
                calls[streamed]()
            memory.append(resident_memory())
        waited = f"{100 * stream.waited():.0f}% of the windows"
    facts({"waited": waited, "memory, MiB": ", ".join(f"{m:,.0f}" for m in memory)})


def show(seconds: dict[str, list[float]], tokens: dict[str, list[float]]) -> None:
    """The table of speeds, beside that of the first."""
    speed = {name: np.array(tokens[name][-ROUNDS.value :]) / each for name, each in seconds.items()}
    rows = []
    for name, each in speed.items():
        ratio = each / next(iter(speed.values()))
        spread = f"{np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}]"
        rows.append((name, f"{np.median(each):,.0f}", spread))
    title = f"{ROUNDS.value} rounds of {STEPS.value} steps"
    table(title, ("rows of", "useful target tokens/s", "times the first"), rows)


def resident_memory() -> float:
    """MiB of memory of this process and its workers; pages of files, which the system may take
    back at any time, not counted."""
    total = 0
    for process in ["self", *(child.pid for child in multiprocessing.active_children())]:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        total += int(status.partition("RssAnon:")[2].split()[0])
    return total / 2**10


if __name__ == "__main__":
    cli.run(main)
