"""Run tests with the oldest and with the newest versions that pyproject.toml allows, each in a venv of its own.

    python tests/packaging/matrix.py tests/kernels tests/csrc

Ends with one line for each of the two, and exit code 1 unless the tests passed in both. Needs no package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXTRAS = "train,lora,liger,dev"


def lower_bounds(project: dict[str, Any]) -> list[str]:
    """`name==version` for the lower bound of each requirement of the core and of `train`."""
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = (re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in wanted)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def try_versions(name: str, pins: list[str], tests: list[str]) -> str:
    """Returns "passed", or what failed. The environment stays in .matrix/NAME, with a list of what it holds."""
    folder = ROOT / ".matrix" / name
    venv.create(folder, with_pip=True, clear=True)
    (folder / "pins.txt").write_text("\n".join(pins))
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(folder / "pins.txt"), "-e", f"{ROOT}[{EXTRAS}]"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if not line.startswith(("WARNING", "[notice]"))]
        return "\n  ".join(["could not be installed from the package index at hand:", *complaints[-12:]])
    with (folder / "installed.txt").open("w") as file:
        subprocess.run([python, "-m", "pip", "freeze"], stdout=file, check=True)
    options = ["-m", "not slow and not vllm and not gpu", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = subprocess.run([python, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment).returncode
    return "passed" if code == 0 else f"failed: pytest ended with {code}"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {"oldest": lower_bounds(project), "newest": []}
    results = {name: try_versions(name, pins[name], sys.argv[1:]) for name in pins}
    for name, result in results.items():
        print(f"{name}: {result}")
    sys.exit(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    main()
