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
# the learning curve, decodes words of your own, shows the cross-attention, and compares
# normalisation layers in a small ablation.
#
# On Colab, choose **Runtime → Change runtime type → v5e-1 TPU**, then run the cells from the top.
# For a GPU or a CPU, set `ACCELERATOR` in the next cell.

# %% [markdown]
# ## Install
#
# Colab's JAX is too old, so this cell installs a newer one and restarts the session (Colab may
# report a crash); run the cell again after the restart. Ignore complaints of pip about packages of
# Colab that require older versions; this notebook does not use them.

# %%
import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = ""  # the URL to clone this repository from
ACCELERATOR = os.environ.get("ACCELERATOR", "tpu")  # the runtime you chose: tpu, gpu or cpu

# For a GPU, CUDA 12: it runs on drivers too old for CUDA 13, and on newer ones too.
JAX = {"tpu": "jax[tpu]", "gpu": "jax[cuda12]", "cpu": "jax"}[ACCELERATOR]

if importlib.util.find_spec("transformer"):
    print(f"transformer-jax {metadata.version('transformer-jax')} is installed: go on")
elif not REPOSITORY:
    raise RuntimeError("REPOSITORY is empty: set it to this code's address, and run this again")
else:
    if not Path("transformer-jax").exists():
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, "transformer-jax"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--editable", "./transformer-jax", "tensorboard", JAX], check=True)
    print("installed; the session restarts: run this cell again")
    time.sleep(1)  # for this line to be seen
    os.kill(os.getpid(), signal.SIGKILL)  # the session, which then starts anew

# %% [markdown]
# ## Check
#
# If JAX cannot initialise the accelerator, it silently falls back to the CPU. This cell checks.

# %%
import flax
import jax
from packaging.requirements import Requirement

from transformer.errors import UserError

for module in (jax, flax):
    loaded, installed = module.__version__, metadata.version(module.__name__)
    if loaded != installed:
        remedy = "choose Runtime → Restart session, and run from the top"
        raise UserError(f"{module.__name__} {loaded} is loaded and not {installed}: {remedy}")
for needed in map(Requirement, metadata.requires("transformer-jax") or ()):
    if needed.marker:  # of an extra
        continue
    installed = metadata.version(needed.name)
    if not needed.specifier.contains(installed, prereleases=True):
        remedy = "choose Runtime → Disconnect and delete runtime, and run from the top"
        raise UserError(f"{needed} is needed and {installed} is installed: {remedy}")

remedy = f"choose a {ACCELERATOR} under Runtime → Change runtime type and run from the top"
try:
    devices = jax.devices()
except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
    raise UserError(f"JAX finds no {ACCELERATOR} ({error}): {remedy}") from error
if (found := devices[0].platform) != ACCELERATOR:
    remedy += f', or go on without: ACCELERATOR = "{found}"'
    raise UserError(f"JAX runs on {found} and not on {ACCELERATOR}: {remedy}")
print(f"jax {jax.__version__}, flax {flax.__version__}, {len(devices)} × {devices[0].device_kind}")

# %% [markdown]
# ## Train
#
# The same as `python train.py --config=configs/toy_reverse.py`: 50,000 strings of 1 to 16 letters,
# one encoder and one decoder layer, 118 thousand parameters. The table at the end is computed on
# held-out strings; sequence accuracy is the fraction of strings with every token correct.

# %%
from absl import logging

import transformer

ROOT = Path(transformer.__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # configs and the sweeps of lab

from configs import toy_reverse
from transformer import cli
from transformer.config import RunConfig
from transformer.workdir import Workdir

logging.set_verbosity(logging.FATAL)  # libraries log what they also raise
cli.set_up_jax()
workdir = Workdir("runs/toy_reverse")
run = transformer.Run(RunConfig.from_config_dict(toy_reverse.get_config()), workdir.path)
run.train()

# %% [markdown]
# ## The learning curve
#
# Left: the loss, on a logarithmic scale. Right: accuracy. Sequence accuracy lags behind token
# accuracy, because a single wrong token makes a sequence wrong.

# %%
from IPython.display import Image, Markdown, display

display(Image(workdir.plots / "learning_curve.png", width=900))

# %% [markdown]
# ## Words of your own
#
# Use up to 16 lower-case letters. Try longer words, too: the model has seen no longer string in
# training, and does not generalise to them.

# %%
WORDS = ["hello", "attention", "transformer"]

outputs = transformer.load(str(workdir.path)).generate(WORDS)
for word, (best, *_) in zip(WORDS, outputs, strict=True):
    print(word, "→", best.text)

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
# Each row below is a decoding step and each column a source token; dark cells are large weights.
# They run from the upper right to the lower left: the model has learned to read the source
# backwards. ⊢ is the begin-of-sequence token; ⊣ ends the source.

# %%
from functools import partial

from transformer.data.batches import Dataset
from transformer.data.packing import unpacked_rows
from transformer.inference import evaluation, plots

WORD = WORDS[2]

pairs = run.tokenizers.encode(WORDS, [word[::-1] for word in WORDS])
examples = Dataset.from_rows(unpacked_rows(pairs), batch_size=len(WORDS))
with jax.set_mesh(run.mesh):
    variables = run.state.variables()
    maps = jax.jit(partial(evaluation.attention_maps, run.model))(variables, examples)
cross = [layer[WORDS.index(WORD)] for layer in jax.device_get(maps["cross"])]
picture = workdir.plots / f"cross_attention_{WORD}.png"
plots.attention(cross, ["⊢", *WORD[::-1]], [*WORD, "⊣"], f"cross attention, {WORD}", picture)
display(Image(picture, width=1000))

# %% [markdown]
# ## Does it matter which norm?
#
# Layer norm shifts and scales each vector to mean 0 and variance 1; RMS norm only scales. Does the
# shift help? Is a norm needed at all? Four layers; three seeds per variant, trained together.

# %%
from IPython.utils.capture import capture_output
from lab.sweeps import Sweep, grid, report
from lab.sweeps.sweep import plan

sweep = Sweep(
    config=str(ROOT / "configs/ablations/small.py"),
    overrides={"model.num_layers": 4, "model.d_model": 32, "model.d_ff": 128, "batch_size": 32},
    variants=grid(model__norm=["layer", "rms", "none"]),
    baseline="layer",
    seeds=3,
    target=0.5,  # the dotted line below
)
programs = plan(sweep, max_replicas=sweep.seeds)
for program in programs:
    print(f"training {program.name}: {len(program.members)} seeds")
    with capture_output():  # the same output as above
        transformer.Run(
            RunConfig.from_config_dict(program.resolved()), f"runs/norms/{program.name}"
        ).train()

# %% [markdown]
# Lines are means over seeds; bands extend from the worst to the best seed. In the table, brackets
# are 95% intervals and differences are paired by seed. "No evidence of a difference" does not mean
# that there is none: the table states how large a difference three seeds could have detected.

# %%
page = report.write_report(sweep, programs, {}, Path("runs/norms"), "notebooks/colab.ipynb")
table = page.read_text(encoding="utf-8").split("\n## ")[1]
display(Image(page.with_name("learning_curves.png"), width=800), Markdown(f"### {table}"))

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
