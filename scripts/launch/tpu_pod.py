"""Runs a program on all hosts of a Cloud TPU slice, one process each, over gcloud's ssh.

The slice must be there (`gcloud compute tpus tpu-vm create`), and on each of its hosts the
repository, its environment and the run's folder, on a disk that all of them see. The program ends
with the connection; the same command goes on from the last checkpoint.

Usage:
    python scripts/launch/tpu_pod.py --name=my-slice --zone=us-east5-b --directory=/mnt/code \\
        --command='train.py --config=configs/vaswani_big.py --workdir=runs/big' [--dry_run]
"""

import shlex
import subprocess

from absl import flags

from transformer import cli
from transformer.errors import UserError

NAME = flags.DEFINE_string("name", None, "Of the slice.", required=True)
ZONE = flags.DEFINE_string("zone", None, "Where it is.", required=True)
DIRECTORY = flags.DEFINE_string("directory", None, "Of the repository, there.", required=True)
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the call of gcloud, and stop.")


def main() -> None:
    """Calls gcloud, or prints the call."""
    words = [*cli.host_command(COMMAND.value), "--coordinator=auto"]
    there = f"cd {shlex.quote(DIRECTORY.value)} && python {shlex.join(words)}"
    call = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", NAME.value]
    call += [f"--zone={ZONE.value}", "--worker=all", f"--command={there}"]
    if DRY_RUN.value:
        print(shlex.join(call))
        return
    try:
        status = subprocess.run(call).returncode
    except FileNotFoundError as error:
        raise UserError("gcloud is not installed; install the Google Cloud CLI") from error
    if status:
        raise UserError(f"gcloud ended with status {status}; what it printed says why")


if __name__ == "__main__":
    cli.run(main)
