"""pyproject.toml asks for what is imported, no more, and caps only what it has tested."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.conftest import ROOT
from tests.packaging.matrix import lower_bounds

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
OURS = {"gapg", "gapg_kernels", "gapg_packing", "gapg_rollout"}
SHOWN = {"pydantic_core": "pydantic"}
"""what is a part of another requirement"""
UNIMPORTED = {"tensorboard": "torch.utils.tensorboard asks for it"}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imported(*folders: str) -> set[str]:
    """The distributions that the modules below these folders import, lazily or not."""
    providers = packages_distributions()
    return {
        canonicalize_name(SHOWN.get(top, providers.get(top, [top])[0]))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for top in tops(ast.parse(path.read_text()))
        if top not in sys.stdlib_module_names and top not in OURS
    }


def tops(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_the_core_is_torch_triton_and_numpy_without_a_cap() -> None:
    assert names(CORE) == {"torch", "triton", "numpy"}
    assert all(spec.operator == ">=" for requirement in CORE for spec in requirement.specifier)
    assert imported("kernels", "csrc") <= names(CORE)


def test_the_trainer_imports_what_it_asks_for() -> None:
    asked = names(CORE) | names(EXTRAS["train"])
    optional = names([requirement for name in EXTRAS if name not in ("bench", "dev") for requirement in EXTRAS[name]])
    found = imported("gapg", "rollout", "kernels")
    assert found <= optional | asked, "imported, and in no extra"
    assert asked - found - set(UNIMPORTED) == set(), "asked for, and nowhere imported"


def test_no_extra_is_empty_and_the_trainers_caps_are_on_what_moves() -> None:
    assert all(EXTRAS.values())
    capped = {r.name for r in EXTRAS["train"] if any(spec.operator == "<" for spec in r.specifier)}
    assert capped == {"torch", "triton", "transformers"}


def test_the_pinned_environment_is_within_the_bounds() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in [*CORE, *EXTRAS["train"], *EXTRAS["dev"], *EXTRAS["lora"], *EXTRAS["liger"], *EXTRAS["bench"]]:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} and {version} in constraints.txt"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    pins = lower_bounds(PROJECT)
    assert len(pins) == len({re.split("==", pin)[0] for pin in pins})
    assert {"torch==2.11", "numpy==2.0", "transformers==5.16"} <= set(pins)
    asked = names([*CORE, *EXTRAS["train"]])
    assert {canonicalize_name(pin.partition("==")[0]) for pin in pins} == asked
