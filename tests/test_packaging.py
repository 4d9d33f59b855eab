"""What is installed: within bounds, and with hashes for who wants the very same again."""

import re
import tomllib
from collections import defaultdict

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def others(requirements):
    """Those that are not an extra of this package itself, and what such an extra holds."""
    for text in requirements:
        wanted = Requirement(text)
        if wanted.name != PROJECT["name"]:
            yield text
        for extra in wanted.extras if wanted.name == PROJECT["name"] else ():
            yield from others(EXTRAS[extra])


@pytest.mark.parametrize("name", ["", *EXTRAS])
def test_every_version_is_bounded_on_both_sides(name):
    for text in others(EXTRAS[name] if name else PROJECT["dependencies"]):
        operators = {each.operator for each in Requirement(text).specifier}
        assert operators == {">=", "<"}, text


def pinned():
    """Name → the requirements that constraints.txt has for it."""
    text = (ROOT / "constraints.txt").read_text()
    entries = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ").splitlines()
    found = defaultdict(list)
    for entry in entries:
        requirement, *hashes = entry.split("--hash=")
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes)
        pin = Requirement(requirement.strip())
        assert [each.operator for each in pin.specifier] == ["=="]
        found[canonicalize_name(pin.name)].append(pin)
    return found


def test_the_constraints_hold_each_dependency_with_hashes_and_no_address():
    pins = pinned()
    assert "://" not in (ROOT / "constraints.txt").read_text()
    for text in others((*PROJECT["dependencies"], *EXTRAS["test"])):
        wanted = Requirement(text)
        there = pins[canonicalize_name(wanted.name)]
        assert there, text
        for pin in there:
            (version,) = (each.version for each in pin.specifier)
            assert wanted.specifier.contains(version), pin


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_a_python_finds_one_version_of_each(python):
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    for name, pins in pinned().items():
        fitting = [pin for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
        assert len(fitting) <= 1, name
    assert sum(not pin.marker for each in pinned().values() for pin in each) > 30
