"""Tests the claims of "Attention Is All You Need" and writes a page with the results.

Runs or resumes the sweeps that the claims rest on if they are not complete.

Usage:
    python scripts/claims.py [--workdir=runs] [--jobs=4] [--only=causality,moments]
"""

from pathlib import Path

import jax
from absl import flags
from lab.claims import attention, complexity, learning, norms, page, recurrence
from lab.claims.claim import Setting, verdict

from transformer import cli
from transformer.console import console, facts
from transformer.errors import choose
from transformer.parallel.devices import describe_mesh
from transformer.parallel.mesh import one_device_mesh
from transformer.workdir import commit

# In the order of the page.
CLAIMS = {
    "causality": attention.causality,
    "probabilities": attention.probabilities,
    "heads": attention.heads,
    "moments": norms.moments,
    "same_scale": norms.same_scale,
    "convergence": learning.convergence,
    "growth": complexity.growth,
    "meeting": complexity.meeting,
    "learning": learning.learning,
    "sequential": recurrence.sequential,
    "wall_time": recurrence.wall_time,
    "parallel": recurrence.parallel,
}

WORKDIR = flags.DEFINE_string("workdir", "runs", "The folder of the sweeps' folders.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
JOBS = flags.DEFINE_integer("jobs", 1, "Programs of a sweep at a time.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "docs/results", "For claims.md and its folder of figures.")
ONLY = flags.DEFINE_list("only", list(CLAIMS), "Which claims; the page keeps the others.")


def main() -> None:
    """Measures the claims and writes the page."""
    for name in ONLY.value:
        choose(CLAIMS, name, "--only")
    cli.set_up_jax()
    folder = Path(OUTPUT.value, "claims")
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(Path(WORKDIR.value), DATA_DIR.value, JOBS.value, folder)
    about = {
        "devices": describe_mesh(one_device_mesh()),
        "commit": commit(),
        "jax": jax.__version__,
    }
    for name in (name for name in CLAIMS if name in ONLY.value):
        claim = CLAIMS[name](setting)
        page.store(name, claim, folder, about)
        console.print(f"{claim.title}: {verdict(claim.checks)}")
    facts({"page": str(page.write(folder, list(CLAIMS)))})


if __name__ == "__main__":
    cli.run(main)
