"""A real SLURM of one node, where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_programs import ROOT


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_of_two_tasks_is_requeued_and_goes_on():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(ROOT / "tests" / "slurm.sh")],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming    at step" in done.stdout
    assert done.stdout.endswith("passed\n")
