"""Imports point one way: who may know whom, read from the source of all packages."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"gapg": ".", "gapg_kernels": "kernels", "gapg_rollout": "rollout", "gapg_packing": "csrc"}
"""Each package, and the folder that it lies in."""
LEAVES = set(HOMES) - {"gapg"}

LIGHT = {
    "gapg",
    *("gapg.batches", "gapg.batches.batching", "gapg.batches.sharing", "gapg.budget", "gapg.data", "gapg.errors"),
    *("gapg.integrations", "gapg.integrations.verl"),
    *("gapg.files", "gapg.filtering", "gapg.jsonl", "gapg.judge", "gapg.optim", "gapg.reward", "gapg.seeding"),
    *("gapg.tasks", "gapg.tasks.arithmetic", "gapg.tasks.base", "gapg.tasks.demonstrations"),
    *("gapg_rollout", "gapg_rollout.records", "gapg_rollout.text"),
}
"""What of `gapg` and `gapg_rollout` a library may import with torch, triton and numpy alone."""


def modules() -> dict[str, Path]:
    """Every module by name."""
    found = {}
    for package, home in HOMES.items():
        for path in (ROOT / home / package).rglob("*.py"):
            parts = path.relative_to(ROOT / home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


KNOWN = modules()


@cache
def imports(name: str, *, loading: bool = False) -> frozenset[str]:
    """What a module imports: ours by module, others by package.

    loading: only what its import loads, and so nothing inside functions or under TYPE_CHECKING.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if loading and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative imports hide the arrows"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(one if one in KNOWN else str(node.module) for one in whole)
        for inner in ast.iter_child_nodes(node):
            visit(inner)

    visit(ast.parse(KNOWN[name].read_text()))
    return frozenset(n if n in KNOWN else n.split(".")[0] for n in found) - {name}


def reachable(start: str, *, loading: bool = False) -> dict[str, str]:
    """All that importing `start` can bring in, packages above included, with the module that imports it."""
    came_from, queue = {start: ""}, [start]
    while queue:
        name = queue.pop()
        above = name.rpartition(".")[0]
        for other in imports(name, loading=loading) | ({above} if above else set()):
            if other not in came_from:
                came_from[other] = name
                if other in KNOWN:
                    queue.append(other)
    return came_from


def test_the_walk_sees_the_packages() -> None:
    assert {"gapg.train", "gapg_kernels.linear_logprob", "gapg_rollout.records", "gapg_packing.pack"} <= KNOWN.keys()
    assert "gapg_rollout.records" in imports("gapg.judge")
    assert "gapg_kernels.linear_logprob" in reachable("gapg.train")
    assert "transformers" in reachable("gapg.train", loading=True)


@pytest.mark.parametrize("package", sorted(LEAVES))
def test_kernels_rollout_and_packing_know_nothing_of_each_other_or_the_trainer(package: str) -> None:
    others = {"gapg", "bench", "tests", *LEAVES} - {package}
    for name in KNOWN:
        if name.split(".")[0] == package:
            assert not others & {n.split(".")[0] for n in imports(name)}, name


def test_the_trainer_knows_no_bench_and_no_test() -> None:
    scripts = {path.stem for path in (ROOT / "bench").iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in KNOWN:
        assert not ({"tests", "bench"} | scripts) & imports(name), name


@pytest.mark.parametrize("start", ["gapg.train", "gapg.warm_start", "gapg.runs.run"])
def test_the_method_knows_nothing_of_what_uses_it(start: str) -> None:
    came_from = reachable(start)
    for name in came_from:
        if name.startswith(("gapg.evaluation", "gapg.commands", "gapg.serving", "gapg.integrations")):
            trail = [name]
            while came_from[trail[-1]]:
                trail.append(came_from[trail[-1]])
            raise AssertionError(" <- ".join(trail))


def test_a_model_knows_no_run_and_an_evaluation_no_command() -> None:
    for low, high in (
        ("gapg.model.", "gapg.runs"),
        ("gapg.model.", "gapg.build"),
        ("gapg.model.", "gapg.commands"),
        ("gapg.runs.", "gapg.commands"),
        ("gapg.evaluation.", "gapg.commands"),
    ):
        for name in KNOWN:
            if name.startswith(low):
                assert not [n for n in imports(name) if n.startswith(high)], name


def test_there_is_no_circle() -> None:
    """Imports inside functions and for types count too."""
    arrows = {name: {n for n in imports(name) if n in KNOWN} for name in KNOWN}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_what_is_light() -> None:
    """README promises these to libraries: no more than torch, triton and numpy is needed to import them."""
    allowed = {"torch", "triton", "numpy", *sys.stdlib_module_names, *KNOWN, "gapg_packing._csrc"}
    light = {name for name in KNOWN if not reachable(name, loading=True).keys() - allowed}
    assert {name for name in light if name.split(".")[0] in ("gapg_kernels", "gapg_packing")} == {
        name for name in KNOWN if name.split(".")[0] in ("gapg_kernels", "gapg_packing")
    }
    assert light >= LIGHT, LIGHT - light
    code = f"import importlib\nfor name in {sorted(LIGHT)}: importlib.import_module(name)\nimport sys\n"
    code += "print({n.split('.')[0] for n in sys.modules} & {'transformers', 'pydantic', 'rich', 'scipy', 'yaml'})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout == "set()\n"


def test_packing_knows_integers_only() -> None:
    for name in KNOWN:
        if name.startswith("gapg_packing"):
            assert imports(name) <= {"numpy", *sys.stdlib_module_names, *KNOWN}, name
    for path in (ROOT / "csrc").rglob("*"):
        lines = path.read_text().splitlines() if path.suffix in (".h", ".cpp") else []
        assert not [line for line in lines if line.startswith("#include") and ("torch" in line or "ATen" in line)]


def test_the_top_folders_are_no_packages() -> None:
    """A top-level package called `kernels` would shadow Hugging Face's, wherever the root is on sys.path."""
    for folder in ("kernels", "rollout", "csrc", "bench"):
        assert not (ROOT / folder / "__init__.py").exists()


def tracked() -> list[tuple[str, Path]]:
    """(mode, path) of all files in the repository."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    lines = [line.split(None, 3) for line in listed.stdout.splitlines()]
    return [(mode, ROOT / name) for mode, _, _, name in lines if (ROOT / name).exists()]


def test_no_symlink_no_long_file_and_no_surgery_on_the_path() -> None:
    for mode, path in tracked():
        assert mode != "120000", f"{path} is a link"
        if path.suffix == ".py":
            lines = path.read_text().splitlines()
            assert len(lines) <= 400, path
            assert not [
                n for n in lines if n.lstrip().startswith(("sys.path.", "sys.path[", "sys.path +=", "sys.path ="))
            ], path


def test_method_fits_on_a_page() -> None:
    """The whole method can be read in one sitting, in one file."""
    assert len((ROOT / "gapg" / "train.py").read_text().splitlines()) < 220
