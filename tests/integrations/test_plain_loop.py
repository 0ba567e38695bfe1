"""examples/plain_pytorch.py: what a stranger pastes runs, needs torch and gapg_kernels alone, and learns."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plain_pytorch.py"


def test_it_needs_torch_and_the_kernels_only() -> None:
    found = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            found.add(node.module.partition(".")[0])
    assert found == {"torch", "gapg_kernels"}


def test_it_learns_what_to_answer_and_when_to_call(tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXAMPLE], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = r"step +(\d+)  reward (\d\.\d\d)  calls: even (\d+)%, odd (\d+)%"
    steps = [[float(x) for x in match] for match in re.findall(line, done.stdout)]
    assert len(steps) == len(done.stdout.splitlines()) == 6
    (_, first, *_), (_, last, even, odd) = steps[0], steps[-1]
    assert first < 0.05  # it guesses among 64 tokens
    assert last > 0.55 and even < 15 and odd > 70  # calling always earns 0.30, the best policy 0.65
