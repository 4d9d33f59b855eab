# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A Transformer that learns to write backwards
#
# Here a small encoder-decoder Transformer learns to turn `hello` into `olleh`. You will watch it
# learn, give it words of your own, see where it looks while it writes, and settle a question by
# experiment: does it matter which norm it has?
#
# On Colab, choose **Runtime → Change runtime type → v5e-1 TPU**, then run the cells from the top.
# A GPU or a plain CPU will do as well: say so in `ACCELERATOR`.

# %% [markdown]
# ## Install
#
# Colab comes with a JAX that is too old, so this cell installs a newer one and restarts the session
# (Colab may call that a crash). Then run it again: it has nothing left to do, and you can go on.
# Should pip complain of Colab's own packages that want older versions, let it: nothing here
# uses them.

# %%
import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = ""  # the address that this code can be cloned from
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
# If JAX cannot reach the accelerator, it quietly takes the CPU. Better to know now.

# %%
import flax
import jax
from packaging.requirements import Requirement

from transformer.errors import UserError

for module in (jax, flax):
    loaded, installed = module.__version__, metadata.version(module.__name__)
    if loaded != installed:
        raise UserError(
            f"{module.__name__} {loaded} is loaded and {installed} is installed: choose "
            "Runtime → Restart session, and run from the top"
        )
for needed in map(Requirement, metadata.requires("transformer-jax") or ()):
    if needed.marker:  # of an extra
        continue
    installed = metadata.version(needed.name)
    if not needed.specifier.contains(installed, prereleases=True):
        raise UserError(
            f"{needed} is needed and {installed} is installed: choose "
            "Runtime → Disconnect and delete runtime, and run from the top"
        )

remedy = f"choose a {ACCELERATOR} under Runtime → Change runtime type and run from the top"
try:
    devices = jax.devices()
except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
    raise UserError(f"JAX finds no {ACCELERATOR} ({error}): {remedy}") from error
found = devices[0].platform
if found != ACCELERATOR:
    raise UserError(
        f"JAX runs on {found} and not on {ACCELERATOR}: {remedy}, or go on without: "
        f'ACCELERATOR = "{found}"'
    )
print(f"jax {jax.__version__}, flax {flax.__version__}, {len(devices)} × {devices[0].device_kind}")

# %% [markdown]
# ## Train
#
# The same as `python train.py --config=configs/toy_reverse.py`: 50,000 strings of 1 to 16 letters,
# one encoder and one decoder layer, 118 thousand parameters. The table at the end is about
# strings that were never trained on; a sequence is right when every letter of it is.

# %%
from absl import logging

import transformer

ROOT = Path(transformer.__file__).parent.parent
sys.path.insert(0, str(ROOT))  # configs/ is beside the package and not in it

from configs import toy_reverse
from transformer import cli
from transformer.config import RunConfig
from transformer.training.workdir import Workdir

logging.set_verbosity(logging.FATAL)  # libraries log what they also raise
cli.set_up_jax()
workdir = Workdir("runs/toy_reverse")
run = transformer.Run(RunConfig.from_config_dict(toy_reverse.get_config()), workdir.path)
run.train()

# %% [markdown]
# ## The learning curve
#
# On the left the loss, on a logarithmic scale; on the right how much is right. Whole sequences lag
# behind single letters, for one wrong letter spoils a sequence.

# %%
from IPython.display import Image, Markdown, display

display(Image(workdir.plots / "learning_curve.png", width=900))

# %% [markdown]
# ## Words of your own
#
# Any lower-case letters, up to 16 of them. Try more as well: it has never seen a longer string, and
# does not know how to go on from what it has seen.

# %%
from functools import partial

from transformer.data.batches import Dataset
from transformer.data.rows import alone
from transformer.inference import evaluation, plots
from transformer.parallel.mesh import one_device_mesh
from transformer.training import trained

WORDS = ["hello", "attention", "transformer"]

_, tokenizers, model, _, variables, _ = trained.load(workdir, one_device_mesh())
pairs = tokenizers.encode(WORDS, [word[::-1] for word in WORDS])
examples = Dataset.of(alone(pairs), batch_size=len(WORDS))
decode = jax.jit(partial(evaluation.decode, model, length=examples.longest() + 1))
for word, output in zip(WORDS, decode(variables, examples).tokens, strict=True):
    print(word, "→", tokenizers.target.decode(output.tolist()))

# %% [markdown]
# ## Where it looks
#
# To write a letter, the decoder asks a question of the source: a query $q$. Each letter of the
# source has a key $k$ that says what it offers, and a value $v$ to be passed on. How well a key
# answers the query is their dot product; softmax makes weights of these that sum to 1; what the
# decoder gets is the mean of the values with these weights:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$
#
# Dot products of longer vectors are larger; dividing by $\sqrt{d_k}$ keeps softmax from putting
# everything on one key before anything is learned.
#
# Below, each row is a step of writing and each column a letter of the source; dark is a large
# weight. The first letter to write is the last of the source, so the dark cells run from the upper
# right to the lower left: the model has found out by itself to read backwards. ⊢ stands for the
# begin of writing, ⊣ for the end of the source; some heads look there when all is written.

# %%
WORD = WORDS[2]

maps = jax.jit(partial(evaluation.attention_maps, model))(variables, examples)
cross = [layer[WORDS.index(WORD)] for layer in jax.device_get(maps["cross"])]
picture = workdir.plots / f"cross_attention_{WORD}.png"
plots.attention(cross, ["⊢", *WORD[::-1]], [*WORD, "⊣"], f"cross attention, {WORD}", picture)
display(Image(picture, width=1000))

# %% [markdown]
# ## Does it matter which norm?
#
# Layer norm shifts and scales every vector to mean 0 and variance 1; RMS norm only scales. Is the
# shift of any use? And is a norm needed at all? Four layers this time, three seeds of each, because
# one run proves little: the seeds of a variant are trained together in one program.

# %%
from IPython.utils.capture import capture_output
from lab.sweeps import report
from lab.sweeps.sweep import Sweep, grid, plan

sweep = Sweep(
    config=str(ROOT / "configs/ablations/small.py"),
    overrides={"model.num_layers": 4, "model.d_model": 32, "model.d_ff": 128, "batch_size": 32},
    variants=grid(model__norm=["layer", "rms", "none"]),
    baseline="layer",
    seeds=3,
    target=0.5,  # the dotted line below
)
programs = plan(sweep, most=sweep.seeds)
for program in programs:
    print(f"training {program.name}: {len(program.members)} seeds")
    with capture_output():  # it would say what it said above
        transformer.Run(
            RunConfig.from_config_dict(program.resolved()), f"runs/norms/{program.name}"
        ).train()

# %% [markdown]
# The lines are means over seeds, the bands reach from the worst seed to the best. In the table,
# brackets are 95% intervals, differences are taken seed by seed, and the verdict follows from
# them by a rule. "No evidence of a difference" does not say that there is none: it says how large
# one would have had to be for three seeds to show it.

# %%
page = report.make(sweep, programs, {}, Path("runs/norms"), "notebooks/colab.ipynb")
table = page.read_text(encoding="utf-8").split("\n## ")[1]
display(Image(page.with_name("learning_curves.png"), width=800), Markdown(f"### {table}"))

# %% [markdown]
# ## TensorBoard
#
# All runs so far, side by side.

# %%
if importlib.util.find_spec("tensorboard"):
    get_ipython().run_line_magic("load_ext", "tensorboard")
    get_ipython().run_line_magic("tensorboard", "--logdir runs")
else:
    print("TensorBoard is not installed: pip install tensorboard, and run this again")

# %% [markdown]
# ## Go on
#
# Change one word and train again: `config = toy_reverse.get_config()`, then
# `config.data.task = "sort"` or `config.model.position_encoding = "none"`, in its own `Workdir`.
# `transformer/config.py` has every knob, each with a line on what it does; `README.md` shows the
# same from the command line, and more.
