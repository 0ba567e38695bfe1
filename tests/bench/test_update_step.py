"""Whole updates at a size of seconds: all get the same tokens, and every saving lessens the counted work."""

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record, update_step, update_step_report
from bench.peers import updates
from bench.record import Row
from bench.update_step import OURS, Case
from gapg import attention
from gapg.policy import response_logprobs

attention.register()
TINY = Case("tiny", update_step.TOY, 24, 0.5, prompts=2, samples=4, response=8, token_cap=512)


@pytest.fixture(scope="module")
def counted() -> list[Row]:
    return update_step.counted_rows(TINY)


def test_counted_work_falls_with_each_saving_and_the_record_holds_it(counted: list[Row], tmp_path: Path) -> None:
    record.write("update_step", counted, tmp_path / "cpu.json")
    rows = record.read(tmp_path / "cpu.json")["rows"]
    assert not [row for row in rows if "error" in row]
    found = {(row["impl"], row["metric"]): row["median"] for row in rows}
    impls = [*OURS, *updates.PEERS]
    assert {impl for impl, _ in found} == set(impls)
    flops = [found[name, "flops"] for name in OURS]
    assert all(before > after for before, after in pairwise(flops))
    assert all(found[name, "bytes"] > 0 for name in impls)
    assert {found[name, "tokens given"] for name in impls} == {sum(map(len, TINY.data()[0]))}
    update_step_report.plot(rows, OURS, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 0

    readme = tmp_path / "README.md"
    readme.write_text("above\n{}\nold\n{}\nbelow\n".format(*update_step_report.MARKERS))
    for _ in range(2):  # the second time over what the first has drawn
        update_step_report.draw_into(readme, rows, OURS, list(updates.PEERS))
        above, begin, head, _, *lines, end, below = readme.read_text().splitlines()
        assert (above, begin, end, below) == ("above", *update_step_report.MARKERS, "below")
        assert head == "| | tiny, P=24 |" and [line.split(" | ")[0][2:] for line in lines] == impls
    with pytest.raises(ValueError, match="needs the markers"):
        update_step_report.draw_into(tmp_path / "cpu.json", rows, OURS, [])


def test_bytes_are_those_that_are_alive(counted: list[Row]) -> None:
    """The plain loop keeps logits of every position in 16 bits, and float32 log-probs of every response's."""
    found = {(row["impl"], row["metric"]): row["median"] for row in counted}
    widest = max(TINY.padded(), key=lambda batch: batch.ids.numel())
    shape = TINY.model
    logits = shape.vocab_size * (widest.ids.numel() * 2 + widest.targets.numel() * 4)
    body = widest.ids.numel() * shape.hidden_size * shape.num_hidden_layers * 200  # more than a layer keeps of a token
    assert logits < found["padded, full logits", "bytes"] < 3 * logits + body
    assert {found[name, "tokens of the micro-batch"] for name in updates.PEERS} == {widest.ids.numel()}


@pytest.mark.parametrize("name", [OURS[0], OURS[-1], *updates.PEERS])
def test_counts_of_one_layer_and_two_extend_to_five(name: str) -> None:
    """But for a few bytes, in which Python's collector of cycles shows."""
    ours = name in OURS
    batch: Any = max(TINY.batches(OURS.index(name)), key=update_step._tokens) if ours else next(iter(TINY.padded()))
    loss = update_step._loss_of_ours if ours else updates.PEERS[name]
    count = functools.partial(update_step._run, TINY, batch=batch, loss=loss, name=attention.NAME if ours else "sdpa")
    one, two, five = (count(layers=n) for n in (1, 2, 5))
    assert five.flops == one.flops + 4 * (two.flops - one.flops)
    assert list(five.peaks) == pytest.approx(update_step.extended(one.peaks, two.peaks, 5), rel=1e-4)
    assert min(five.peaks) > 0


@pytest.mark.parametrize("name", updates.PEERS)
def test_a_peers_gradient_is_that_of_the_log_probs_weighed_by_advantage(name: str) -> None:
    """So it computes the same thing as ours, to float32's rounding."""
    torch.manual_seed(0)
    make = update_step.AutoModelForCausalLM.from_config
    model = make(TINY.model, attn_implementation=attention.NAME, dtype=torch.float32).train()
    for batch in TINY.padded():
        updates.PEERS[name](model, batch).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    _, table = TINY.data()
    advantages = update_step.group_advantages(table) / table.numel()
    for batch in TINY.batches(3):
        (-advantages[batch.group, batch.sample] * response_logprobs(model, batch)).sum().backward()
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    assert scale > 1e-4
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, atol=2e-5 * scale, rtol=1e-4, msg=n)
