"""Machine code, made in a process of its own: `python -m tests.kernels.compiled_kernels FILE`.

FILE holds names of kernels (JSON); it comes to hold the figures of each, as `bench/compile_report.py` counts them.
"""

import json
import sys
from pathlib import Path

from compile_report import compile_figures, kernels


def main(path: Path) -> None:
    names = set(json.loads(path.read_text()))
    path.write_text(json.dumps({k.name: compile_figures(k) for k in kernels() if k.name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
