"""The sweep of the GEMM's tiles, as a script; without a GPU it takes Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import record


def sweep(folder: Path, *shapes: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(record.ROOT), environment.get("PYTHONPATH", "")])
    options = [option for shape in shapes for option in ("--shape", shape)]
    command = [sys.executable, str(record.ROOT / "bench/tiles.py"), *options, "--rounds", "2", "--output", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card takes another record, see tests/gpu")
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
    }
    for (case, impl, metric), row in rows.items():
        assert len(row["samples"]) == (2 if metric == "time" else 1)
        if metric == "time":
            assert row["floor_share"] * row["median"] == pytest.approx(rows[case, "torch.mm", "time"]["median"])
            tokens, width, vocab = map(int, row["shape"].strip("()").split(","))
            assert row["rows"] == tokens
            assert row["tflops"] * 1e12 * row["median"] == pytest.approx(2 * tokens * width * vocab)
        else:
            assert row["unit"] == "nats" and row["median"] < 2e-6, impl
    assert all(case in done.stdout for case in cases)
    assert done.stdout.count(" wins; narrow is what a call takes") == len(cases)


def test_a_shape_that_does_not_fit_is_refused_in_a_line(tmp_path: Path) -> None:
    for shape, why in (("150,80,600", "T must be a multiple of 16"), ("160,72,600", "an H that is a multiple of 16")):
        done = sweep(tmp_path, shape)
        assert done.returncode == 2 and not list(tmp_path.iterdir())
        assert why in done.stderr.splitlines()[-1]
