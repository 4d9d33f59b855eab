import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from lab.claims import modules

from tests.helpers import program, random_params, small_model
from transformer import cli
from transformer.config import RunConfig, default_config

SCRIPTS = sorted(path for path in Path("scripts").rglob("*.py") if "lab" not in path.parts)


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_script_names_itself_in_its_docstring(path):
    assert f"python {path}" in path.read_text().split('"""')[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_script_finds_what_it_imports(path):
    """Started as a user does: the tests' own path has scripts/ in it."""
    if "flags.DEFINE" in path.read_text():
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
        assert "Error" not in done.stderr, done.stderr


DEVICES = [(4, {}), (3, {"batch_size": 33}), (1, {"batch_size": 7}), (1, {"model.d_model": 512})]
DEVICES += [(2, {"batch_size": 16, "accumulation_steps": 8})]
DEVICES += [(n, {"batch_size": 16, "data.pack_length": 64 * n}) for n in (1, 2, 4)]
DEVICES += [(3, {"replicas": 3, "model.d_model": 512})]


@pytest.mark.parametrize(("devices", "changes"), DEVICES)
def test_each_core_is_a_device_where_that_is_faster(devices, changes, monkeypatch):
    asked, config = {}, default_config()
    monkeypatch.setattr(cli, "cpu_cores", lambda: 4)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    config.update_from_flattened_dict(changes)
    for name, value, expected in (
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=false", devices),  # not about devices
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=2", None),
        ("JAX_NUM_CPU_DEVICES", "2", None),
        ("OTHER", "", devices),
    ):
        asked.clear()
        with monkeypatch.context() as chosen:
            chosen.setenv(name, value)
            cli.set_up_jax(RunConfig.from_config_dict(config))
        assert asked.get("jax_num_cpu_devices") == expected


def test_a_wrong_backend_is_shown(monkeypatch, capsys):
    with program("scripts/check_attention.py", "--backends=xla", "--length=16") as script:
        causal = script.masks(16)["causal"]
        assert max(script.errors("xla", "float32", 2, causal)[0]) < 1e-5
        with jax.numpy_dtype_promotion("standard"):  # jax.nn's own attention relies on it
            assert 1e-3 < max(script.errors("xla", "bfloat16", 2, causal)[0]) < 3e-2
        for error, status in ((1e-4, 0), (float("nan"), 1)):
            monkeypatch.setattr(script, "errors", lambda *_, error=error: ([error], 1.0))
            with pytest.raises(SystemExit) as end:
                script.main()
            assert end.value.code == status
            assert capsys.readouterr().out.count("WRONG") == 12 * status


@pytest.mark.slow
def test_the_measurement_of_a_gpu_runs_on_a_cpu():
    command = ["bash", "scripts/measure_gpu.sh", "--device=cpu", "--parts=attention"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert re.search(r"chunked .* \d+\.\d+ \W+ ok", done.stdout)
    assert "ended with" not in done.stdout
    refused = subprocess.run([*command, "--sizes"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_silenced_head_is_the_one_that_is_meant():
    variables = random_params(small_model(num_layers=2), 0)
    for kind, where in zip(modules.KINDS, ("encoder", "decoder", "decoder"), strict=True):
        which = "cross" if kind == "cross" else "self"
        silent = modules.without_head(variables, kind, 1)
        changed = {name for name in variables if not (silent[name] == variables[name]).all()}
        assert changed == {f"{where}/layers/{i}/{which}_attention/out/kernel" for i in range(2)}
        assert all((silent[name][0] == variables[name][0]).all() for name in changed)
        assert not any(silent[name][1].any() for name in changed)


@pytest.fixture
def comparison():
    with program("scripts/compare.py", "--run=one", "--other=two") as module:
        yield module


def compared(loss, kernel):
    params = {".params['kernel']": np.array(kernel, np.float32)}
    return {"train/loss": {"step 10": loss, "step 20": 1.0}, "params at step 20": params}


def test_a_difference_of_two_runs_is_measured_and_found(comparison):
    same = comparison.compare(compared(2.0, [1, 2]), compared(2.0, [1, 2]))
    assert same == [("train/loss", 2, 0, 0, 0.0, ""), ("params at step 20", 1, 0, 0, 0.0, "")]
    loss, params = comparison.compare(compared(2.0, [3, 4]), compared(2.2, [3, 4.5]))
    assert loss == ("train/loss", 2, 0, 1, pytest.approx(0.1), "step 10")
    apart = pytest.approx(0.5 / np.sqrt(12.5))
    assert params == ("params at step 20", 1, 0, 1, apart, ".params['kernel']")


def test_a_missing_value_the_last_bit_and_one_nan_are_differences(comparison):
    def agreement(one, other):
        return comparison.compare({"loss": one}, {"loss": other})[0]

    assert agreement({"a": 1.0, "b": 1.0}, {"a": 1.0})[1:4] == (1, 1, 0)
    assert comparison.compare({}, {"loss": {"a": 1.0}})[0][1:4] == (0, 1, 0)
    bit, nan = np.nextafter(np.float32(1), np.float32(2)), float("nan")
    for ours, theirs, unequal in ((np.float32(1), bit, 1), (0.0, -0.0, 1), (nan, nan, 0)):
        assert agreement({"a": ours}, {"a": theirs})[1:4] == (1, 0, unequal)
    *_, largest, where = agreement({"a": 1.0, "b": 1.0}, {"a": nan, "b": 3.0})
    assert (np.isnan(largest), where) == (True, "a")
    for one, other, apart in ((0.0, 0.0, 0.0), (0.0, 1.0, np.inf), (2.0, 1.0, 0.5)):
        assert comparison.distance(np.array([one]), np.array([other])) == apart
