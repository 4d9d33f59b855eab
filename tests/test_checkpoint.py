import itertools
import re
import resource
import shutil
import time
from functools import cache

import jax
import numpy as np
import pytest

from tests.helpers import data_config, small_model
from tests.test_programs import TINY, finish, start
from tests.test_sharding import mesh_of
from tests.test_training import equal, small_recipe
from transformer import checkpoint
from transformer.checkpoint import MANIFEST, UNSEALED, Checkpoints
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.optimizer import OPTIMIZERS
from transformer.training import abstract_state

ONE, FSDP, MIXED = (1, 1, 1), (1, 8, 1), (2, 2, 2)


@cache
def likeness(sizes, name="adam", norm="layer", ema_decay=0.0, **changes):
    """The abstract state of a small model on a mesh."""
    recipe = small_recipe(name=name, ema_decay=ema_decay)
    return abstract_state(small_model(norm=norm, **changes), recipe, mesh_of(*sizes))


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


@pytest.mark.parametrize(("saved", "restored"), [(FSDP, ONE), (ONE, MIXED)])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(saved, restored, tmp_path):
    state, like = at(filled(likeness(saved)), 7), likeness(restored)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        back = checkpoints.restore(checkpoints.find("latest"), like)
    assert equal(back, state)
    for array, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True):
        assert array.sharding == wanted.sharding


def test_all_that_training_carries_comes_back(tmp_path):
    """The moments of each optimizer, batch norm's statistics, the average of parameters."""
    likes = [likeness(ONE, name, norm="batch", ema_decay=0.9) for name in OPTIMIZERS]
    states = [at(filled(like), step) for step, like in enumerate(likes)]
    with Checkpoints(tmp_path, keep=len(states)) as checkpoints:
        for state in states:
            assert len(state.average) == len(state.params)
            assert len(jax.tree.leaves(state.moments)) >= len(state.params)
            assert state.statistics
            checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path, keep=len(states)) as checkpoints:
        for step, (like, state) in enumerate(zip(likes, states, strict=True)):
            assert equal(checkpoints.restore(step, like), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that was best at step 20, first by accuracy and then by loss; two are kept."""
    directory, state = tmp_path_factory.mktemp("saved"), filled(likeness(ONE))
    results = {10: (0.5, 1.0), 20: (0.9, 0.1), 30: (0.9, 0.2), 40: (0.7, 0.3), 50: (0.6, 0.05)}
    with Checkpoints(directory, keep=2) as checkpoints:
        for step, (accuracy, loss) in results.items():
            checkpoints.save(at(state, step), metrics(accuracy, loss))
    return directory


@pytest.fixture
def five(saved, tmp_path):
    """A copy of `saved`, and the abstract state of its run."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path, likeness(ONE)


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


def test_a_half_written_checkpoint_is_not_seen_and_reading_touches_nothing(five):
    directory, like = five
    half = directory / "60.orbax-checkpoint-tmp"
    shutil.copytree(directory / "50", half)
    with Checkpoints(directory, keep=None) as checkpoints:
        assert checkpoints.find("best") == 20
        checkpoints.restore(checkpoints.find("latest"), like)
    assert half.is_dir()
    assert {path.name for path in directory.iterdir()} == {"20", "40", "50", half.name}
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest() == 50
    with pytest.raises(UserError, match="has not saved anything yet"):
        Checkpoints(directory / "none", keep=None)
    with Checkpoints(directory / "none", keep=1) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="holds no finished checkpoint"):
            checkpoints.find("latest")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_damage_to_any_file_or_in_500_random_places_is_named_with_the_one_before(five, rng):
    """Each file gone, or cut off or with a bit flipped at random places."""
    directory, like = five
    folder = directory / "50"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    files = {name: files[name] for name in sorted(files.keys() - UNSEALED | {MANIFEST})}
    contents = {name: path.read_bytes() for name, path in files.items()}
    each = -(-500 // sum(map(bool, contents.values())))  # places in a file
    with Checkpoints(directory, keep=None) as checkpoints:
        for name, path in files.items():
            whole = contents[name]
            places = rng.integers(len(whole), size=each) if whole else []
            cut_off = [whole[:place] for place in (-1, *places[::2])] if whole else []
            for damage in (None, *cut_off, *(flipped(whole, place) for place in places[1::2])):
                path.unlink() if damage is None else path.write_bytes(damage)
                with pytest.raises(UserError, match=r"50 is damaged .*go on from step 40") as found:
                    checkpoints.restore(50, like)
                assert "\n" not in str(found.value)
                assert name in str(found.value)
            path.write_bytes(whole)
        assert int(checkpoints.restore(50, like).step) == 50


def test_a_deletion_that_is_cut_off_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    """The old checkpoint is moved aside as a whole before anything of it is deleted."""
    like = likeness(ONE)
    state = filled(like)
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


def test_damaged_metrics_are_named_by_who_only_reads(five):
    path = five[0] / "50" / "metrics" / "metrics"
    for damage in (lambda: path.write_text(""), path.unlink):
        damage()
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
    like = likeness(ONE)
    state = filled(like)
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
def test_a_disk_that_refuses_or_fills_up_in_the_middle_loses_nothing(tmp_path, data_dir):
    """No file of the process may grow any more: it ends, and goes on once there is room."""
    run = tmp_path / "run"
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={run}", "--config.steps=1000000")
    open_corpus(data_config(), data_dir)

    def refused(process):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
        assert re.search("could not be written.*free space, or choose another --workdir", line)

    process = start("train.py", *flags)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    refused(process)
    process = start("train.py", *flags)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "20").is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    refused(process)
    saved = max(
        int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit()
    )
    words = (*flags, f"--config.steps={saved + 20}", "--allow_changes")
    out = finish(start("train.py", *words))
    assert f"at step {saved:,} of" in out


def test_the_state_does_not_need_what_the_manifest_leaves_out(five):
    directory, like = five
    for name in UNSEALED - {MANIFEST}:
        (directory / "50" / name).write_bytes(b"damaged")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert int(checkpoints.restore(50, like).step) == 50


def test_a_checkpoint_of_another_model_is_refused(five):
    directory, _ = five
    other = likeness(ONE, ff_width=64)
    message = r"another config: .* is float32\[32, 16\] there and float32\[64, 16\] here"
    with Checkpoints(directory, keep=2) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(50, other)
