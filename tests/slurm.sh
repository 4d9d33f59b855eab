#!/usr/bin/env bash
# Sets up SLURM with one node in a temporary folder. A job of two tasks is requeued during training;
# it must resume from its checkpoint and end with the metrics of an uninterrupted job.
#
# Usage, as root:  tests/slurm.sh [--install]
#   --install  installs Debian's slurm-wlm and munge first
# Exits with status 77 and a reason if it cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*"; exit 77; }

[ "$(id -u)" = 0 ] || skip "the daemons of SLURM are started as root"
if [ "${1:-}" = --install ]; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } \
    >/dev/null 2>&1 || skip "slurm-wlm and munge could not be installed"
fi
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || skip "$program is missing; --install installs it on Debian"
done

work=$(mktemp -d)
chmod 755 "$work"  # munge runs as its own user
export SLURM_CONF=$work/slurm.conf

finish() {
  scancel --user=root 2>/dev/null || true
  for daemon in slurmd slurmctld munged; do
    [ ! -s "$work/$daemon.pid" ] || kill "$(cat "$work/$daemon.pid")" 2>/dev/null || true
  done
  sleep 1
  rm -rf "$work"
}
trap finish EXIT

fail() {
  echo "failed: $*"
  tail -n 30 "$work"/*.out "$work"/logs/* "$work"/slurm*.log 2>/dev/null
  exit 1
}

# wait_for SECONDS WHAT COMMAND…: until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" 2>/dev/null; do
    [ $SECONDS -lt $end ] || fail "timed out waiting for $what"
    sleep 0.2
  done
}

install -d -o munge -g munge -m 755 "$work/munge"
head -c 1024 /dev/urandom >"$work/munge/key"
chown munge: "$work/munge/key"
chmod 400 "$work/munge/key"
runuser -u munge -- munged --key-file="$work/munge/key" --socket="$work/munge/socket" \
  --pid-file="$work/munge/munged.pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed"
ln -s munge/munged.pid "$work/munged.pid"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
mkdir "$work/state" "$work/spool"
cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
# A requeued job waits until the credential of its first start has run out.
AuthInfo=socket=$work/munge/socket,cred_expire=15
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
END
slurmctld
slurmd -N localhost
wait_for 30 "the node" sh -c 'sinfo --noheader --format=%t | grep -qx idle'
echo "a SLURM $(sinfo --version | cut -d" " -f2) of one node is up"

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 XDG_CACHE_HOME=$work/cache COLUMNS=100
flags=(--config=configs/toy_reverse.py --config.data.size=tiny --config.model.d_model=16
  --config.model.num_heads=2 --config.model.d_ff=32 --config.model.dropout_rate=0.1
  --config.optimizer.warmup_steps=5 --config.steps=200
  --config.log_every=20 --config.eval_every=20 --config.save_every=20 --config.decode_margin=2
  --data_dir="$work/data")

# submit NAME: trains in its own workdir by two tasks; prints the job's number.
submit() {
  sbatch --parsable --requeue --open-mode=append --job-name="$1" --output="$work/$1.out" \
    --ntasks=2 --cpus-per-task=1 \
    --wrap="srun $(command -v python) train.py ${flags[*]} --workdir=$work/$1"
}
ended() { ! squeue --noheader --job="$1" 2>/dev/null | grep -q .; }

whole=$(submit whole)
wait_for 300 "the uninterrupted job" ended "$whole"
grep -q "after 200 steps" "$work/whole.out" || fail "the uninterrupted job"
grep -q "2 × cpu" "$work/whole.out" || fail "its two tasks did not find each other"
echo "a job of two tasks has ended: $(grep "^step 200" "$work/whole.out" | tail -n 1)"

cut=$(submit cut)
wait_for 120 "its first checkpoint" test -d "$work/cut/checkpoints/20"
scontrol requeue "$cut"
echo "requeued after step $(tail -n 1 "$work/cut/metrics.jsonl" | grep -o '"step": [0-9]*' | cut -d" " -f2)"
wait_for 60 "the cut" sh -c "squeue --noheader --format=%t --job=$cut | grep -qv R"
wait_for 400 "the job that was requeued" ended "$cut"
grep -o "resuming  *at step.*" "$work/cut.out" || fail "it has not resumed"
grep -q "after 200 steps" "$work/cut.out" || fail "the job that was requeued"

python - "$work/whole" "$work/cut" <<'END' || fail "the metrics differ"
import json, sys
from pathlib import Path

whole, cut = (
    [
        {name: value for name, value in json.loads(line).items() if "per_second" not in name}
        for line in Path(workdir, "metrics.jsonl").read_text().splitlines()
    ]
    for workdir in sys.argv[1:]
)
worst = max(abs(a[name] - b[name]) for a, b in zip(whole, cut, strict=True) for name in a)
print(f"{len(whole)} lines of metrics, which differ by at most {worst:g}")
sys.exit(worst > 1e-5)
END

if python -c "import submitit" 2>/dev/null; then
  job=$(python scripts/launch/slurm.py --tasks_per_node=2 --logs="$work/logs" \
    --cluster_parameters=cpus_per_task=1,timeout_min=10 \
    --command="train.py ${flags[*]} --config.steps=20 --workdir=$work/started" |
    sed -n 's/^job *//p')
  wait_for 300 "the job of scripts/launch/slurm.py" ended "$job"
  grep -q "2 × cpu" "$work/logs/${job}_0_log.out" || fail "the job of scripts/launch/slurm.py"
  grep -q "after 20 steps" "$work/logs/${job}_0_log.out" || fail "the job of scripts/launch/slurm.py"
  echo "scripts/launch/slurm.py has started such a job"
else
  echo "scripts/launch/slurm.py is not tried: submitit is not installed"
fi
echo "passed"
