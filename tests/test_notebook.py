"""The Colab notebook: its two files agree, it runs on this machine, and stops where it should."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from transformer.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT, NOTEBOOK = ROOT / "notebooks/colab.py", ROOT / "notebooks/colab.ipynb"
EXTRA = "needs pip install -e '.[notebook]'"


def test_the_notebook_is_what_its_script_says():
    jupytext = pytest.importorskip("jupytext", reason=EXTRA)
    script, notebook = jupytext.read(SCRIPT), jupytext.read(NOTEBOOK)
    remedy = f"run jupytext --to ipynb --update {SCRIPT.relative_to(ROOT)}"
    assert [(each.cell_type, each.source) for each in notebook.cells] == [
        (each.cell_type, each.source) for each in script.cells
    ], remedy
    for name in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata[name] == script.metadata[name], remedy
    assert not any(each.get("outputs") for each in notebook.cells), "commit it without outputs"


def start(cells):
    """Executes the first so many code cells in this process."""
    sources = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    namespace = {}
    for source in sources[:cells]:
        exec(source, namespace)


def test_its_first_cells_find_all_in_order(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATOR", "cpu")
    start(2)
    assert f"jax {jax.__version__}" in capsys.readouterr().out


def test_without_the_package_it_asks_for_an_address(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="REPOSITORY is empty"):
        start(1)


@pytest.mark.parametrize("accelerator", ["tpu", "gpu"])
def test_another_device_than_was_chosen_is_named(monkeypatch, accelerator):
    monkeypatch.setenv("ACCELERATOR", accelerator)
    with pytest.raises(UserError, match=f"runs on cpu and not on {accelerator}: .* or go on with"):
        start(2)


def test_a_platform_that_fails_to_start_is_named_too():
    """As JAX itself fails, in a process that has no backend yet."""
    program = "import tests.test_notebook as test; test.start(2)"
    environment = {"ACCELERATOR": "tpu", "JAX_PLATFORMS": "tpu,cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert "UserError: JAX finds no tpu (Unable to initialize backend 'tpu'" in done.stderr


def test_an_old_jax_that_is_still_loaded_asks_for_a_restart(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(UserError, match=r"jax 0.7.2 is loaded and .* Restart session"):
        start(2)


def test_an_old_package_asks_for_a_new_runtime(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.9" if name == "optax" else version(name)
    )
    with pytest.raises(UserError, match=r"optax.*>=.* is needed and 0.1.9 is installed: .* delete"):
        start(2)


# What takes minutes in the notebook, and seconds here.
SMALLER = {
    "state = train.run(toy_reverse.get_config(), workdir, data_dir=None)": """
config = toy_reverse.get_config()
config.update_from_flattened_dict({"data.size": "tiny", "steps": 800})
state = train.run(config, workdir, data_dir=None)
""",
    '"model.layers": 4, ': '"model.layers": 1, "steps": 60, "eval_every": 20, "save_every": 20, ',
    '["layer", "rms", "none"]': '["layer", "rms"]',
    '["hello", "attention", "transformer"]': '["cab", "hello", "notes"]',
}


@pytest.fixture
def execute(tmp_path, data_dir, monkeypatch):
    """Runs the notebook in a kernel and a folder of its own, to its end or its first error.

    As it is, but for `SMALLER`.
    """
    nbclient = pytest.importorskip("nbclient", reason=EXTRA)
    nbformat = pytest.importorskip("nbformat", reason=EXTRA)
    pytest.importorskip("ipykernel", reason=EXTRA)
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
        client = nbclient.NotebookClient(notebook, timeout=900, resources=place, allow_errors=False)
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            return notebook, error
        return notebook, None

    yield run
    for file in tmp_path.glob(".tensorboard-info/pid-*.info"):  # it outlives the kernel
        os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)


def outputs(notebook, kind):
    """What all cells put out of a kind: `text/plain`, `image/png` or printed text."""
    all_of_them = [each for cell in notebook.cells for each in cell.get("outputs", ())]
    if kind == "printed":
        return [each.text for each in all_of_them if each.output_type == "stream"]
    return [each.data[kind] for each in all_of_them if kind in each.get("data", {})]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(execute, tmp_path):
    notebook, error = execute("cpu")
    assert error is None, error
    (results,) = json.loads((tmp_path / "runs/toy_reverse/results.json").read_text())["replicas"]
    assert results["test/sequence_accuracy"] > 0.95
    assert "notes → seton" in "".join(outputs(notebook, "printed"))
    assert len(outputs(notebook, "image/png")) == 3
    (table,) = outputs(notebook, "text/markdown")
    for variant in ("layer", "rms"):
        assert f"\n| {variant} |" in table
    assert "<iframe" in outputs(notebook, "text/html")[-1]  # TensorBoard


@pytest.mark.slow
def test_it_stops_with_one_sentence(execute):
    notebook, error = execute("tpu")
    assert error is not None
    failed = [cell for cell in notebook.cells if cell.get("execution_count") == 2]
    assert [each.output_type for each in failed[0].outputs] == ["error"]
    (line,) = failed[0].outputs[0].traceback
    assert line.startswith("error: JAX runs on cpu and not on tpu")
    assert not any((cell.get("execution_count") or 0) > 2 for cell in notebook.cells)
