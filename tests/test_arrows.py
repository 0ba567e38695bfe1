"""Imports point one way: who may know whom, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHELVES = {"gapg_kernels": ROOT / "kernels", "gapg_rollout": ROOT / "rollout"}


def modules() -> dict[str, Path]:
    """Every module of the package by name, the symlinked folders included."""
    found = {}
    for path in _walk(ROOT / "gapg"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _walk(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            files += _walk(path)
        elif path.suffix == ".py":
            files.append(path)
    return files


def imports(name: str, path: Path, everything: set[str], *, typing: bool = False) -> set[str]:
    """What a module imports, lazily or not, and with `typing` under TYPE_CHECKING; ours by module, others by root."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in everything else node.module)
    return {n if n.split(".")[0] == "gapg" else n.split(".")[0] for n in found} - {name}


def reachable(start: str, known: dict[str, Path]) -> dict[str, str]:
    """Every module of ours that importing `start` can bring in, with the module that imports it."""
    came_from: dict[str, str] = {start: ""}
    queue = [start]
    while queue:
        name = queue.pop()
        if name in known:
            for other in imports(name, known[name], set(known)):
                if other not in came_from:
                    came_from[other] = name
                    queue.append(other)
    return came_from


def test_the_walk_sees_the_package() -> None:
    known = modules()
    assert {"gapg.train", "gapg_kernels.linear_logprob", "gapg_rollout.records", "gapg.tasks.base"} <= set(known)
    assert "gapg_rollout.records" in imports("gapg.judge", known["gapg.judge"], set(known))
    assert "gapg_kernels.linear_logprob" in reachable("gapg.train", known)


def test_kernels_and_rollout_know_nothing_of_the_rest() -> None:
    known = modules()
    for name, path in known.items():
        for shelf in SHELVES:
            if name.startswith(f"{shelf}."):
                ours = {n for n in imports(name, path, set(known), typing=True) if n.split(".")[0] == "gapg"}
                assert all(n.startswith(f"{shelf}.") for n in ours), f"{name} imports {sorted(ours)}"


def test_the_method_knows_no_use_no_study_no_integration() -> None:
    for start in ("gapg.train", "gapg.warm_start", "gapg.runs.run"):
        came_from = reachable(start, modules())
        for name in came_from:
            if name.startswith(("gapg.studies", "gapg.evaluation", "gapg.integrations", "gapg.commands.cli")):
                trail = [name]
                while came_from[trail[-1]]:
                    trail.append(came_from[trail[-1]])
                raise AssertionError(" <- ".join(trail))


def test_what_is_done_with_a_model_knows_no_study() -> None:
    known = modules()
    for name in known:
        if name.startswith("gapg.evaluation"):
            assert not any(n.startswith(("gapg.studies", "gapg.commands.cli")) for n in reachable(name, known)), name


def test_packing_knows_integers_only() -> None:
    known = modules()
    assert imports("gapg_packing.pack", known["gapg_packing.pack"], set(known)) <= {
        "numpy",
        "gapg_packing._csrc",
        "operator",
        "dataclasses",
    }
    for path in (ROOT / "csrc").iterdir():
        lines = path.read_text().splitlines() if path.suffix in (".h", ".cpp") else []
        assert not [line for line in lines if line.startswith("#include") and ("torch" in line or "ATen" in line)]


def test_nothing_of_the_package_imports_tests_or_benchmarks() -> None:
    known = modules()
    for name, path in known.items():
        assert not {"tests", "bench", "kernels", "rollout"} & imports(name, path, set(known), typing=True), name


def test_the_symlinked_folders_are_namespaces() -> None:
    """A top-level package called `kernels` would shadow Hugging Face's, wherever the root is on sys.path."""
    for shelf, folder in SHELVES.items():
        assert not (folder / "__init__.py").exists()
        link = ROOT / shelf.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == folder


def test_method_fits_on_a_page() -> None:
    """The whole method can be read in one sitting, in one file."""
    assert len((ROOT / "gapg" / "train.py").read_text().splitlines()) < 260
