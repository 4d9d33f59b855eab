"""Tests claims about attention, layer norm and recurrence, and writes a page with the results.

Runs or resumes the sweeps that the claims rest on if they are not complete.

    python scripts/claims.py [--workdir=runs] [--jobs=4] [--only=causality,moments]
"""

from dataclasses import asdict
from pathlib import Path

import jax
from absl import flags
from lab.claims.claim import Setting, verdict, write_page
from lab.claims.cost import growth, meeting, parallel, sequential, wall_time
from lab.claims.learning import convergence, learning
from lab.claims.modules import causality, heads, moments, probabilities, same_scale

from transformer import cli
from transformer.console import console, facts
from transformer.errors import check_choice
from transformer.parallel.mesh import describe_mesh, one_device_mesh
from transformer.workdir import commit, write_json

# In the order of the page.
FIRST = (causality, probabilities, heads, moments, same_scale, convergence, growth, meeting)
CLAIMS = {each.__name__: each for each in (*FIRST, learning, sequential, wall_time, parallel)}

WORKDIR = flags.DEFINE_string("workdir", "runs", "The folder of the sweeps' folders.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
JOBS = flags.DEFINE_integer("jobs", 1, "Programs of a sweep at a time.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "docs/results", "For claims.md and its folder of figures.")
ONLY = flags.DEFINE_list("only", list(CLAIMS), "Which claims; the page keeps the others.")


def main() -> None:
    """Measures the claims and writes the page."""
    for name in ONLY.value:
        check_choice(CLAIMS, name, "--only")
    cli.set_up_jax()
    folder = Path(OUTPUT.value, "claims")
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(Path(WORKDIR.value), DATA_DIR.value, JOBS.value, folder)
    devices = describe_mesh(one_device_mesh())
    about = {"devices": devices, "commit": commit(), "jax": jax.__version__}
    for name in (name for name in CLAIMS if name in ONLY.value):
        claim = CLAIMS[name](setting)
        write_json(folder / f"{name}.json", about | asdict(claim))
        console.print(f"{claim.title}: {verdict(claim.checks)}")
    facts({"page": str(write_page(folder, list(CLAIMS)))})


if __name__ == "__main__":
    cli.run(main)
