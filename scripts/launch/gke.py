"""Prints a JobSet manifest that runs a program on a TPU slice under GKE, for kubectl.

Each host of the slice runs one pod; GKE tells the pods about each other. The image holds the
repository and its environment (`pip install -e '.[tpu]'`). All pods must be able to write to the
volume claim, which is mounted at /runs and also holds the datasets (/runs/data). GKE restarts a
slice that fails, and the program resumes from its last checkpoint.

Usage:
    python scripts/launch/gke.py --name=big --image=IMAGE --claim=CLAIM \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \\
        --command='train.py --config=configs/vaswani_big.py --workdir=/runs/big' |
        kubectl apply -f -
"""

import json
import math
import re
from typing import Any

from absl import flags

from transformer import cli
from transformer.errors import UserError

flags.DEFINE_string("name", None, "Name of the JobSet.", required=True)
flags.DEFINE_string("image", None, "Container image.", required=True)
flags.DEFINE_string("claim", None, "PersistentVolumeClaim mounted at /runs.", required=True)
flags.DEFINE_string("accelerator", None, "TPU type, by GKE's name.", required=True)
flags.DEFINE_string("topology", None, "Topology of the slice, such as 4x4.", required=True)
flags.DEFINE_integer("hosts", None, "Hosts in the slice.", required=True, lower_bound=1)
flags.DEFINE_integer("chips", 4, "TPU chips per host.", lower_bound=1)
flags.DEFINE_integer("restarts", 10, "How many times GKE restarts a slice that fails.")
flags.DEFINE_string("command", None, "train.py or eval.py, with its flags.", required=True)

MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  failurePolicy: {{maxRestarts: {restarts}}}
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
                    requests: {{google.com/tpu: {chips}}}
                    limits: {{google.com/tpu: {chips}}}
                  volumeMounts:
                    - {{name: runs, mountPath: /runs}}
              volumes:
                - name: runs
                  persistentVolumeClaim: {{claimName: {claim}}}
"""
FIELDS = ("name", "restarts", "hosts", "accelerator", "topology", "image", "chips", "claim")


def main() -> None:
    """Prints the manifest."""
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in FIELDS}
    if not re.fullmatch(r"\d+(x\d+)+", given["topology"]):
        raise UserError(f"--topology={given['topology']}: write it like 4x4 or 2x2x4")
    chips = math.prod(map(int, given["topology"].split("x")))
    if chips != given["hosts"] * given["chips"]:
        raise UserError(
            f"--topology={given['topology']} has {chips} chips, but --hosts={given['hosts']} with "
            f"--chips={given['chips']} each have {given['hosts'] * given['chips']}; make them agree"
        )
    words = cli.host_command(flags.FLAGS.command)
    given["command"] = ["python", *words, "--data_dir=/runs/data"]
    # Strings, numbers and lists in JSON are also YAML.
    print(MANIFEST.format(**{name: json.dumps(value) for name, value in given.items()}), end="")


if __name__ == "__main__":
    cli.run(main)
