"""Eight simulated devices, strict promotion, and what many tests need."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """Where the toy datasets of this test process are prepared."""
    return str(tmp_path_factory.mktemp("datasets"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals the long tests out to the test processes, to begin with: nobody waits for a last one.

    pytest-xdist gives each process a run of neighbours, and lets those who are through take over.
    """
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    share = -(-len(fast) // processes)
    items[:] = [
        item
        for k in range(processes)
        for item in (*slow[k::processes], *fast[k * share : (k + 1) * share])
    ]
