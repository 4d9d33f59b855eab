"""Answers command lines as `train.py` would, up to where it compiles: what it says to each.

A process of its own, for absl's flags are the process's; many answers, for to start JAX takes
longer than any of them. It reads a JSON list of words a line and writes a JSON object with the
exit `status` (0: training would begin), what it `said` on standard error, and a `traceback`.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import jax
from absl import flags

import train
from transformer import cli
from transformer.config import RunConfig
from transformer.loop import make_programs


@contextlib.contextmanager
def opened(data_dir, devices):
    """What asks such a process: a function from words to its answer."""
    command = [sys.executable, "-m", "tests.front_door", str(data_dir)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    place = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=place, text=True, env=environment, **pipes) as process:

        def ask(words):
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def begin(data_dir):
    """What `train.run` does before it compiles, but for its folder."""
    cfg = RunConfig.resolve(train.CONFIG.value)
    prepared = train.prepare(cfg, data_dir)
    with jax.set_mesh(prepared.mesh):
        programs = make_programs(cfg, prepared.model, prepared.like)
        train.trace(programs, cfg, prepared, train.make_feed(cfg, prepared))


def answer(words, data_dir):
    """How `train.py` with these words would begin."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):  # of the command line before
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.argv = ["train.py", *words]  # where config flags look for overrides
    said = io.StringIO()
    status, trace = 0, None
    with contextlib.redirect_stderr(said):
        try:
            cli.explained(cli.parse, sys.argv)
            cli.explained(begin, data_dir)
        except SystemExit as end:
            status = end.code
        except BaseException:
            status, trace = 1, traceback.format_exc()
    return {"status": status, "said": said.getvalue(), "traceback": trace}


def main():
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    data_dir = sys.argv[1]
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), data_dir)), file=channel)


if __name__ == "__main__":
    main()
