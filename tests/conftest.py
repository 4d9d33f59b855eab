"""Eight simulated devices, strict promotion, and what many tests need."""

import gc
import itertools
import os
import tempfile
from collections.abc import Iterator

gc.disable()  # until the tests are collected: imports leave no garbage
os.environ["JAX_PLATFORMS"] = "cpu"

# A test compiles much and computes little. The programs that it starts inherit this, but for those
# that are given `helpers.AS_USERS`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# Programs that tests start share what they compile. Not this process: programs for several CPU
# devices that were read from a cache have deadlocked (jaxlib 0.10.2).
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    # XLA's older code generators, which it has lost since, compile in a third of the time.
    emitters = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{emitters} --xla_cpu_parallel_codegen_split_count=1"

jax.config.update("jax_enable_compilation_cache", False)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled() -> Iterator[None]:
    """Or each test process would keep the programs of all files in memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """Where the toy datasets of this test process are prepared."""
    return str(tmp_path_factory.mktemp("datasets"))


def pytest_collection_finish() -> None:
    gc.freeze()  # no collection looks through what was imported
    gc.set_threshold(50_000)  # tracing makes many objects, and few cycles
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals out the long tests first; pytest-xdist gives each process a run of neighbours."""
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if item not in slow]
    share = -(-len(fast) // processes)
    dealt = [slow[k::processes] + fast[k * share : (k + 1) * share] for k in range(processes)]
    items[:] = itertools.chain(*dealt)
