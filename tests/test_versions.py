"""Which versions of others are supported, and which ones the tests run with."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
    if not line.startswith("fastgpt2[")
]
# what is installed by name and never by CI: a rival of the benchmarks
NOT_TESTED = {"ctranslate2"}


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("required", REQUIRED, ids=lambda r: r.name)
def test_bounds_are_lower_ones_and_the_tested_version_is_within(required: Requirement) -> None:
    # an upper bound refuses a release that nobody has seen fail
    assert {part.operator for part in required.specifier} <= {">="}
    if canonicalize_name(required.name) not in NOT_TESTED:
        tested = pins()[canonicalize_name(required.name)]
        assert tested in required.specifier
        # a local version, such as +cpu, is one machine's
        assert tested.local is None


@pytest.mark.parametrize("required", REQUIRED, ids=lambda r: r.name)
def test_the_lowest_versions_are_the_bounds(required: Requirement) -> None:
    name = canonicalize_name(required.name)
    if name in NOT_TESTED:
        pytest.skip("installed by name, and never by CI")
    (bound,) = required.specifier
    lowest = pins("lowest.txt")[name]
    # another package may ask for more
    assert Version(bound.version) <= lowest <= pins()[name]
    if name in ("torch", "triton", "numpy", "tiktoken", "transformers"):
        assert lowest.release[:2] == Version(bound.version).release[:2]


def test_releases_of_today_are_accepted() -> None:
    accepted = {r.name: r.specifier for r in REQUIRED}
    for torch, triton in (("2.11.0", "3.6.0"), ("2.14.1", "3.8.0"), ("2.14.1", "3.9.0")):
        assert torch in accepted["torch"]
        assert triton in accepted["triton"]
    assert "0.12.9" not in accepted["tiktoken"]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_commands_install_the_tested_versions(file: str) -> None:
    # a command may go on in the next line
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "")
    # into an environment of the command's own
    found = re.findall(r"venv/bin/(?:python -m |uv )?pip install .*-e .*", text)
    assert found
    assert all("-c constraints.txt" in line for line in found)
