"""Whole updates at a size of seconds: all get the same tokens, and every saving lessens the counted work."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pictures
import record
import update_count
import update_step
import update_step_report
from gapg.model import attention
from gapg.model.memory import fitting_token_cap, plan_memory
from gapg.model.policy import response_logprobs
from gapg_kernels.policy_loss import group_advantages
from peers import updates
from record import Row
from update_cases import CASES, IMPLS, TOY, Case
from update_step_report import MARGINAL, OURS, SEQUENCES, TOKEN_CAP, TRL, WORK

attention.register()
TINY = Case("tiny", TOY, 24, 0.5, prompts=2, samples=4, response=8, token_cap=512)
GIB = 2**30


@pytest.fixture(scope="module")
def counted() -> list[Row]:
    return update_count.counted_rows(TINY, IMPLS)


def test_counted_work_falls_with_each_saving_and_the_record_holds_it(counted: list[Row], tmp_path: Path) -> None:
    record.write("update_step", counted, tmp_path / "cpu.json")
    rows = record.read(tmp_path / "cpu.json")["rows"]
    assert not [row for row in rows if "error" in row]
    found = {(row["impl"], row["metric"]): row["median"] for row in rows}
    impls = list(IMPLS)
    assert {impl for impl, _ in found} == set(impls)
    flops = [found[name, "flops"] for name in OURS]
    assert all(before > after for before, after in pairwise(flops))
    assert all(found[name, "bytes"] > 0 for name in impls)
    assert {found[name, "tokens given"] for name in impls} == {TINY.given}
    pictures.grid(update_step_report.panels(rows), tmp_path / "cpu.png", "One update")
    assert (tmp_path / "cpu.png").stat().st_size > 0

    table, *text = update_step_report.counted_table(rows, list(updates.PEERS)).split("\n\n")
    head, _, *lines = table.splitlines()
    assert head == "|  | tiny, P=24 |" and [line.split(" | ")[0][2:] for line in lines] == impls
    (text,) = text
    assert text.startswith("`method: marginal`") and f"{found[MARGINAL[1], 'flops'] / flops[-1]:.3f}." in text


def test_bytes_are_those_that_are_alive(counted: list[Row]) -> None:
    """The plain loop keeps logits of every position in 16 bits, and float32 log-probs of every response's."""
    found = {(row["impl"], row["metric"]): row["median"] for row in counted}
    widest = max(TINY.padded(), key=lambda batch: batch.ids.numel())
    shape = TINY.model
    logits = shape.vocab_size * (widest.ids.numel() * 2 + widest.targets.numel() * 4)
    body = widest.ids.numel() * shape.hidden_size * shape.num_hidden_layers * 200  # more than a layer keeps of a token
    assert logits < found["padded, full logits", "bytes"] < 3 * logits + body
    assert {found[name, "tokens of the micro-batch"] for name in updates.PEERS} == {widest.ids.numel()}


@pytest.mark.parametrize("name", [OURS[0], OURS[-1], *MARGINAL, *updates.PEERS])
def test_counts_of_one_layer_and_two_extend_to_five(name: str) -> None:
    """But for a few bytes, in which Python's collector of cycles shows."""
    batch: Any = TINY.batches(name)[0] if name not in updates.PEERS else TINY.padded()[0]
    one, two, five = (update_count.run_layers(TINY, n, name, batch) for n in (1, 2, 5))
    assert five.flops == one.flops + 4 * (two.flops - one.flops)
    assert list(five.peaks) == pytest.approx(update_count.extended(one.peaks, two.peaks, 5), rel=1e-4)
    assert min(five.peaks) > 0


@pytest.mark.parametrize("name", updates.PEERS)
def test_a_peers_gradient_is_that_of_the_log_probs_weighed_by_advantage(name: str) -> None:
    """So it computes the same thing as ours, to float32's rounding."""
    torch.manual_seed(0)
    make = AutoModelForCausalLM.from_config
    model = make(TINY.model, attn_implementation=attention.NAME, dtype=torch.float32).train()
    for batch in TINY.padded():
        updates.PEERS[name](model, batch).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    _, table = TINY.data
    advantages = group_advantages(table) / table.numel()
    for batch in TINY.batches(OURS[3]):
        (-advantages[batch.group, batch.sample] * response_logprobs(model, batch)).sum().backward()
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    assert scale > 1e-4
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, atol=2e-5 * scale, rtol=1e-4, msg=n)


def test_flops_hang_on_no_micro_batch_that_was_counted(counted: list[Row]) -> None:
    """The smallest of them tells the same as the largest; fewer sequences at once pad less."""
    found = {row["impl"]: row["median"] for row in counted if row["metric"] == "flops"}
    sizes = {name: updates.MICRO_BATCH if name in updates.PEERS else TINY.token_cap for name in IMPLS}
    assert {name: update_count.update_flops(TINY, name, sizes[name]) for name in IMPLS} == pytest.approx(
        found, rel=1e-9
    )
    assert update_count.update_flops(TINY, TRL, 1) < found[TRL]


def test_the_plan_that_chooses_the_cap_covers_every_variant() -> None:
    """Qwen2.5-0.5B's widths in six layers: what each variant's largest micro-batch keeps alive is in the plan."""
    case = CASES["0.5B-P1024-30"]
    shape = type(case.model)(**{**case.model.to_dict(), "num_hidden_layers": 6, "layer_types": None})
    case = replace(case, model=shape, prompts=8)
    cuda = torch.device("cuda")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention.NAME, dtype=torch.float32)
    case = replace(case, token_cap=fitting_token_cap(model, case.config(OURS[0]), cuda, 20 * GIB))
    plan = plan_memory(model, case.config(OURS[0]), cuda, 20 * GIB)
    assert case.longest <= case.token_cap and plan.total <= 19 * GIB
    for name in OURS:
        largest = max(case.batches(name), key=lambda batch: batch.input_ids.numel())
        one, two = (update_count.run_layers(case, n, name, largest) for n in (1, 2))
        alive = max(update_count.extended(one.peaks, two.peaks, 6))
        assert 0.5 * plan.tokens < largest.input_ids.numel() <= case.token_cap
        assert alive <= plan.copies + plan.activations + plan.head + plan.passing, name


# --- timed -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_takes_half_as_much_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that run out of memory as CUDA does, above two sequences and always; the others are timed all the same."""

    def hungry(model: PreTrainedModel, batch: updates.Padded) -> Tensor:
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return updates.full_logits(model, batch)

    def hopeless(model: PreTrainedModel, batch: updates.Padded) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def wrong(model: PreTrainedModel, batch: updates.Padded) -> Tensor:
        raise ValueError("no such model")

    for loss in (hungry, hopeless, wrong):
        monkeypatch.setitem(updates.PEERS, loss.__name__, loss)
    saved: list[list[Row]] = []
    names = ["hungry", "hopeless", "wrong", OURS[-1]]
    update_step.time_case(TINY, saved.append, impls=names, device="cpu", rounds=2, seconds=None)
    rows = saved[-1]
    found = {(row["impl"], row["metric"]): row for row in rows if "median" in row}
    assert found["hungry", SEQUENCES[0]]["median"] == 2
    assert found[OURS[-1], TOKEN_CAP[0]]["median"] == TINY.token_cap
    for name in ("hungry", OURS[-1]):
        assert len(found[name, "time"]["samples"]) == len(found[name, WORK]["samples"]) == 2
    errors = {row["impl"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "hopeless": "MemoryError: out of memory, with sequences a micro-batch at 1 too",
        "wrong": "ValueError: no such model",
    }
    shown = update_step_report.summary(rows).splitlines()
    assert shown[0] == str(TINY) and shown[-1].strip().startswith("no verdict")
    assert next(line for line in shown if "hungry" in line).endswith("2 sequences")


def test_no_cap_of_ours_is_below_the_longest_sequence() -> None:
    trainer = update_step.Trainer(replace(TINY, token_cap=10 * TINY.longest), "cpu")
    sizes = trainer.sizes(OURS[0])
    assert sizes == [10 * TINY.longest, 5 * TINY.longest, 5 * TINY.longest // 2, 5 * TINY.longest // 4]
    assert trainer.sizes(TRL) == [8, 4, 2, 1]


def test_no_round_begins_after_the_seconds_are_over() -> None:
    saved: list[list[Row]] = []
    update_step.time_case(TINY, saved.append, impls=[OURS[-1], TRL], device="cpu", rounds=50, seconds=0.0)
    samples = {row["impl"]: row["samples"] for row in saved[-1] if row.get("metric") == "time"}
    assert {name: len(values) for name, values in samples.items()} == {OURS[-1]: 1, TRL: 1}


NOT_ON_A_GPU_MACHINE = ("openai", "tyro", "scipy.stats", "vllm", "math_verify", "tensorboard", "wandb", "fastapi")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(record.ROOT / "bench")}
SCRIPT = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv[1:] = {arguments}
runpy.run_path({path!r}, run_name="__main__")
"""


def script(*arguments: str, absent: Sequence[str] = ()) -> list[str]:
    """A command that runs the bench without the packages named."""
    path = str(record.ROOT / "bench" / "update_step.py")
    return [sys.executable, "-c", SCRIPT.format(absent=list(absent), arguments=list(arguments), path=path)]


OWN = ("--only", "timed", "--shape", "24,8,3", "--prompts", "2")


def test_a_shape_of_ones_own_needs_no_more_than_a_gpu_machine_has(tmp_path: Path) -> None:
    command = script(*OWN, "--rounds", "1", "--output", str(tmp_path), absent=NOT_ON_A_GPU_MACHINE)
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rows = record.read(tmp_path / "cpu.json")["rows"]
    assert not [row for row in rows if "error" in row]
    assert {row["case"] for row in rows} == {"toy, 2 x P=24 mean R=8 G=3, 30% all equal"}
    for metric in ("time", "given tokens/s", WORK):
        assert {row["impl"] for row in rows if row["metric"] == metric} == set(IMPLS)
    assert (tmp_path / "cpu.png").stat().st_size > 0
    assert f"times as fast as {TRL} (the goal" in done.stdout


def test_a_time_limit_leaves_what_was_measured(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it, in the middle of the rounds."""
    command = script(*OWN, "--rounds", "1000000", "--impl", "shared", "--output", str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT)
    left = tmp_path / "cpu.json"
    while (
        not (left.exists() and '"time"' in left.read_text()) and process.poll() is None
    ):  # it is there after the trials
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate()
    assert process.returncode == 143
    (row,) = [row for row in record.read(left)["rows"] if row["metric"] == "time"]
    assert row["samples"] and (tmp_path / "cpu.png").exists()
    assert f"{row['median'] * 1e3:.1f}" in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--case", "7B"], "no '7B': choose of 0.5B-P256-0, "),
        (["--impl", "trl,nobody"], "no 'nobody': choose of gapg, no saving, "),
        (["--shape", "24,8"], "'24,8': give P,R,G, "),
        (["--shape", "24,8,1"], "'24,8,1': give P,R,G, "),
        (["--rounds", "0"], "--rounds: '0': give a whole number, 1 or more"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["update_step.py", *given])
    with pytest.raises(SystemExit, match="2"):
        update_step.parse()
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_names_choose_cases_and_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--case", "1.5B-P1024-30,toy-P64-0", "--case", "toy-P64-50", "--impl", "TRL", "--impl", "shared"]
    monkeypatch.setattr(sys, "argv", ["update_step.py", *given])
    chosen = update_step.parse()
    assert set(chosen.case) == {"1.5B-P1024-30", "toy-P64-0", "toy-P64-50"}
    assert chosen.impl == [TRL, OURS[-1]]


def test_the_summary_sets_ours_beside_the_goal() -> None:
    rows = [
        *record.timing_rows("case", {OURS[0]: [20.0], OURS[-1]: [4.0], TRL: [12.0]}),
        *record.timing_rows("case", {OURS[-1]: [60.0 * GIB], TRL: [70.0 * GIB]}, "peak memory", "B"),
        *record.timing_rows("case", {OURS[-1]: [13_312.0]}, *TOKEN_CAP),
        *record.timing_rows("case", {TRL: [4.0]}, *SEQUENCES),
    ]
    met = update_step_report.summary(rows).splitlines()
    assert met[-1].strip().startswith(f"ours with all savings is 3.00 times as fast as {TRL} (the goal")
    ours = next(line for line in met if OURS[-1] in line)
    assert ours.split() == [*OURS[-1].split(), "4000.0", "0.33", "0.20", "60.0", "–", "13312", "tokens"]
