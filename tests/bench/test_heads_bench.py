"""The comparison of heads: its inputs, its float64 truth, what each peer computes, and what is drawn from it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import heads
import heads_report
import problems
import record
from peers import losses
from peers.losses import Outcome
from problems import Problem
from record import Row

PEERS = {peer.name: peer for peer in [*losses.PEERS, losses.DESIGN]}
COMPILED = {"PyTorch torch.compile", "cut-cross-entropy torch_compile", "Liger GRPO loss"}
NEEDS_A_GPU = {
    "gapg control: cuBLAS + one pass",
    "Liger cross entropy (Triton)",
    "Liger cross entropy (CuTe)",
    "cut-cross-entropy cce",
    "cut-cross-entropy cce, unfiltered",
    "verl linear_cross_entropy",
    "quack chunked cross entropy",
    "quack chunked cross entropy, 8192 rows",
}


def problem(nats: float | None = 2.0, dtype: torch.dtype = torch.float32, zero: bool = False) -> Problem:
    return problems.make(64, 32, 500, dtype=dtype, device="cpu", nats=nats, zero_groups=zero)


def test_the_truth_is_float64_autograd() -> None:
    p = problem()
    hidden, weight = p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()
    logprob = F.linear(hidden, weight).log_softmax(-1).gather(1, p.target[:, None])[:, 0]
    (logprob * p.coefficient().double()).sum().backward()
    found = problems.truth(p, p.coefficient(), rows=17)
    assert hidden.grad is not None and weight.grad is not None
    assert (found.logprob - logprob.detach()).abs().max() < 1e-12
    assert problems.error(found.hidden, hidden.grad) < 1e-12 and problems.error(found.weight, weight.grad) < 1e-12


@pytest.mark.parametrize("nats", [4.0, 2.0, 0.1])
def test_problems_have_the_entropy_asked_for(nats: float) -> None:
    p = problem(nats)
    assert problems.truth(p, p.coefficient()).entropy == pytest.approx(nats, rel=1e-3)


def test_coefficients_are_leave_one_out_advantages() -> None:
    p = problem(zero=True)
    for prompt, rewards in enumerate(p.rewards):
        for i, reward in enumerate(rewards):
            others = torch.cat([rewards[:i], rewards[i + 1 :]]).mean()
            mine = p.coefficient()[(p.group == prompt) & (p.sample == i)]
            assert len(mine) == p.length
            assert mine.tolist() == pytest.approx([-(reward - others).item() / p.sequences] * p.length, abs=1e-7)
    assert (p.coefficient() == 0).sum() == 32


@pytest.mark.parametrize("name", [name for name in PEERS if name not in NEEDS_A_GPU | COMPILED])
@pytest.mark.parametrize("zero", [False, True])
def test_every_peer_computes_the_same_gradient(name: str, zero: bool) -> None:
    """In float32, where nothing but a wrong sign, coefficient or scale makes an error of this size."""
    peer, p = PEERS[name], problem(zero=zero)
    want = problems.truth(p, peer.coefficient(p))
    for trained in (True, False):
        if peer.trained_only and not trained:
            continue
        found = peer.prepare(p, trained)()
        assert problems.error(found.hidden, want.hidden) < 1e-4
        assert (found.weight is not None) == trained
        if found.weight is not None:
            assert problems.error(found.weight, want.weight) < 1e-4
    if peer.load is not None:
        assert (peer.forward(p)() - want.logprob).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_the_compiled_peers_do_too(name: str) -> None:
    peer, p = PEERS[name], problem()
    want = problems.truth(p, peer.coefficient(p))
    found = peer.prepare(p, True)()
    assert found.weight is not None
    assert problems.error(found.hidden, want.hidden) < 1e-4 and problems.error(found.weight, want.weight) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where they cannot run")
@pytest.mark.parametrize("name", sorted(NEEDS_A_GPU))
def test_what_cannot_run_says_why_in_one_line(name: str) -> None:
    with pytest.raises(Exception, match=r"CUDA|active drivers") as raised:
        PEERS[name].prepare(problem(), True)()
    assert "\n" not in record.error_row("c", name, raised.value)["error"]


def test_a_package_is_found_without_what_it_runs_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl's kernels are: the packages above them would start ray."""
    inner = tmp_path / "heavy_peer" / "utils" / "kernel"
    inner.mkdir(parents=True)
    (inner / "__init__.py").touch()
    (inner / "loss.py").write_text(
        "from heavy_peer.utils import device\n\n\ndef found():\n    from . import loss\n\n    return loss\n"
    )
    (inner.parent / "device.py").touch()
    for package in (inner.parent, inner.parent.parent):
        (package / "__init__.py").write_text("raise ImportError('no ray')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no ray"):
        importlib.import_module("heavy_peer.utils.kernel.loss")
    losses.bare_packages("heavy_peer", "heavy_peer.utils")
    loss = importlib.import_module("heavy_peer.utils.kernel.loss")
    assert loss.found() is loss
    with pytest.raises(ModuleNotFoundError) as missing:
        losses.bare_packages("no_such_peer")
    assert record.error_row("c", "i", missing.value)["error"].startswith("no_such_peer is not installed: pip install")


def test_a_wrong_coefficient_would_show() -> None:
    """What the errors are for: a sign, a scale and a forgotten coefficient are each of the order of 1 or more."""
    p = problem()
    want = problems.truth(p, p.coefficient())
    right = PEERS["gapg linear_logprob"].prepare(p, True)()
    for wrong in (-right.hidden, 8 / 7 * right.hidden, right.hidden.sign() * want.hidden.abs().mean()):
        assert problems.error(wrong, want.hidden) > 0.1


def test_the_peak_is_what_the_allocator_handed_out() -> None:
    def work() -> torch.Tensor:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b, c = torch.empty(3 << 20, dtype=torch.uint8), torch.empty(2 << 20, dtype=torch.uint8)
        del b
        return c

    if heads.DEVICE == "cpu":
        assert heads.peak_bytes(work) == pytest.approx(5 << 20, rel=0.01)


def test_the_peak_sees_inside_custom_operators() -> None:
    p = problems.make(64, 32, 8000, dtype=torch.float32, device=heads.DEVICE, nats=None)
    assert heads.peak_bytes(PEERS["gapg linear_logprob"].prepare(p, True)) >= 64 * 8000 * 4


def test_one_case_is_measured_whole() -> None:
    chosen = [
        PEERS[n]
        for n in ("gapg fused_policy_loss", "gapg linear_logprob", "PyTorch eager", "quack chunked cross entropy")
    ]
    broken = dataclasses.replace(
        PEERS["PyTorch eager"], name="broken", prepare=lambda p, _: lambda: Outcome(None, p.hidden * torch.nan, None)
    )
    case = heads.Case(heads.Shape(64, 32, 2000), zero=True)
    rows = heads.measure(case, [*chosen, broken])
    found = heads_report.by_metric(rows)
    assert {"time", "peak_memory", "dH_error", "dW_error", "logprob_error"} == found["gapg linear_logprob"].keys()
    assert found["broken"]["error"]["error"] == "ArithmeticError: dH_error is not finite"
    assert found["broken"].keys() == {"error"}
    time = found["gapg fused_policy_loss"]["time"]
    assert time["predicted_as"] == "ours, half the rows zero"
    assert time["tflops"] == pytest.approx(6 * 32 * 32 * 2000 / time["median"] / 1e12)  # 32 of 64 rows count
    assert time["floor_share"] == pytest.approx(found["bare GEMMs"]["time"]["median"] / time["median"])
    for text in (heads_report.table(str(case), rows), heads_report.summary(rows)):
        assert str(case) in text


def breaking(broken: list[str], after: int) -> losses.Peer:
    """A peer that works in its first calls; from the next one on it raises, and ``broken`` is no longer empty."""
    calls: list[None] = []

    def prepare(p: Problem, trained: bool) -> losses.Run:
        def run() -> Outcome:
            calls.append(None)
            if len(calls) > after:
                broken.append("an illegal memory access")
                raise RuntimeError(broken[0])
            return PEERS["PyTorch eager"].prepare(p, trained)()

        return run

    return dataclasses.replace(PEERS["gapg fused_policy_loss"], name="gapg lost", prepare=prepare)


def test_a_peer_that_fails_while_it_is_timed_is_a_reason_and_the_others_are_timed() -> None:
    rows = heads.measure(heads.Case(heads.Shape(64, 32, 500)), [PEERS["gapg linear_logprob"], breaking([], after=2)])
    found = heads_report.by_metric(rows)
    assert found["gapg lost"].keys() == {"error"} and "time" in found["gapg linear_logprob"]
    assert heads_report.ours_failed(rows) == "gapg lost: RuntimeError: an illegal memory access"


@pytest.mark.parametrize("name", ["gapg fused_policy_loss", "gapg linear_loss", "gapg linear_logprob"])
def test_ours_keep_to_the_workspace_they_are_given(name: str) -> None:
    """64 rows of E are 125 KiB; in 64,000 bytes there is room for 32 of them."""
    p = problem()
    (small,) = (peer for peer in losses.ours(64_000) if peer.name == name)
    peaks = [heads.peak_bytes(peer.prepare(p, True)) for peer in (PEERS[name], small)]
    assert peaks[0] - peaks[1] > 50_000


def test_a_peer_that_breaks_the_device_leaves_the_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after an illegal access fails too, the bare products among them: the case keeps what it knows."""
    broken: list[str] = []
    mm = torch.mm

    def of_a_device(*args: Any, **options: Any) -> torch.Tensor:
        if broken:
            raise RuntimeError(broken[0])
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", of_a_device)
    peers = [PEERS["quack chunked cross entropy"], breaking(broken, after=2)]
    rows = heads.measure(heads.Case(heads.Shape(64, 32, 500)), peers)
    assert [row["impl"] for row in rows] == ["quack chunked cross entropy", "gapg lost", heads_report.FLOOR]
    assert all("error" in row for row in rows)
    assert heads_report.ours_failed(rows[:1]) is None  # it says itself that it needs a card
    heads_report.plot({"rows": rows, "machine": {"device": "cpu", "cpu": "x"}}, tmp_path / "nothing.png")
    assert heads_report.summary(rows) and not list(tmp_path.iterdir())


def test_a_forward_is_asked_of_those_that_have_one() -> None:
    chosen = [PEERS["gapg fused_policy_loss"], PEERS["PyTorch eager"]]
    rows = heads.measure(heads.Case(heads.Shape(64, 32, 500), forward=True), chosen)
    assert {row["impl"] for row in rows} == {heads_report.FLOOR, "PyTorch eager"}


def test_anybody_times_their_own_shape_beside_one_peer(tmp_path: Path) -> None:
    options = [
        "--shape",
        "64,32,500",
        "--shape",
        "16,48,300",
        "--case",
        "train,frozen",
        "--impl",
        "linear_logprob,PyTorch eager",
        "--workspace",
        "1",
        "--name",
        "mine",
    ]
    assert script(*options, "--output", str(tmp_path)).returncode == 0
    rows = record.read(tmp_path / "mine-cpu.json")["rows"]
    assert {row["impl"] for row in rows} == {heads_report.FLOOR, "gapg linear_logprob", "PyTorch eager"}
    assert list(dict.fromkeys(row["case"] for row in rows)) == [
        f"{shape} random{frozen}" for shape in ("(64, 32, 500)", "(16, 48, 300)") for frozen in ("", ", frozen weight")
    ]
    for wrong, why in (
        (["--impl", "nobody"], "no 'nobody': choose of gapg fused_policy_loss"),
        (["--case", "warm"], "no 'warm': choose of train, forward"),
        (["--shape", "64,32"], "give T,H,V"),
        (["--shape", "65,32,500"], "T must be a multiple of 16"),
    ):
        done = script(*wrong, "--output", str(tmp_path))
        assert done.returncode == 2 and why in done.stderr.splitlines()[-1]


def script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/heads.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, env=environment)


def test_losses_that_sum_stay_in_the_summary_and_are_labelled() -> None:
    seconds = {
        "bare GEMMs": 1.0, "gapg a": 1.25, "gapg control: b": 1.1, "gapg fused_policy_loss, patched": 1.1, "eager": 3.0,
        "quick": 1.2,
    }  # fmt: skip

    rows = record.timing_rows("a case", {impl: [value] for impl, value in seconds.items()})
    rows[-1]["computes"] = losses.ENTROPY
    _, _, ours, other, summed = heads_report.summary(rows).splitlines()
    assert ours.split() == ["a", "case", "1000.00", "1250.00", "0.80"]
    assert other.split() == ["3000.00", "2.40", "eager"]
    assert summed.split()[:3] == ["1200.00", "0.96", "quick"] and "not a policy loss" in summed


def error_record() -> list[Row]:
    rows = []
    for case, value in (("8.0 nats", 1.7e-3), ("0.0 nats", 1.6e5)):
        rows += record.timing_rows(case, {"ours": [value]}, "dH_error", "1")
        rows += record.timing_rows(case, {"ours": [2e-6]}, "logprob_error", "nats")
        rows += record.timing_rows(case, {"only a loss": [value]}, "dH_error", "1")
        rows.append(record.error_row(case, "absent", "not installed"))
    return rows


def test_the_table_of_errors_has_a_line_for_each_that_ran() -> None:
    assert heads_report.error_table(error_record()) == (
        "| entropy, nats | 8.0 | 0.0 |\n|---|---|---|\n"
        "| ours | 1.7e-3, 2e-6 | 1.6e+5, 2e-6 |\n| only a loss | 1.7e-3 | 1.6e+5 |"
    )


def test_a_table_of_errors_that_was_cut_off_shows_what_there_is() -> None:
    kept = [row for row in error_record() if (row["case"], row["impl"]) != ("0.0 nats", "ours")]
    assert "| ours | 1.7e-3, 2e-6 | – |" in heads_report.error_table(kept)


def test_a_broken_device_does_not_stop_the_cleaning_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(heads, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    heads.release()


def test_the_committed_errors_say_what_the_head_promises() -> None:
    """Log-probs to 1e-4, and gradients at or below eager's at every entropy."""
    rows = record.read(heads.RESULTS / "errors-cpu.json")["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert cases == [f"{nats} nats" for nats in problems.LADDER]
    for case in cases:
        found = heads_report.by_metric([row for row in rows if row["case"] == case])
        for ours in ("gapg fused_policy_loss", "gapg linear_logprob"):
            assert found[ours]["logprob_error"]["median"] <= 1e-4
            for metric in ("dH_error", "dW_error"):
                assert found[ours][metric]["median"] <= found["PyTorch eager, 16-bit softmax"][metric]["median"]
                assert found[ours][metric]["median"] <= found["PyTorch eager"][metric]["median"]


def test_committed_times_are_complete() -> None:
    found = json.loads((heads.RESULTS / "kernels-cpu.json").read_text())
    for case in {row["case"] for row in found["rows"]}:
        rows = heads_report.by_metric([row for row in found["rows"] if row["case"] == case])
        timed = {impl: row["time"] for impl, row in rows.items() if "time" in row}
        assert timed["bare GEMMs"]["floor_share"] == 1.0
        assert all(len(row["samples"]) >= heads.SLOW_ROUNDS for row in timed.values())
        assert set(rows) - set(timed) == {impl for impl in rows if "error" in rows[impl]}


def test_the_committed_times_of_a_loss_of_ones_own() -> None:
    """In one workspace, in which linear_logprob computes E a second time: at most 0.85 of its time."""
    rows = record.read(heads.RESULTS / "linear-loss-cpu.json")["rows"]
    for case in ("(8192, 256, 32768) random", "(8192, 256, 32768) random, bfloat16"):
        found = heads_report.by_metric([row for row in rows if row["case"] == case])
        ours, composed = (found[f"gapg {name}"]["time"]["median"] for name in ("linear_loss", "linear_logprob"))
        assert ours <= 0.85 * composed
