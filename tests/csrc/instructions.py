"""Instructions of the packer per length, counted by callgrind: unlike times, they repeat. Prints them as JSON.

    python tests/csrc/instructions.py > bench/results/packing/instructions.json

Needs g++ and valgrind.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-ffp-contract=off"]  # as setup.py builds the extension
CASES = ("plain", "cost", "8 ranks", "groups of 8")
COUNTS = (1_000, 10_000, 100_000)


def count(folder: Path) -> dict[str, object]:
    """Builds the driver in `folder` and counts every case."""
    driver = folder / "instructions"
    subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(driver)], check=True)
    rows = []
    for case in CASES:
        for n in COUNTS:
            command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=counted"]
            run = subprocess.run([*command, str(driver), case, str(n)], check=True, capture_output=True, text=True)
            found = re.search(r"Collected : (\d+)", run.stderr)
            if found is None:
                raise RuntimeError(f"callgrind said nothing of instructions:\n{run.stderr}")
            instructions = int(found[1])
            rows.append({"case": case, "n": n, "instructions": instructions, "per_length": round(instructions / n, 1)})
    return {"compiler": first_line("g++"), "flags": FLAGS, "valgrind": first_line("valgrind"), "rows": rows}


def first_line(program: str) -> str:
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        json.dump(count(Path(scratch)), sys.stdout, indent=1)
    print()
