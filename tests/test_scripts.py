import runpy
from pathlib import Path

import pytest

from tests.test_programs import finish, start

SCRIPTS = sorted(Path("scripts").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_itself_in_its_docstring(path):
    assert f"python {path}" in path.read_text().split('"""')[1]


@pytest.mark.slow
def test_parameter_counts_are_printed_beside_the_papers():
    out = finish(start("scripts/parameters.py"))
    assert out.count("63,045,632") == 2
    assert out.count("214,171,648") == 2
    assert "-2.0M" in out
    assert "+1.2M" in out


def test_the_formula_knows_every_size():
    """Against the count by shapes, at sizes where no two terms are alike."""
    from configs import vaswani_base
    from transformer.model import Model, ModelConfig

    formula = runpy.run_path("scripts/parameters.py")["formula"]
    config = vaswani_base.get_config().model
    config.update({"layers": 3, "width": 24, "heads": 4, "ff_width": 50})
    config = ModelConfig(**config)
    assert formula(config, 101) == Model(config, 101).count_parameters()
