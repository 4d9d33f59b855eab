# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a Transformer that reverses strings
#
# This notebook trains a small encoder-decoder Transformer to turn `hello` into `olleh`. It plots
# the learning curve, decodes words of your own, shows the cross-attention, trains on word pairs of
# your own, and compares normalisation layers in a small ablation.
#
# On Colab, choose **Runtime → Change runtime type → v5e-1 TPU**, then run the cells from the top.
# For a GPU or a CPU, choose `ACCELERATOR` in the next cell, too.

# %% [markdown]
# ## Install
#
# Clones the repository and installs it with its dependencies; the output of git and pip is shown.
# Ignore complaints of pip about packages of Colab that require older versions; this notebook does
# not use them. If an older version of a package is already loaded, the cell asks for a restart.

# %%
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = ""  # @param {type:"string"}
ACCELERATOR = "tpu"  # @param ["tpu", "gpu", "cpu"]
ACCELERATOR = os.environ.get("ACCELERATOR", ACCELERATOR)

# For a GPU, CUDA 12: it runs on drivers too old for CUDA 13, and on newer ones too.
JAX = {"tpu": "jax[tpu]", "gpu": "jax[cuda12]", "cpu": "jax"}[ACCELERATOR]


class StopError(Exception):
    """Ends a cell with one sentence in place of a traceback."""

    def _render_traceback_(self):
        return [f"error: {self}"]


def run_program(*words, **environment):
    """Runs a program and shows its output as it comes."""
    print("$", *words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, **pipes, env={**os.environ, **environment}) as process:
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise StopError(f"{words[0]} failed with status {process.returncode}; its output says why")


if importlib.util.find_spec("transformer"):
    print(f"transformer-jax {metadata.version('transformer-jax')} is installed")
elif not REPOSITORY:
    raise StopError("REPOSITORY is empty: enter this code's git address, and run the cell again")
else:
    clone = Path("transformer-jax").resolve()
    if not clone.exists():
        run_program("git", "clone", "--depth=1", REPOSITORY, str(clone))
    pip = [sys.executable, "-m", "pip", "install", "--progress-bar=off"]
    run_program(*pip, "--editable", str(clone), "tensorboard", JAX)
    sys.path.insert(0, str(clone))  # by itself only the next session finds it
    importlib.invalidate_caches()
    print(f"transformer-jax {metadata.version('transformer-jax')} is installed from {clone}")

for name in ("numpy", "jaxlib", "jax", "flax"):
    loaded, installed = getattr(sys.modules.get(name), "__version__", None), metadata.version(name)
    if loaded not in (None, installed):
        remedy = "choose Runtime → Restart session, and run from the top"
        raise StopError(f"{name} {loaded} is loaded, and {installed} is installed: {remedy}")

# %% [markdown]
# ## Check
#
# If JAX cannot initialise the accelerator, it silently falls back to the CPU. This cell prints the
# devices, and stops if they are not what you chose, or if a package has an unsuitable version.

# %%
import jax
from packaging.requirements import Requirement

for needed in map(Requirement, metadata.requires("transformer-jax") or ()):
    if needed.marker:  # of an extra
        continue
    installed = metadata.version(needed.name)
    if not needed.specifier.contains(installed, prereleases=True):
        remedy = "choose Runtime → Disconnect and delete runtime, and run from the top"
        raise StopError(f"{needed} is needed and {installed} is installed: {remedy}")

remedy = f"choose a {ACCELERATOR} under Runtime → Change runtime type and run from the top"
try:
    devices = jax.devices()
except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
    raise StopError(f"JAX finds no {ACCELERATOR} ({error}): {remedy}") from error
if (found := devices[0].platform) != ACCELERATOR:
    remedy += f', or go on without: ACCELERATOR = "{found}"'
    raise StopError(f"JAX runs on {found} and not on {ACCELERATOR}: {remedy}")
print(f"jax {jax.__version__}, {len(devices)} × {devices[0].device_kind}")

# %% [markdown]
# ## Where runs are kept
#
# Runs are written to `runs/` on this machine, which Colab deletes with the session. If `DRIVE`
# names a folder of your Google Drive, such as `transformer-runs`, this cell copies the runs in it
# to this machine, and `keep_runs()` copies all runs back after each training. A run whose training
# was interrupted then continues from the checkpoint that was copied last.
#
# Do not train in the Drive's folder itself: a run locks its folder (`flock`) and replaces files by
# renaming them. Both have to be atomic, which a Drive that is mounted as a folder does not
# guarantee.

# %%
import shutil

DRIVE = ""  # @param {type:"string"}

if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    kept = Path("/content/drive/MyDrive", DRIVE)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, "runs", dirs_exist_ok=True)
    print(f"{len(list(kept.glob('*')))} folders were copied from {kept} to runs/")
else:
    print("runs stay on this machine")


def keep_runs():
    """Copies all runs to the Drive, if one is chosen."""
    if DRIVE:
        shutil.copytree("runs", kept, dirs_exist_ok=True)
        print(f"copied runs/ to {kept}")


# %% [markdown]
# ## Train
#
# The same as `python train.py --config=configs/toy_reverse.py`: 50,000 strings of 1 to 16 letters,
# one encoder and one decoder layer, 118 thousand parameters. The cell prints the progress, and the
# metrics of strings that were held out: sequence accuracy is the fraction of strings with every
# token correct.

# %%
from absl import logging

import transformer
from transformer import Run, RunConfig

ROOT = Path(transformer.__file__).parent.parent
sys.path.insert(0, str(ROOT))
from configs import toy_reverse

logging.set_verbosity(logging.FATAL)  # libraries log what they also raise
config = toy_reverse.get_config()
run = Run(RunConfig.from_config_dict(config), "runs/toy_reverse")
run.train()
for name, value in run.evaluate("test").items():
    print(f"{name:24}{value:.4f}")
keep_runs()

# %% [markdown]
# ## The learning curve
#
# Left: the loss, on a logarithmic scale. Right: accuracy. Sequence accuracy lags behind token
# accuracy, because a single wrong token makes a sequence wrong.

# %%
from IPython.display import Image, display

display(Image("runs/toy_reverse/plots/learning_curve.png", width=900))

# %% [markdown]
# ## Words of your own
#
# The cell prints each word and the output of the trained model. Use up to 16 lower-case letters.
# Try longer words, too: the model has seen no longer string in training, and does not generalise
# to them.

# %%
WORDS = ["hello", "attention", "transformer"]

model = transformer.load("runs/toy_reverse")
outputs = [best for best, *_ in model.generate(WORDS)]
for word, output in zip(WORDS, outputs, strict=True):
    print(word, "→", output.text)

# %% [markdown]
# ## Cross-attention
#
# For each output token the decoder computes a query $q$. Each source token has a key $k$ and a
# value $v$. The dot products of the query with the keys, normalised by a softmax, are the attention
# weights, which sum to 1. The decoder receives the mean of the values under these weights:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$
#
# Dividing by $\sqrt{d_k}$ keeps the softmax from saturating at initialisation.
#
# The cell draws the weights of each head for the last word. A row is the step that outputs the
# token on the left, and a column a token of the source; dark cells are large weights. They run from
# the upper right to the lower left: the model has learned to read the source backwards. ⊣ is the
# end-of-sequence token.

# %%
import matplotlib.pyplot as plt

attention = model.attention(WORDS, outputs)[-1]
heads = attention.cross[0]  # of the only layer; [heads, output tokens, source tokens]
_, panels = plt.subplots(1, len(heads), figsize=(3 * len(heads), 3.2), layout="constrained")
for head, (axes, weights) in enumerate(zip(panels, heads, strict=True), 1):
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(attention.source)), attention.source)
    axes.set_yticks(range(len(attention.output)), attention.output)
    axes.set_title(f"head {head}")
plt.show()

# %% [markdown]
# ## Train on pairs of your own
#
# Type pairs of words: a source, a space and its target, with commas between the pairs. The cell
# writes them to `my_pairs/`, every fifth one to a file that is held out from training, trains a
# small model on characters, and prints how many of its outputs are right. From a few dozen pairs a
# model learns those, and next to nothing about others; thousands of pairs are needed for that.

# %%
from transformer import default_config

PAIRS = """
cat cats, dog dogs, car cars, tree trees, book books, hand hands, river rivers, cloud clouds,
box boxes, fox foxes, tax taxes, fix fixes, wish wishes, dish dishes, bush bushes, flash flashes,
city cities, baby babies, pony ponies, lady ladies, berry berries, party parties, story stories,
toy toys, day days, key keys, boy boys, bus buses, gas gases, lens lenses, glass glasses,
church churches, match matches, lunch lunches, couch couches, house houses, name names, lake lakes
"""

pairs = [pair.split() for pair in PAIRS.replace("\n", " ").split(",") if pair.strip()]
if wrong := [" ".join(pair) for pair in pairs if len(pair) != 2]:
    raise StopError(f"{wrong[0]!r} is not a source and a target, two words with a space between")
if len(pairs) < 10:
    raise StopError(f"{len(pairs)} pairs are too few: type at least 10")
Path("my_pairs").mkdir(exist_ok=True)
splits = {"held_out": pairs[::5], "train": [pair for k, pair in enumerate(pairs) if k % 5]}
for name, part in splits.items():
    lines = "".join(f"{source}\t{target}\n" for source, target in part)
    Path(f"my_pairs/{name}.tsv").write_text(lines, encoding="utf-8")
    print(f"my_pairs/{name}.tsv: {len(part)} pairs")

config = default_config()
config.steps, config.batch_size, config.eval_every = 300, 32, 100
config.model.dropout_rate = 0.1
config.data.dataset, config.data.tokenizer = "files", "characters"
config.data.train, config.data.validation = "my_pairs/train.tsv", "my_pairs/held_out.tsv"
config.data.test = "validation"
shutil.rmtree("runs/my_pairs", ignore_errors=True)  # of other pairs
Run(RunConfig.from_config_dict(config), "runs/my_pairs").train()
keep_runs()

model = transformer.load("runs/my_pairs")
for name, part in splits.items():
    outputs = [best.text for best, *_ in model.generate([source for source, _ in part])]
    found = [(*pair, text) for pair, text in zip(part, outputs, strict=True)]
    right = sum(text == target for _, target, text in found)
    print(f"{name}: {right} of {len(found)} outputs are right")
    for source, target, text in found[:5]:
        print(f"    {source} → {text}" + f", not {target}" * (text != target))

# %% [markdown]
# ## Does it matter which norm?
#
# Layer norm shifts and scales each vector to mean 0 and variance 1; RMS norm only scales. Does the
# shift help? Is a norm needed at all? The cell trains four layers with each, and with three seeds
# at once (`replicas`), then draws all runs. Lines are means over seeds, in bands from the worst to
# the best seed; tables have mean (lowest–highest).

# %%
config = toy_reverse.get_config()
config.replicas, config.steps, config.eval_every = 3, 600, 50
config.model.num_layers, config.model.d_model, config.model.d_ff = 4, 32, 128
for norm in ("layer", "rms", "none"):
    config.model.norm = norm
    print(f"training model.norm={norm}")
    Run(RunConfig.from_config_dict(config), f"runs/norms/{norm}").train()
keep_runs()

script = str(ROOT / "scripts/plot_runs.py")
run_program(sys.executable, script, "runs/norms", "--out=norms.png", JAX_PLATFORMS="cpu")
display(Image("norms.png", width=1000))

# %% [markdown]
# Three seeds show large differences only. `scripts/sweep.py` trains such comparisons with more
# seeds, and reports confidence intervals and tests that are paired by seed.

# %% [markdown]
# ## TensorBoard, with all runs so far

# %%
if importlib.util.find_spec("tensorboard"):
    get_ipython().run_line_magic("load_ext", "tensorboard")
    get_ipython().run_line_magic("tensorboard", "--logdir runs")
else:
    print("TensorBoard is not installed: pip install tensorboard, and run this again")

# %% [markdown]
# ## Next steps
#
# Change one option and train again: `config = toy_reverse.get_config()`, then
# `config.data.task = "sort"` or `config.model.position_encoding = "none"`, with another folder.
# `configs/base.py` lists every option; `README.md` shows the same on the command line.
