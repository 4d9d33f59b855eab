"""Prints a JobSet manifest that runs a program on a TPU slice under GKE, for kubectl.

Each host of the slice runs one pod. The image holds the repository and its environment
(`pip install -e '.[tpu]'`). All pods must be able to write to the volume claim, which is mounted at
/runs and also holds the datasets. GKE restarts a slice that fails, and the program resumes.

    python scripts/launch/gke.py --name=big --image=IMAGE --claim=CLAIM \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \\
        --command='train.py --config=configs/vaswani_big.py --workdir=/runs/big' | kubectl apply -f-
"""

import json
import math
import re

from absl import flags

from transformer import cli
from transformer.errors import UserError

NAME = flags.DEFINE_string("name", None, "Name of the JobSet.", required=True)
IMAGE = flags.DEFINE_string("image", None, "Container image.", required=True)
CLAIM = flags.DEFINE_string("claim", None, "PersistentVolumeClaim for /runs.", required=True)
ACCELERATOR = flags.DEFINE_string("accelerator", None, "GKE's name of the TPU.", required=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Such as 4x4 or 2x2x4.", required=True)
HOSTS = flags.DEFINE_integer("hosts", None, "Hosts in the slice.", required=True, lower_bound=1)
CHIPS = flags.DEFINE_integer("chips", 4, "TPU chips per host.", lower_bound=1)
RESTARTS = flags.DEFINE_integer("restarts", 10, "How many times a failed slice is restarted.")
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)


def main() -> None:
    """Prints the manifest, as JSON, which is also YAML."""
    shape, hosts, chips = TOPOLOGY.value or "", HOSTS.value or 1, CHIPS.value
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={shape}: write it like 4x4 or 2x2x4")
    if (wanted := math.prod(map(int, shape.split("x")))) != hosts * chips:
        given = f"--hosts={hosts} with --chips={chips} each"
        raise UserError(f"--topology={shape} has {wanted} chips, but {given} have {hosts * chips}")
    tpu = {"google.com/tpu": chips}
    container = {
        "name": "program",
        "image": IMAGE.value,
        "command": ["python", *cli.host_command(COMMAND.value), "--data_dir=/runs/data"],
        "resources": {"requests": tpu, "limits": tpu},
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }
    gke = "cloud.google.com/gke-tpu-"
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {f"{gke}accelerator": ACCELERATOR.value, f"{gke}topology": shape},
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM.value}}],
    }
    job = {"parallelism": hosts, "completions": hosts, "completionMode": "Indexed"}
    template = {"spec": {**job, "backoffLimit": 0, "template": {"spec": pod}}}
    spec = {
        "failurePolicy": {"maxRestarts": RESTARTS.value},
        "replicatedJobs": [{"name": "slice", "replicas": 1, "template": template}],
    }
    manifest = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    manifest |= {"metadata": {"name": NAME.value}, "spec": spec}
    print(json.dumps(manifest, indent=2))


if __name__ == "__main__":
    cli.run(main)
