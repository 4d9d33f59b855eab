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
