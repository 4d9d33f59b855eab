import itertools
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.helpers import data_config, small_model
from tests.test_programs import ROOT, TINY, finish, start
from tests.test_sharding import mesh_of
from tests.test_training import equal, initial, small_recipe
from transformer import checkpoint
from transformer.checkpoint import MANIFEST, UNSEALED, Checkpoints, DamageError, verify
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.optimizer import OPTIMIZERS
from transformer.training import abstract_state

ONE, FSDP, MIXED = (1, 1, 1), (1, 8, 1), (2, 2, 2)


def make(sizes, **changes):
    """A state on a mesh, and its abstract twin."""
    model, recipe = small_model(**changes), small_recipe()
    like = abstract_state(model, recipe, mesh_of(*sizes))
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    state = jax.jit(initial(model, recipe), out_shardings=where)(np.uint32(3))
    return state, like


def filled(like):
    """A state of which no two arrays are the same, nor two rows of one."""
    numbers = itertools.count()

    def fill(leaf):
        rows = np.arange(leaf.shape[0] if leaf.shape else 1).reshape(-1, *(1,) * (leaf.ndim - 1))
        values = np.broadcast_to(rows + 1000 * next(numbers), leaf.shape or (1,))
        return jax.device_put(values.reshape(leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, like)


def metrics(accuracy, loss=1.0):
    return {"validation/sequence_accuracy": accuracy, "validation/loss": loss}


def at(state, step):
    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


@pytest.mark.parametrize(("saved", "restored"), [(ONE, ONE), (FSDP, ONE), (ONE, MIXED)])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(saved, restored, tmp_path):
    state, _ = make(saved)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 7), metrics(0.5))
    _, like = make(restored)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        back = checkpoints.restore(checkpoints.find("latest"), like)
    assert equal(back, at(state, 7))
    for array, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True):
        assert array.sharding == wanted.sharding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_that_training_carries_comes_back(name, tmp_path):
    """The moments of each optimizer, batch norm's statistics, the average of parameters."""
    recipe = small_recipe(name=name, ema_decay=0.9)
    like = abstract_state(small_model(norm="batch"), recipe, mesh_of(*FSDP))
    state = filled(like)
    assert len(state.average) == len(state.params)
    assert len(jax.tree.leaves(state.moments)) >= len(state.params)
    assert state.statistics
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert equal(checkpoints.restore(checkpoints.find("latest"), like), state)


@pytest.fixture
def five(tmp_path):
    """A run that was best at step 20, first by accuracy and then by loss; two are kept."""
    state, like = make(ONE)
    results = {10: (0.5, 1.0), 20: (0.9, 0.1), 30: (0.9, 0.2), 40: (0.7, 0.3), 50: (0.6, 0.05)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, (accuracy, loss) in results.items():
            checkpoints.save(at(state, step), metrics(accuracy, loss))
    return tmp_path, like


def test_the_latest_and_the_best_are_kept(five):
    directory, like = five
    with Checkpoints(directory, keep=2) as checkpoints:
        assert sorted(checkpoints.manager.all_steps()) == [20, 40, 50]
        assert checkpoints.latest() == checkpoints.find("latest") == 50
        assert checkpoints.find("best") == 20
        assert checkpoints.find("40") == 40
        assert int(checkpoints.restore(20, like).step) == 20
        with pytest.raises(UserError, match=r"checkpoint '10'.*holds 20, 40, 50"):
            checkpoints.find("10")


def test_reading_touches_nothing(five):
    directory, like = five
    half = directory / "60.orbax-checkpoint-tmp"
    shutil.copytree(directory / "50", half)
    with Checkpoints(directory, keep=None) as checkpoints:
        assert checkpoints.find("best") == 20
        checkpoints.restore(checkpoints.find("latest"), like)
    assert half.is_dir()
    assert {path.name for path in directory.iterdir()} == {"20", "40", "50", half.name}
    with pytest.raises(UserError, match="has not saved anything yet"):
        Checkpoints(directory / "none", keep=None)


def test_no_checkpoint_is_explained(tmp_path):
    with Checkpoints(tmp_path / "none", keep=1) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="holds no finished checkpoint"):
            checkpoints.find("latest")


def test_a_half_written_checkpoint_is_not_seen(five):
    directory, _ = five
    shutil.copytree(directory / "50", directory / "60.orbax-checkpoint-tmp")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest() == 50


def files_of(directory):
    return sorted(path for path in (directory / "50").rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["delete", "truncate", "flip a bit"])
def test_any_damage_to_any_file_is_named_with_the_checkpoint_before(five, how):
    directory, like = five
    with Checkpoints(directory, keep=None) as checkpoints:
        for path in files_of(directory):
            whole = path.read_bytes()
            name = str(path.relative_to(directory / "50"))
            if not whole or name in UNSEALED - {MANIFEST}:
                continue
            if how == "delete":
                path.unlink()
            elif how == "truncate":
                path.write_bytes(whole[:-1])
            else:
                middle = len(whole) // 2
                flipped = bytes([whole[middle] ^ 1])
                path.write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
            with pytest.raises(UserError, match=r"50 is damaged .*go on from step 40") as caught:
                checkpoints.restore(50, like)
            assert "\n" not in str(caught.value)
            assert name in str(caught.value)
            path.write_bytes(whole)
        assert int(checkpoints.restore(50, like).step) == 50


def fault_in(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        verify(folder)
    except DamageError as fault:
        return str(fault)
    return None


@pytest.mark.slow
def test_damage_in_500_random_places_is_found_each_time(five, rng):
    """One byte changed, or all from there on cut off, or the whole file gone."""
    folder = five[0] / "50"
    loose = {folder / name for name in UNSEALED - {MANIFEST}}
    files = [path for path in files_of(five[0]) if path not in loose]
    sizes = np.array([path.stat().st_size for path in files])
    sealed = verify(folder)
    assert sealed["files"].keys() == {str(p.relative_to(folder)) for p in files} - {MANIFEST}
    harmless = 0
    for place in rng.integers(sizes.sum(), size=500):
        k = int(np.searchsorted(sizes.cumsum(), place, side="right"))
        path, at_byte = files[k], int(place - sizes[:k].sum())
        whole = path.read_bytes()
        how = rng.choice(["change", "cut off", "delete"])
        if how == "change":
            other = bytes([whole[at_byte] ^ int(rng.integers(1, 256))])
            path.write_bytes(whole[:at_byte] + other + whole[at_byte + 1 :])
        elif how == "cut off":
            path.write_bytes(whole[:at_byte])
        else:
            path.unlink()
        fault = fault_in(folder)
        if fault is None:  # one space of the manifest for another
            assert path.name == MANIFEST
            assert verify(folder) == sealed
            harmless += 1
        else:
            assert str(path.relative_to(folder)) in fault
        path.write_bytes(whole)
    assert harmless < 10
    assert verify(folder) == sealed


def test_a_deletion_that_is_cut_off_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    """The old checkpoint is moved aside as a whole before anything of it is deleted."""
    state, like = make(ONE)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # killed there
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 1), metrics(0.1))
        checkpoints.save(at(state, 2), metrics(0.2))
    (moved,) = (tmp_path / "trash").iterdir()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["2", "trash"]
    (moved / "metrics" / "metrics").unlink()  # deleted by half
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert equal(checkpoints.restore(checkpoints.find("latest"), like), at(state, 2))
        checkpoints.save(at(state, 3), metrics(0.3))
    assert [each.name for each in tmp_path.iterdir()] == ["3"]


@pytest.mark.parametrize("how", ["delete", "empty"])
def test_damaged_metrics_are_named_by_who_only_reads(five, how):
    path = five[0] / "50" / "metrics" / "metrics"
    path.unlink() if how == "delete" else path.write_text("")
    with pytest.raises(UserError, match=r"50 is damaged \(metrics/metrics"):
        Checkpoints(five[0], keep=None)


def test_training_sets_damaged_checkpoints_aside_until_the_newest_is_sound(five, capsys):
    directory, like = five
    (directory / "50" / MANIFEST).unlink()
    (directory / "40" / "metrics" / "metrics").write_text("{")
    (directory / "damaged" / "50").mkdir(parents=True)  # of an earlier time
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest() == 20
        assert int(checkpoints.restore(20, like).step) == 20
    said = " ".join(capsys.readouterr().out.split())
    for step, what in ((50, MANIFEST), (40, "metrics/metrics")):
        assert f"{directory / str(step)} is damaged ({what}" in said
        assert (directory / "damaged" / str(step) / "default").is_dir()


def test_a_checkpoint_between_two_validations_gives_way_to_the_next(tmp_path):
    state, like = make(ONE)
    interval = {"seconds": 1.5, "sums": {"loss": 0.1}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(at(state, step), metrics(1.0 / step))
        checkpoints.save(at(state, 33), {}, interval)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 33
        assert sorted(checkpoints.manager.all_steps()) == [10, 20, 30, 33]
        assert checkpoints.find("best") == 10
        assert checkpoints.interval(33) == interval
        assert checkpoints.interval(30) == {}
        assert int(checkpoints.restore(33, like).step) == 33
        checkpoints.save(at(state, 40), metrics(0.01))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert sorted(checkpoints.manager.all_steps()) == [10, 30, 40]


@pytest.mark.slow
def test_a_disk_that_refuses_is_explained(tmp_path, data_dir):
    open_corpus(data_config(), data_dir)
    flags = " ".join((*TINY, "--config.steps=20", f"--data_dir={data_dir}"))
    run = f"ulimit -f 8; exec {sys.executable} train.py {flags} --workdir={tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "could not be written" in line
    assert "free space, or choose another --workdir" in line


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path, data_dir):
    """No file of the process may grow any more, once it has saved: it ends, and goes on later."""
    run = tmp_path / "run"
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={run}", "--config.steps=1000000")
    process = start("train.py", *flags)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "20").is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search("could not be written.*free space, or choose another --workdir", line)
    saved = max(
        int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit()
    )
    words = (*flags, f"--config.steps={saved + 20}", "--allow_changes")
    out = finish(start("train.py", *words))
    assert f"at step {saved:,} of" in out


@pytest.mark.parametrize("name", sorted(UNSEALED - {MANIFEST}))
def test_the_state_does_not_need_what_the_manifest_leaves_out(five, name):
    directory, like = five
    (directory / "50" / name).write_bytes(b"damaged")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert int(checkpoints.restore(50, like).step) == 50


def test_a_checkpoint_of_another_model_is_refused(five):
    directory, _ = five
    _, other = make(ONE, ff_width=64)
    message = r"another config: .* is float32\[32, 16\] there and float32\[64, 16\] here"
    with Checkpoints(directory, keep=2) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(50, other)
