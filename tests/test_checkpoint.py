import itertools
import re
import resource
import shutil
from functools import cache, partial

import jax
import numpy as np
import pytest

from tests.helpers import data_config, refused, small_model
from tests.test_programs import TINY, finish, newest, start, wait_for
from tests.test_sharding import mesh_of
from tests.test_training import equal, small_config
from transformer.data.corpus import open_corpus
from transformer.training.checkpoint import MANIFEST, Checkpoints
from transformer.training.optimizer import OPTIMIZERS
from transformer.training.step import abstract_state

opened = partial(Checkpoints, best="sequence_accuracy")


@cache
def likeness(sizes=(1, 1, 1), name="adam", ema_decay=0.0, **changes):
    config = small_config(name=name, ema_decay=ema_decay)
    return abstract_state(small_model(**changes), config, mesh_of(*sizes))


def filled(like):
    """A state of which no two arrays are the same, nor two rows of one."""
    numbers = itertools.count(step=1000)

    def fill(leaf):
        rows = np.indices(leaf.shape)[0] if leaf.shape else np.array(0)
        return jax.device_put((rows + next(numbers)).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, like)


def metrics(accuracy, loss=1.0):
    return {"validation/sequence_accuracy": accuracy, "validation/loss": loss}


def at(state, step):
    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


def test_all_that_training_carries_comes_back_bit_for_bit_on_any_mesh(tmp_path):
    pairs = []
    for step, name in enumerate(OPTIMIZERS):
        saved, restored = ((1, 8, 1), (1, 1, 1)) if step % 2 else ((1, 1, 1), (2, 2, 2))
        how = {"name": name, "norm": "batch", "ema_decay": 0.9}
        state = at(filled(likeness(saved, **how)), step)
        pairs.append((likeness(restored, **how), state))
        assert len(jax.tree.leaves(state.opt_state)) >= len(state.params) == len(state.ema_params)
        assert state.batch_stats
    with opened(tmp_path, keep=len(pairs)) as checkpoints:
        for _, state in pairs:
            checkpoints.save(state, metrics(0.5))
    with opened(tmp_path, keep=len(pairs)) as checkpoints:
        for step, (like, state) in enumerate(pairs):
            back = checkpoints.restore(step, like)
            assert equal(back, state)
            assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, back, like))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run best at step 20, by accuracy and then by loss, of which two are kept."""
    directory, state = tmp_path_factory.mktemp("saved"), filled(likeness())
    results = {10: (0.5, 1.0), 20: (0.9, 0.1), 30: (0.9, 0.2), 40: (0.7, 0.3), 50: (0.6, 0.05)}
    with opened(directory, keep=2) as checkpoints:
        for step, (accuracy, loss) in results.items():
            checkpoints.save(at(state, step), metrics(accuracy, loss))
    return directory


def test_the_latest_and_the_best_are_kept_and_one_written_by_half_is_not_seen(saved, tmp_path):
    five = shutil.copytree(saved, tmp_path / "five")
    with opened(five, keep=2) as checkpoints:
        assert checkpoints.steps() == [20, 40, 50]
        found = [checkpoints.find(name) for name in ("latest", "best", "40")]
        assert found == [50, 20, 40]
        assert int(checkpoints.restore(20, likeness()).step) == 20
        refused("checkpoint=10: choose one of latest, best, 20, 40", checkpoints.find, "10")
        message = r"float32\[32, 16\] there and float32\[64, 16\] here"
        refused(message, checkpoints.restore, 50, likeness(d_ff=64))
    half = shutil.copytree(five / "50", five / "60.orbax-checkpoint-tmp")
    with opened(five, keep=None) as checkpoints:
        assert checkpoints.find("best") == 20
        checkpoints.restore(checkpoints.find("latest"), likeness())
    with opened(five, keep=None, best="loss") as checkpoints:
        assert checkpoints.find("best") == 50
    assert {path.name for path in five.iterdir()} == {"20", "40", "50", half.name}
    with opened(five, keep=2) as checkpoints:
        assert checkpoints.steps()[-1] == 50
    refused("has not saved anything yet", opened, five / "none", keep=None)
    with opened(five / "none", keep=1) as checkpoints:
        assert checkpoints.steps() == []
        refused("holds no finished checkpoint", checkpoints.find, "latest")


def test_damage_anywhere_is_named_with_the_checkpoint_before(saved, tmp_path, rng):
    five, like = shutil.copytree(saved, tmp_path / "five"), likeness()
    folder = five / "50"
    everything = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    needless = folder / "_CHECKPOINT_METADATA", *folder.rglob("commit_success.txt")
    files = [path for path in everything if path not in needless]
    each = -(-500 // sum(path.stat().st_size > 0 for path in files))  # places in a file
    with opened(five, keep=None) as checkpoints:
        for path in files:
            whole = path.read_bytes()
            places = rng.integers(len(whole), size=each) if whole else []
            cut_off = [whole[:k] for k in (-1, *places[::2])] if whole else []
            flips = (whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in places[1::2])
            for damage in (None, *cut_off, *flips):
                path.unlink() if damage is None else path.write_bytes(damage)
                said = refused("50 is damaged .* from step 40", checkpoints.restore, 50, like)
                assert str(path.relative_to(folder)) in said
            path.write_bytes(whole)
    for path in needless:
        path.write_bytes(b"damaged")
    with opened(five, keep=None) as checkpoints:
        assert int(checkpoints.restore(50, like).step) == 50
    for damage in (lambda path: path.write_text(""), type(folder).unlink):
        damage(folder / "metrics" / "metrics")
        refused(r"50 is damaged \(metrics/metrics", opened, five, keep=None)


def test_a_deletion_that_is_cut_off_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    like, state = likeness(), filled(likeness())
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed there
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 1), metrics(0.1))
        checkpoints.save(at(state, 2), metrics(0.2))
    assert {each.name for each in tmp_path.iterdir()} == {"2", "trash"}
    next(tmp_path.glob("trash/*/metrics/metrics")).unlink()  # deleted by half
    monkeypatch.undo()
    with opened(tmp_path, keep=1) as checkpoints:
        assert equal(checkpoints.restore(checkpoints.find("latest"), like), at(state, 2))
        checkpoints.save(at(state, 3), metrics(0.3))
    assert [each.name for each in tmp_path.iterdir()] == ["3"]


def test_training_sets_damaged_checkpoints_aside_until_the_newest_is_sound(saved, tmp_path, capsys):
    five = shutil.copytree(saved, tmp_path / "five")
    (five / "50" / "default" / MANIFEST).unlink()
    (five / "40" / "metrics" / "metrics").write_text("{")
    (five / "damaged" / "50").mkdir(parents=True)  # of an earlier time
    with opened(five, keep=2) as checkpoints:
        assert checkpoints.steps() == [20]
        assert int(checkpoints.restore(20, likeness()).step) == 20
    said = " ".join(capsys.readouterr().out.split())
    for step, what in ((50, f"default/{MANIFEST}"), (40, "metrics/metrics")):
        assert f"{five / str(step)} is damaged ({what}" in said
        assert (five / "damaged" / str(step) / "default").is_dir()


def test_a_checkpoint_between_two_validations_gives_way_to_the_next(tmp_path):
    state, interval = filled(likeness()), {"seconds": 1.5, "sums": {"loss": 0.1}}
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(at(state, step), metrics(1.0 / step))
        checkpoints.save(at(state, 33), {}, interval)
    with opened(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30, 33]
        assert checkpoints.find("best") == 10
        assert [checkpoints.interval(step) for step in (30, 33)] == [{}, interval]
        assert int(checkpoints.restore(33, likeness()).step) == 33
        checkpoints.save(at(state, 40), metrics(0.01))
    with opened(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [10, 30, 40]


@pytest.mark.slow
def test_a_disk_that_refuses_or_fills_up_in_the_middle_loses_nothing(tmp_path, data_dir):
    """No file of the process may grow any more: it ends, and goes on once there is room."""
    run, limit = tmp_path / "run", resource.RLIMIT_FSIZE
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={run}", "--config.steps=1000000")
    open_corpus(data_config(), data_dir)

    def has_no_room(process):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        (line,) = re.findall("^error: .*", errors, re.MULTILINE)
        assert re.search("could not be written.*free space, or choose another --workdir", line)

    process = start("train.py", *flags)
    resource.prlimit(process.pid, limit, (8192, resource.RLIM_INFINITY))
    has_no_room(process)
    process = start("train.py", *flags)
    wait_for(process, (run / "checkpoints" / "20").is_dir)
    resource.prlimit(process.pid, limit, (1024, resource.RLIM_INFINITY))
    has_no_room(process)
    saved = newest(run)
    out = finish(start("train.py", *flags, f"--config.steps={saved + 20}", "--allow_changes"))
    assert f"at step {saved:,} of" in out
