"""The sweep of the GEMM's tiles, as a script; without a GPU it takes Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import record
from roofline_designs import HEADS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a card takes another record, see tests/gpu")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(record.ROOT / "bench"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def sweep(folder: Path, *shapes: str) -> subprocess.CompletedProcess[str]:
    options = [option for shape in shapes for option in ("--shape", shape)]
    return python(str(record.ROOT / "bench/tiles.py"), *options, "--rounds", "2", "--output", str(folder))


def test_every_tile_is_timed_beside_a_bare_product_and_held_to_float64(tmp_path: Path) -> None:
    done = sweep(tmp_path, "32,16,130", "16,32,1", "16,16,60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = record.read(tmp_path / "tiles-cpu.json")
    assert found["bench"] == "tiles" and found["machine"]["device"] == "cpu"
    shapes = ("(32, 16, 130)", "(16, 32, 1)", "(16, 16, 60)")
    cases = [
        f"{shape} {kind}, cpu (Triton's interpreter)"
        for shape in shapes
        for kind in ("forward only", "forward, E stored")
    ]
    rows = {(row["case"], row["impl"], row["metric"]): row for row in found["rows"]}
    tiles = ("wide", "narrow", "pair")
    assert rows.keys() == {
        *((case, impl, "time") for case in cases for impl in ("torch.mm", *tiles)),
        *((case, tile, "logprob_error") for case in cases for tile in tiles),
        *((case, tile, "e_error") for case in cases if "stored" in case for tile in tiles),
    }
    predictions = {head.name for head in HEADS}
    for (case, impl, metric), row in rows.items():
        assert len(row["samples"]) == (2 if metric == "time" else 1)
        if metric == "time":
            assert row["floor_share"] * row["median"] == pytest.approx(rows[case, "torch.mm", "time"]["median"])
            tokens, width, vocab = map(int, row["shape"].strip("()").split(","))
            assert row["rows"] == tokens
            predicted = "stored" not in case and impl != "narrow"
            assert row["predicted_as"] in predictions if predicted else row["predicted_as"] is None
            assert predicted is False or ("pair" in row["predicted_as"]) == (impl == "pair")
            assert row["tflops"] * 1e12 * row["median"] == pytest.approx(2 * tokens * width * vocab)
        else:
            assert row["unit"] == ("nats" if metric == "logprob_error" else "relative") and row["median"] < 2e-6, impl
    assert all(case in done.stdout for case in cases)
    assert done.stdout.count(" wins; narrow is what a call takes") == len(cases)


REFUSED = """
import sys
import tiles
for shape in ("150,80,600", "160,72,600"):
    sys.argv = ["tiles.py", "--shape", shape, "--output", sys.argv[-1]]
    try:
        tiles.main()
    except SystemExit as stop:
        print(stop.code)
"""


def test_a_shape_that_does_not_fit_is_refused_in_a_line(tmp_path: Path) -> None:
    done = python("-c", REFUSED, str(tmp_path))
    assert not list(tmp_path.iterdir()) and done.stdout.split() == ["2", "2"]
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "T must be a multiple of 16" in said[0] and "an H that is a multiple of 16" in said[1] and len(said) == 2


PROBLEM = """
import functools, json, sys, warnings
import torch
import problems
import tiles
from roofline_designs import Shape
from gapg_kernels.odds_gemm import fused_odds

warnings.simplefilter("ignore")
shape = Shape(272, 16, 40)  # of the rows E is compared at 256
problem = problems.make(*shape, dtype=torch.float32, device="cpu", nats=None)
want = problems.truth(problem, problem.coefficient()).logprob
chunk = tiles.Chunk.of(shape, problem, store=True)
found = {}
"""


FAULTS = """
odds = fused_odds(chunk.hidden, chunk.weight, None, chunk.target, 1.0, chunk.e)
seen, right = functools.partial(tiles.errors, chunk, want, odds), chunk.e.clone()
found["right"] = seen()["e_error"]
chunk.e[:, [3, 30]] = chunk.e[:, [30, 3]]
found["two columns exchanged"] = seen()["e_error"]
found["rows"] = []
for row in range(272):
    chunk.e.copy_(right)
    chunk.e[row, 7] += chunk.e[row].sum() / 100
    found["rows"].append(seen()["e_error"])

calls = [None, None]  # the third raises
runs = {"torch.mm": lambda: None, "wide": calls.pop, "pair": lambda: None}
found["one"] = tiles.timings(chunk, runs, 3)
found["all"] = tiles.timings(chunk, dict.fromkeys(["torch.mm", "wide"], lambda: 1 / 0), 3)
found["winner"] = [tiles.winner(40, found[name]) for name in ("one", "all")]

def named(checked):
    runs, rows = checked
    return list(runs), rows

wrong = want.clone()
wrong[70] += 1e-4
found["a log-prob"] = named(tiles.check(chunk, wrong))

def forgetful(*arguments, tile):
    *arguments, e = arguments
    return fused_odds(*arguments, None if tile == tiles.HERE["pair"] else e, tile=tile)

tiles.fused_odds = forgetful  # the others have left in E what the pair tile does not write
found["no E"] = named(tiles.check(chunk, want))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a program finds out about the problem, in which one thing after another is wrong."""
    done = python("-c", PROBLEM + FAULTS)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_tile_that_is_wrong_is_an_error_row_and_is_not_timed(found: dict[str, Any]) -> None:
    runs, rows = found["a log-prob"]
    assert runs == ["torch.mm"] and [row["impl"] for row in rows] == ["wide", "narrow", "pair"]
    for row in rows:
        assert re.fullmatch(r"ArithmeticError: logprob_error is 1\.0e-04 and may be \d\.\de-06", row["error"])
    runs, rows = found["no E"]
    assert runs == ["torch.mm", "wide", "narrow"]
    (row,) = [row for row in rows if "error" in row]
    assert row["impl"] == "pair" and row["error"].startswith("ArithmeticError: e_error is nan and may be 1.")


def test_a_fault_in_any_row_of_e_is_seen(found: dict[str, Any]) -> None:
    assert found["right"] < 2e-6 and found["two columns exchanged"] > 0.1
    assert len(found["rows"]) == 272 and min(found["rows"]) > 0.005


def test_what_fails_while_it_is_timed_is_an_error_row_and_the_rest_is_timed(found: dict[str, Any]) -> None:
    times = [row for row in found["one"] if "error" not in row]
    assert [(row["impl"], len(row["samples"])) for row in times] == [("torch.mm", 3), ("pair", 3)]
    assert [(row["impl"], row["error"]) for row in found["one"] if "error" in row] == [
        ("wide", "IndexError: pop from empty list")
    ]
    assert [(row["impl"], row["error"]) for row in found["all"]] == [
        (impl, "ZeroDivisionError: division by zero") for impl in ("torch.mm", "wide")
    ]
    assert found["winner"] == ["pair wins; narrow is what a call takes", "no tile ran"]


BROKEN = """
import os
import tiles
for name, tile in tiles.HERE.items():
    tiles.HERE[name] = tile._replace(bn=tile.bn + 1)
"""


def test_without_a_tile_that_ran_it_fails_and_says_why(tmp_path: Path) -> None:
    done = python("-c", f"{BROKEN}tiles.main()", "--shape", "16,16,30", "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bench/tiles.py: no tile ran; the record says why"
    rows = record.read(tmp_path / "tiles-cpu.json")["rows"]
    assert len([row for row in rows if "error" in row]) == 6
    assert {row["impl"] for row in rows if "median" in row} == {"torch.mm"}


def test_why_a_tile_is_out_is_written_before_anything_is_timed(tmp_path: Path) -> None:
    program = f"{BROKEN}tiles.timings = lambda *_: os._exit(9)\ntiles.main()"  # a device that takes the process along
    done = python("-c", program, "--shape", "16,16,30", "--output", str(tmp_path))
    assert done.returncode == 9
    rows = record.read(tmp_path / "tiles-cpu.json")["rows"]
    assert [row["impl"] for row in rows if "error" in row] == ["wide", "narrow", "pair"]
