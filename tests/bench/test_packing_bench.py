"""The packers' bench: one small run through its command line, and what it says of a peer that breaks the cap."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import packing
from peers.packers import PEERS, Peer

ROOT = Path(__file__).parents[2]


def test_a_small_run_leaves_a_record_of_every_peer_and_a_plot(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench/packing.py"), "--counts", "40", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "packing.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {f"{name}, n=40" for name in ("lognormal", "uniform", "bimodal")}
    for peer in PEERS:
        mine = [row for row in rows if row["impl"] == peer.name]
        assert all("error" in row for row in mine) or {row["metric"] for row in mine} == {
            packing.TIME, packing.RATIO, packing.OVER, packing.BROKEN, packing.BALANCE
        }  # fmt: skip
    assert (tmp_path / "packing.png").stat().st_size > 10_000
    again = subprocess.run([*command, "--report"], cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == run.stdout and "| gapg |" in again.stdout


def test_a_broken_cap_is_counted() -> None:
    lengths = np.array([packing.CAP, 5, packing.CAP - 4])
    careless = Peer("careless", lambda lengths, cap: lambda: [[0, 1], [2]])
    rows = packing.worth("case", careless, careless.bins([[0, 1], [2]], lengths), lengths)
    assert {row["metric"]: row["median"] for row in rows if row["metric"] != packing.BALANCE} == {
        packing.OVER: -1,  # three bins are the fewest
        packing.BROKEN: 1,
    }
