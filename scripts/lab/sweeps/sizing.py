"""Models of equal size: the width at which one has as many parameters as another."""

from typing import Any

from lab.sweeps.sweep import Overrides
from transformer.config import RunConfig, load_config
from transformer.modules.model import Model

# Of the toy tasks; only the embeddings depend on it, and both models have them.
VOCABULARY = 32


def count(path: str, overrides: Overrides) -> int:
    """The parameters of a config file's model with some overrides."""
    config = load_config(path)
    config.update_from_flattened_dict(dict(overrides))
    return Model(RunConfig.from_config_dict(config).model, VOCABULARY).count_parameters()


def match_width(path: str, overrides: Overrides) -> dict[str, Any]:
    """`overrides` and the `model.d_model` that brings them nearest to the config file's own size.

    Widths are multiples of the heads, and even. The count grows with the width, so that a
    search by halves finds the nearest two; of these the one whose count is nearer is
    chosen. Say in the report which it was: `sizing.count` tells how near.
    """
    wanted, heads = count(path, {}), load_config(path).model.num_heads
    step = heads if heads % 2 == 0 else 2 * heads

    def parameters(steps: int) -> int:
        return count(path, {**overrides, "model.d_model": steps * step})

    low, high = 1, 2
    while parameters(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) < wanted else (low, middle)
    nearest = min((low, high), key=lambda steps: abs(parameters(steps) - wanted))
    return {**overrides, "model.d_model": nearest * step}
