"""The programs as a person runs them: each in a process of its own."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jaxtyping
import pytest

from tests.helpers import AS_USERS, program
from transformer import cli
from transformer.config import RunConfig
from transformer.run import Run
from transformer.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent

KNOBS = """
data.size=tiny model.d_model=16 model.num_heads=2 model.d_ff=32 model.dropout_rate=0.1
optimizer.warmup_steps=5 log_every=5 eval_every=20 save_every=20
"""
TINY = ("--config=configs/toy_reverse.py", *(f"--config.{knob}" for knob in KNOBS.split()))
PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

# eval.py, which fails if anything looks up a class for a pickle: a pickle may run code.
UNPICKLING_NOTHING = """
import runpy, sys

def hook(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickles {arguments}")

sys.addaudithook(hook)
sys.argv[0] = "eval.py"
runpy.run_path("eval.py", run_name="__main__")
"""


def start(*words, devices=1, **environment):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "COLUMNS": "100"} | environment
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, env=env, **PIPES)


def finish(process):
    """Standard output of a program that must succeed."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def complaint(*words, **environment):
    """The one line of a program that must refuse."""
    process = start(*words, **environment)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 2, out + errors
    assert re.fullmatch(r"\s*error: .*\s*", errors), errors
    return errors.strip()


def results(workdir):
    """`metrics.jsonl` without the speeds."""
    rows, speeds = read_metrics(Path(workdir) / "metrics.jsonl"), ("per_second", "mfu", "waits")
    return [{key: row[key] for key in row if not key.endswith(speeds)} for row in rows]


def bit_identical(one, other):
    """What `scripts/compare.py` says of two runs whose metrics and last arrays are the same."""
    assert (results(one), newest(one)) == (results(other), newest(other))
    out = finish(start("scripts/compare.py", f"--run={one}", f"--other={other}"))
    assert out.endswith("\nbit-identical\n")
    return out


def newest(workdir):
    return max(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def wait_for(process, happened):
    """Returns once `happened()` is true, within two minutes and while the program runs."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_after(process, workdir, step):
    """SIGKILL as soon as the checkpoint of `step` is there, in the middle of what follows."""
    wait_for(process, (workdir / "checkpoints" / str(step)).is_dir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_train_kill_resume_evaluate(tmp_path, data_dir):
    """A killed and resumed run is bit for bit the run that was left alone; on eight devices."""
    steps, mesh = 120, ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    flags = (*TINY, *mesh, f"--config.steps={steps}", f"--data_dir={data_dir}")
    killed = tmp_path / "killed"
    kill_after(start("train.py", *flags, f"--workdir={killed}", devices=8), killed, 40)
    assert max(row["step"] for row in results(killed)) < steps

    whole = start("train.py", *flags, f"--workdir={tmp_path / 'whole'}", devices=8)
    out = finish(start("train.py", *flags, f"--workdir={killed}", devices=8))
    assert f"after {steps:,} steps" in finish(whole)
    assert re.search(r"resuming +at step \d+ of", out)

    out = bit_identical(tmp_path / "whole", killed)
    for name in ("validation/sequence_accuracy", "params", "opt_state"):
        assert name in out

    words = (f"--workdir={killed}", f"--data_dir={data_dir}")
    out = finish(start("-c", UNPICKLING_NOTHING, *words, devices=8))
    assert "source length" in out
    record = json.loads((killed / "eval_test.json").read_text())
    assert record["step"] == steps
    assert sum(row["sequences"] for row in record["replicas"][0]["by_source_length"]) == 100


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(tmp_path, data_dir):
    """Begun on one device, ended on eight: the losses of a run on one device throughout."""
    flags = (*TINY, f"--data_dir={data_dir}", "--config.steps=40")
    whole = start("train.py", *flags, f"--workdir={tmp_path / 'whole'}")
    moved = tmp_path / "moved"
    kill_after(start("train.py", *flags, f"--workdir={moved}"), moved, 20)
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    out = finish(start("train.py", *flags, *mesh, f"--workdir={moved}", devices=8))
    assert "mesh data 4, fsdp 2" in out
    finish(whole)
    for row, moved_row in zip(results(tmp_path / "whole"), results(moved), strict=True):
        assert moved_row == pytest.approx(row, rel=1e-3)


@pytest.mark.slow
def test_the_smallest_real_training_run_reaches_its_accuracy(tmp_path, data_dir):
    """Strings of up to 5 letters, 800 steps: at least 95 in 100 unseen ones are reversed."""
    places = (f"--workdir={tmp_path}", f"--data_dir={data_dir}")
    flags = ("--config=configs/toy_reverse.py", "--config.data.size=tiny", "--config.steps=800")
    own = AS_USERS | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    out = finish(start("train.py", *flags, *places, **own))
    words = {"config", "data", "devices", "parameters", "workdir", "samples", "perplexity"}
    assert words <= set(out.split())
    assert re.search(r"step 100/800  loss .* steps/s .* target tokens/s .* s left", out)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["steps"] == 800
    assert {"jax", "flax", "python"} <= config["versions"].keys()
    assert list(tmp_path.glob("events.out.tfevents.*"))

    _, said = start("eval.py", *places, "--verbosity=1", **own).communicate(timeout=300)
    assert "programs: 2 from the compilation cache, 1 compiled" in said  # attention for the plots
    record = json.loads((tmp_path / "eval_test.json").read_text())
    assert record["replicas"][0]["metrics"]["test/sequence_accuracy"] >= 0.95
    assert [row["length"] for row in record["replicas"][0]["by_source_length"]] == [1, 2, 3, 4, 5]
    samples = (tmp_path / "samples_test.tsv").read_text().splitlines()
    heading, *rows = (line.split("\t") for line in samples)
    assert heading == ["source", "target", "output"]
    assert all(target == source[::-1] for source, target, _ in rows)
    assert sum(target == output for _, target, output in rows) >= 45
    for name in ("attention_test_0_cross", "accuracy_by_length_test", "learning_curve"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5_000

    flags = ("--split=test_longer", "--checkpoint=best")
    finish(start("eval.py", *places, *flags, **AS_USERS))
    longer = json.loads((tmp_path / "eval_test_longer_checkpoint=best.json").read_text())
    assert [row["length"] for row in longer["replicas"][0]["by_source_length"]] == [6, 7, 8]


def answer(words, data_dir):
    """The exit status of `train.py` in this process, 0 where it would compile, and its stderr."""

    def begin():  # what training does before it compiles, but for the run's folder
        run = Run(RunConfig.from_config_dict(script.CONFIG.value), data_dir=data_dir)
        run.check()
        with jax.set_mesh(run.mesh), jax.numpy_dtype_promotion("standard"):
            run.trace()

    said = io.StringIO()
    quiet = warnings.catch_warnings(action="ignore", category=DeprecationWarning)  # ml_collections'
    # The tests' own type checks would refuse ill-typed values first.
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["train.py", *words])  # where config flags look for overrides
        try:
            with quiet, program("train.py", *words) as script:
                cli.explained(begin)
        except SystemExit as end:
            return end.code, said.getvalue()
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)
    return 0, said.getvalue()


LEARNED = "--config.model.position_encoding=learned --config.model.max_length=4"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.modl.norm=rms", r"modl.norm: unknown option \(did you mean model.norm\?\)"),
        ("--config.steps=1e3", r"--config.steps=1e3: it takes a whole number"),
        ("--config.optimizer.learning_rate=fast", r"it takes a number"),
        ("--config.model.scan_layers=maybe", r"it takes true or false"),
        ("--config.model.d_k=x", r"--config.model.d_k=x: it takes a whole number"),
        ("--config.model=3", r"--config.model is a section"),
        ("--config.mesh.data=64", r"needs 64 devices and there are 8 \(cpu\); lower mesh.data"),
        ("--config=configs/toy_revers.py", r"toy_revers.py: there is no such file"),
        ("--workdr=runs/x", r"Unknown command line flag 'workdr'. Did you mean: workdir"),
        ("runs/x", r"'runs/x' is not a flag"),
        ("--config README.md", r"error: README.md: SyntaxError"),
        (LEARNED, "longest .* data.train: 6 tokens.*max_length=4; raise it, or choose sinusoidal"),
    ],
)
def test_what_a_person_gets_wrong_ends_in_one_line(flag, message, data_dir):
    words = ["--config=configs/toy_reverse.py", "--config.data.size=tiny", *flag.split()]
    status, said = answer(words, data_dir)
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


@pytest.mark.slow
def test_the_programs_themselves_say_no_more_than_a_line(tmp_path, data_dir):
    toy = ("train.py", "--config=configs/toy_reverse.py", f"--workdir={tmp_path}")
    tiny = ("train.py", *TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path}")
    for message, words, environment in (
        ("--config.model.nrm: unknown option", (*toy, "--config.model.nrm=rms"), {}),
        ("README.md/run.*Not a directory", (*tiny, "--workdir=README.md/run"), {}),
        ("cannot prepare toy_strings/.*--data_dir", (*toy, "--data_dir=README.md"), {}),
        ("--config is missing", ("train.py",), {}),
        ("no device for JAX_PLATFORMS=cuda", tiny, {"JAX_PLATFORMS": "cuda"}),
        ("holds no run", ("eval.py", f"--workdir={tmp_path / 'nothing'}"), {}),
        ("--workdir is missing; set --workdir=…: The run's folder", ("eval.py",), {}),
    ):
        assert re.search(message, complaint(*words, **environment))
    assert {"--workdir:", "--beam_size:"} <= set(finish(start("eval.py", "--help")).split())


@pytest.mark.slow
def test_eval_names_a_damaged_checkpoint_and_train_sets_it_aside(tmp_path, data_dir):
    workdir = tmp_path / "run"
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={workdir}")
    evaluate = ("eval.py", f"--workdir={workdir}", f"--data_dir={data_dir}")
    finish(start("train.py", *flags, "--config.steps=40"))
    (workdir / "checkpoints" / "40" / "default" / "manifest.ocdbt").unlink()
    line = complaint(*evaluate)
    assert "checkpoints/40 is damaged (default/manifest.ocdbt is missing)" in line
    assert "resume from step 20" in line
    out = " ".join(finish(start("train.py", *flags, "--config.steps=40")).split())
    assert "checkpoints/40 is damaged (default/manifest.ocdbt is missing): moved to" in out
    assert "at step 20 of 40" in out


# A program as it starts for a user without a home folder or an entry among the users.
HOMELESS = """
import os, pwd, runpy, sys

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
for name in ("HOME", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
STRICT |= {"JAX_TRANSFER_GUARD": "disallow", "JAX_ENABLE_X64": "1"}
ENVIRONMENTS = {
    "strict in ASCII": (("train.py",), STRICT | ASCII),
    "no jit and no home": (("-c", HOMELESS, "train.py"), {"JAX_DISABLE_JIT": "1"}),
}


@pytest.mark.slow
def test_no_environment_changes_a_run(tmp_path, data_dir):
    """Only a line says what was asked for and is not used; files are in UTF-8."""
    finish(start("train.py", *TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'plain'}"))
    for name, (words, environment) in ENVIRONMENTS.items():
        (place := tmp_path / name).mkdir()
        where = () if "no home" in name else (f"--data_dir={data_dir}",)
        environment = environment | {"TMPDIR": str(place)}
        finish(start(*words, *TINY, *where, f"--workdir={place / 'run'}", **environment))
        assert results(place / "run") == results(tmp_path / "plain")
        assert any(place.glob("home-*/tensorflow_datasets")) == ("no home" in name)
        with start("scripts/predict.py", f"--workdir={place / 'run'}", **environment) as process:
            out, errors = process.communicate("abc\n", timeout=100)
        assert (process.returncode, out.count("\n")) == (0, 1), errors
