"""What is installed: within bounds, and with hashes for who wants the very same again."""

import re
import tomllib
from collections import defaultdict

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def others(requirements):
    """Those that are not an extra of this package itself, and what such an extra holds."""
    for wanted in map(Requirement, requirements):
        if wanted.name != PROJECT["name"]:
            yield wanted
        for extra in wanted.extras if wanted.name == PROJECT["name"] else ():
            yield from others(EXTRAS[extra])


def test_every_version_is_bounded_on_both_sides():
    for requirements in (PROJECT["dependencies"], *EXTRAS.values()):
        for wanted in others(requirements):
            assert {each.operator for each in wanted.specifier} == {">=", "<"}, wanted


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
    for wanted in others((*PROJECT["dependencies"], *EXTRAS["test"])):
        there = pins[canonicalize_name(wanted.name)]
        assert there, wanted
        for pin in there:
            (version,) = (each.version for each in pin.specifier)
            assert wanted.specifier.contains(version), pin


def test_a_python_finds_one_version_of_each():
    linux = {"sys_platform": "linux", "platform_system": "Linux"}
    for python in ("3.11", "3.12", "3.13", "3.14"):
        version = {"python_version": python, "python_full_version": f"{python}.0"}
        environment = default_environment() | linux | version
        for name, pins in pinned().items():
            fitting = [pin for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
            assert len(fitting) <= 1, (name, python)
    assert sum(not pin.marker for each in pinned().values() for pin in each) > 30
