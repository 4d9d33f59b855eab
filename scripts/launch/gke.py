"""Prints the manifest of a JobSet that runs a program on a TPU slice under GKE, for kubectl.

A pod for each host of the slice; they find each other by what GKE tells them. The image holds the
repository and its environment (`pip install -e '.[tpu]'`); the volume claim, which all pods must be
able to write to, takes the runs at /runs and the datasets at /runs/data. A slice that fails is
started anew, and the program goes on from its last checkpoint.

Usage:
    python scripts/launch/gke.py --name=big --image=IMAGE --claim=CLAIM \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \\
        --command='train.py --config=configs/vaswani_big.py --workdir=/runs/big' |
        kubectl apply -f -
"""

import json
import math
import re

from absl import flags

from transformer import cli
from transformer.errors import UserError

NAME = flags.DEFINE_string("name", None, "Of the JobSet.", required=True)
IMAGE = flags.DEFINE_string("image", None, "Of the container.", required=True)
CLAIM = flags.DEFINE_string("claim", None, "The PersistentVolumeClaim for /runs.", required=True)
ACCELERATOR = flags.DEFINE_string("accelerator", None, "GKE's name of the TPU.", required=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Of the slice, such as 4x4.", required=True)
HOSTS = flags.DEFINE_integer("hosts", None, "How many the slice has.", required=True, lower_bound=1)
CHIPS = flags.DEFINE_integer("chips", 4, "TPU chips of a host.", lower_bound=1)
RESTARTS = flags.DEFINE_integer("restarts", 10, "How often a failed slice is started anew.")
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)

MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {accelerator}
                cloud.google.com/gke-tpu-topology: {topology}
              containers:
                - name: program
                  image: {image}
                  command: {command}
                  resources:
                    requests:
                      google.com/tpu: {chips}
                    limits:
                      google.com/tpu: {chips}
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: {claim}
"""


def main() -> None:
    """Prints the manifest."""
    words = ["python", *cli.host_command(COMMAND.value), "--data_dir=/runs/data"]
    if not re.fullmatch(r"\d+(x\d+)+", TOPOLOGY.value):
        raise UserError(f"--topology={TOPOLOGY.value}: it is written like 4x4 or 2x2x4")
    chips = math.prod(map(int, TOPOLOGY.value.split("x")))
    if chips != HOSTS.value * CHIPS.value:
        raise UserError(
            f"--topology={TOPOLOGY.value} has {chips} chips, and --hosts={HOSTS.value} with "
            f"--chips={CHIPS.value} each have {HOSTS.value * CHIPS.value}; make them agree"
        )
    numbers = {"restarts": RESTARTS.value, "hosts": HOSTS.value, "chips": CHIPS.value}
    names = {
        "name": NAME.value,
        "image": IMAGE.value,
        "claim": CLAIM.value,
        "accelerator": ACCELERATOR.value,
        "topology": TOPOLOGY.value,
        "command": words,
    }
    # A word or a list of words in JSON is one in YAML too, whatever is in it.
    quoted = {name: json.dumps(value) for name, value in names.items()}
    print(MANIFEST.format(**numbers, **quoted), end="")


if __name__ == "__main__":
    cli.run(main)
