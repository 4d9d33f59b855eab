"""Runs a program on every host of a Cloud TPU slice, one process each, through gcloud's ssh.

Every host of the slice (`gcloud compute tpus tpu-vm create`) needs the repository, its environment,
and the run's folder on a shared disk. It ends with the connection; the same command resumes.

    python scripts/launch/tpu_pod.py --name=my-slice --zone=us-east5-b --directory=/mnt/code \\
        --command='train.py --config=configs/vaswani_big.py --workdir=runs/big' [--dry_run]
"""

import shlex
import subprocess

from absl import flags

from transformer import cli
from transformer.errors import UserError, explained

NAME = flags.DEFINE_string("name", None, "Name of the slice.", required=True)
ZONE = flags.DEFINE_string("zone", None, "Its zone.", required=True)
DIRECTORY = flags.DEFINE_string("directory", None, "The repository on its hosts.", required=True)
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the gcloud command, and stop.")


def main() -> None:
    """Calls gcloud, or prints the call."""
    words = [*cli.host_command(COMMAND.value), "--coordinator=auto"]
    remote = f"cd {shlex.quote(DIRECTORY.value)} && python {shlex.join(words)}"
    call = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", NAME.value]
    call += [f"--zone={ZONE.value}", "--worker=all", f"--command={remote}"]
    if DRY_RUN.value:
        print(shlex.join(call))
        return
    with explained("gcloud is not installed; install the Google Cloud CLI", FileNotFoundError):
        status = subprocess.run(call).returncode
    if status:
        raise UserError(f"gcloud exited with status {status}; see its output above")


if __name__ == "__main__":
    cli.run(main)
