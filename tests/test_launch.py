"""The starters of scripts/launch, as far as they go without their machines, and a local SLURM."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import program
from tests.test_programs import ROOT
from transformer import cli

COMMAND = "--command=train.py --config=configs/toy_reverse.py --workdir='runs/a b'"
WORDS = ["train.py", "--config=configs/toy_reverse.py", "--workdir=runs/a b"]
TPU_POD = ("--name=mine", "--zone=here", "--directory=/mnt/it is", COMMAND)
GKE = ("--name=big", "--image=hub/it:1", "--claim=disk", "--accelerator=tpu-v5-lite-podslice")


def launch(name, *flags):
    with program(f"scripts/launch/{name}.py", *flags) as starter:
        cli.explained(starter.main)


def test_slurm_is_asked_for_a_task_for_each_process(capsys):
    asked = ["nodes=2", "tasks_per_node=8", "gpus_per_node=8", "'requeue': True"]
    flags = ("--nodes=2", "--tasks_per_node=8", "--cluster_parameters=gpus_per_node=8", COMMAND)
    launch("slurm", *flags, "--dry_run")
    out = capsys.readouterr().out
    assert [line for line in asked if line in out] == asked
    srun, python, *words = shlex.split(out.splitlines()[-1])
    assert (srun, sys.executable, words) == ("srun", python, WORDS)


def test_a_tpu_pod_runs_the_command_on_every_host(capsys):
    launch("tpu_pod", *TPU_POD, "--dry_run")
    call = shlex.split(capsys.readouterr().out)
    assert " ".join(call[:8]) == "gcloud compute tpus tpu-vm ssh mine --zone=here --worker=all"
    there = shlex.split(call[8].removeprefix("--command="))
    assert there == ["cd", "/mnt/it is", "&&", "python", *WORDS, "--coordinator=auto"]


def test_gke_gets_a_pod_for_each_host(capsys):
    launch("gke", *GKE, "--topology=4x4", "--hosts=4", COMMAND)
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (4, 4, "Indexed")
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    (container,) = pod["containers"]
    assert container["command"] == ["python", *WORDS, "--data_dir=/runs/data"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("gke", (*GKE, "--topology=4x4", "--hosts=2", COMMAND), "has 16 chips, but --hosts=2"),
        ("gke", (*GKE, "--topology=big", "--hosts=2", COMMAND), "write it like 4x4"),
        ("slurm", ("--command=ls",), "it begins with train.py or eval.py"),
        ("slurm", ("--cluster_parameters=a", COMMAND), "'a' is not of the form name=value"),
        ("tpu_pod", TPU_POD, "gcloud is not installed"),
    ],
)
def test_what_cannot_be_started_is_explained(name, flags, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        launch(name, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
@pytest.mark.slurm
def test_a_slurm_job_of_two_tasks_is_requeued_and_goes_on():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(ROOT / "tests/slurm.sh", capture_output=True, text=True, env=env)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming    at step" in done.stdout
    assert done.stdout.endswith("passed\n")
