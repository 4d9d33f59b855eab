import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from tests import test_programs as programs

SCRIPT, NOTEBOOK = (programs.ROOT / f"notebooks/colab.{kind}" for kind in ("py", "ipynb"))
EXTRA = "needs pip install -e '.[notebook]'"


def test_the_notebook_is_what_its_script_says():
    jupytext = pytest.importorskip("jupytext", reason=EXTRA)
    script, notebook = jupytext.read(SCRIPT), jupytext.read(NOTEBOOK)
    remedy = "run jupytext --to ipynb --update notebooks/colab.py"
    kept, wanted = ([(x.cell_type, x.source) for x in each.cells] for each in (notebook, script))
    assert kept == wanted, remedy
    for name in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata[name] == script.metadata[name], remedy
    assert not any(each.get("outputs") for each in notebook.cells), "commit it without outputs"


def test_its_default_repository_is_that_of_the_project():
    project = tomllib.loads((programs.ROOT / "pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository", "")
    assert f'\nREPOSITORY = "{address}"  # @param {{type:"string"}}\n' in SCRIPT.read_text()


def start(cells):
    """Executes the first so many code cells in this process."""
    code = [x for x in json.loads(NOTEBOOK.read_text())["cells"] if x["cell_type"] == "code"]
    namespace = {}
    for cell in code[:cells]:
        exec("".join(cell["source"]), namespace)


def test_its_first_cells_find_all_in_order_or_say_what_is_not(monkeypatch, capsys):
    def stops(message, *changed, accelerator="cpu"):
        with monkeypatch.context() as patch:
            patch.setenv("ACCELERATOR", accelerator)
            patch.setattr(*changed or (jax, "__version__", jax.__version__))
            with pytest.raises(Exception, match=message) as stop:
                start(2)
            assert stop.value._render_traceback_() == [f"error: {stop.value}"]  # one sentence

    monkeypatch.setenv("ACCELERATOR", "cpu")
    start(2)
    assert f"jax {jax.__version__}" in capsys.readouterr().out
    stops("REPOSITORY is empty", importlib.util, "find_spec", lambda name: None)
    for other in ("tpu", "gpu"):
        stops(f"runs on cpu and not on {other}: .* or go on with", accelerator=other)
    stops(r"jax 0.7.2 is loaded, and .* Restart session", jax, "__version__", "0.7.2")
    loaded = ("numpy", "jax", "jaxlib", "flax")
    versions = {name: importlib.metadata.version(name) for name in loaded}
    old = lambda name: versions.get(name, "0.1.9")  # noqa: E731
    stops(r">=.* is needed and 0.1.9 is installed: .* delete", importlib.metadata, "version", old)


def test_a_platform_that_fails_to_start_is_named_too():
    """As JAX itself fails, in a process that has no backend yet."""
    code = "import tests.test_notebook as test; test.start(2)"
    tpu = {"ACCELERATOR": "tpu", "JAX_PLATFORMS": "tpu,cpu", "TPU_SKIP_MDS_QUERY": "1"}
    _, errors = programs.start("-c", code, **tpu, PYTHONPATH="scripts").communicate()
    assert "StopError: JAX finds no tpu (Unable to initialize backend 'tpu'" in errors


# What takes minutes in the notebook, and seconds here.
RUN = 'run = Run(RunConfig.from_config_dict(config), "runs/toy_reverse")'
SMALLER = {
    RUN: f'config.update_from_flattened_dict({{"data.size": "tiny", "steps": 800}})\n{RUN}',
    "config.eval_every = 300, 32, 100": "config.eval_every = 60, 32, 60",
    "config.replicas, config.steps, config.eval_every = 3, 600, 50": """
config.replicas, config.steps, config.eval_every, config.data.size = 2, 60, 20, "tiny"
""",
    "config.model.d_ff = 4, 32, 128": "config.model.d_ff = 1, 16, 32",
    '("layer", "rms", "none")': '("layer", "rms")',
    '["hello", "attention", "transformer"]': '["cab", "hello", "notes"]',
}


@pytest.fixture
def execute(tmp_path, data_dir, monkeypatch):
    """Runs the notebook, with `SMALLER`, in a folder of its own to its end or first error."""
    names = ("nbclient", "nbformat", "ipykernel")
    nbclient, nbformat, _ = (pytest.importorskip(name, reason=EXTRA) for name in names)
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    # `%tensorboard` looks for its program there; whoever calls pytest by its path lacks that.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # TensorBoard writes down there which process it is

    def run(accelerator):
        monkeypatch.setenv("ACCELERATOR", accelerator)
        text = NOTEBOOK.read_text()
        for old, new in SMALLER.items():
            old, new = (json.dumps(each)[1:-1] for each in (old, new))
            assert text.count(old) == 1
            text = text.replace(old, new)
        notebook = nbformat.reads(text, as_version=4)
        place = {"metadata": {"path": str(tmp_path)}}
        with contextlib.suppress(nbclient.exceptions.CellExecutionError):
            nbclient.NotebookClient(notebook, timeout=900, resources=place).execute()
        return notebook

    yield run
    for file in tmp_path.glob(".tensorboard-info/pid-*.info"):  # it outlives the kernel
        os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)


def outputs(notebook, kind):
    """What all cells put out of a kind: `text` that is printed, `image/png`, `traceback`."""
    every = [each for cell in notebook.cells for each in cell.get("outputs", ())]
    return [each[kind] for out in every for each in (out, out.get("data", {})) if kind in each]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(execute, tmp_path):
    notebook = execute("cpu")
    assert outputs(notebook, "traceback") == []
    (results,) = json.loads((tmp_path / "runs/toy_reverse/results.json").read_text())["replicas"]
    assert results["test/sequence_accuracy"] > 0.95
    said = "".join(outputs(notebook, "text"))
    assert "notes → seton" in said
    assert all(f"\nrun: norm={norm}\n" in said for norm in ("layer", "rms"))
    assert re.search(r"held_out: \d of 8 outputs are right\n    cat → .*\n(.*\n)+train: ", said)
    assert len(outputs(notebook, "image/png")) == 3
    assert "<iframe" in outputs(notebook, "text/html")[-1]  # TensorBoard


@pytest.mark.slow
def test_it_stops_with_one_sentence(execute):
    notebook = execute("tpu")
    ((line,),) = outputs(notebook, "traceback")
    assert line.startswith("error: JAX runs on cpu and not on tpu")
    assert max(cell.get("execution_count") or 0 for cell in notebook.cells) == 2
