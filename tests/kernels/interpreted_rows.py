"""Run the repair, the softcap in the pass and the entropy's gradient through Triton's interpreter; save their results.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_rows rows.pt

A script of its own for the reasons of `interpreted_cases`. The pass's blocks are 512 columns here, so that a case's
columns are several blocks and several of the repair's spans.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from gapg_kernels import cublas_odds, entropy_gradient, reference, repair
from tests.kernels.float64_oracle import ENTROPIES, Inputs, inputs_at

F32 = torch.float32
dots: list[int] = []
"""FLOPs of each tl.dot so far."""


def counted(a: Any, b: Any, d: Any, *rest: Any) -> Any:
    dots.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
    return _create_dot(a, b, d, *rest)


_create_dot, interpreter_builder.create_dot = interpreter_builder.create_dot, counted


def below(inputs: Inputs, nats: float, rows: list[int] | slice = slice(None)) -> Inputs:
    """Token 7 at least this far below each row's best, as the target of some rows."""
    logits = inputs.hidden @ inputs.weight.t()
    logits[:, 7] = -torch.inf
    bias = torch.zeros(len(inputs.weight)) if inputs.bias is None else inputs.bias.clone()
    bias[7] = (logits.amax(1) - inputs.hidden @ inputs.weight[7]).min() - nats * inputs.temperature
    target = inputs.target.clone()
    target[target == 7] = 8
    target[rows] = 7
    return inputs._replace(target=target, bias=bias)


def run(inputs: Inputs, softcap: float | None = None, *, store: bool = True, entropy: bool = True) -> dict[str, Any]:
    vocab = len(inputs.weight)
    e = torch.full((len(inputs.hidden), -(-vocab // 64) * 64), 7.0)
    before = len(dots)
    rows = cublas_odds.cublas_odds(
        *inputs[:2], inputs.bias, inputs.target, inputs.temperature, e[:, :vocab] if store else None, entropy, softcap
    )
    got = {name: x for name, x in rows._asdict().items() if x is not None}
    return {"inputs": inputs._asdict(), "softcap": softcap, "flops": sum(dots[before:]), "e": e, **got}


def far_rows() -> dict[str, Any]:
    """All rows, one and none far; only rows that are neither masked nor wrong; with fewer programs than tiles."""
    base = inputs_at(2.0, rows=40, width=24, vocab=530, dtype=F32, temperature=0.8)
    cases = {
        "all": run(below(base, 150)),
        "all, forward only": run(below(base, 150), store=False, entropy=False),
        "one": run(below(base, 150, [31])),
        "none": run(below(base, 150, [])),
    }
    spoilt = below(base, 150)
    spoilt.target[5:8] = torch.tensor([-100, 530, 2**40])
    cases["all but masked and wrong"] = run(spoilt)
    repair.PROGRAMS = 2
    cases["all by two programs"] = run(below(base, 150))
    return cases


def ladder() -> dict[str, Any]:
    """Far targets where the other tokens' entropy is each of the ladder's."""
    return {
        f"{nats} nats": run(below(inputs_at(
            nats, rows=6, width=24, vocab=2401 if nats > 4 else 530, dtype=F32, bias=True, temperature=0.7
        ), 5000.0 if nats == 2 else 100.0)) for nats in ENTROPIES
    }  # fmt: skip


def softcaps() -> dict[str, Any]:
    """A cap of 30 over the ladder, one that saturates, columns that are masked, and gaps beyond 82 nats."""
    cases = {}
    for nats in ENTROPIES:
        inputs = inputs_at(nats, rows=8, width=24, vocab=2401 if nats > 4 else 530, dtype=F32, bias=True)
        cases[f"{nats} nats"] = run(inputs._replace(temperature=0.7), 30.0)
    base = inputs_at(2.0, rows=8, width=24, vocab=530, dtype=F32)
    cases["hard"] = run(base._replace(hidden=base.hidden * 3), 5.0)
    cases["forward only"] = run(base, 5.0, store=False, entropy=False)
    # One cap from side to side is 2 * 30 / 0.3 = 200 nats.
    wide = inputs_at(0.35, rows=8, width=24, vocab=530, dtype=F32)
    wide = wide._replace(hidden=wide.hidden * 20, temperature=0.3)
    worst = (wide.hidden @ wide.weight.t()).argmin(1)
    cases["far"] = run(wide._replace(target=torch.where(torch.arange(8) < 5, worst, wide.target)), 30.0)
    return cases


def masked_columns() -> dict[str, Any]:
    """Every third token has the bias -inf: then near and far rows, with and without a softcap, and a masked target."""
    base = inputs_at(2.0, rows=10, width=24, vocab=300, dtype=F32)
    bias = torch.where(torch.arange(300) % 3 == 0, -torch.inf, 0.0)
    target = torch.where(bias[base.target] == 0, base.target, base.target + 1).clamp_max(299)
    target[:4] = 7
    masked = below(base._replace(bias=bias, target=target), 150, slice(0, 4))
    wide = masked._replace(hidden=masked.hidden * 20, temperature=0.3, target=target)
    forbidden = masked._replace(target=torch.where(torch.arange(10) == 2, 6, masked.target))
    return {
        "plain": run(masked),
        "softcap": run(wide, 30.0),
        "a forbidden target": run(forbidden),
        "a forbidden target, softcap": run(forbidden, 30.0),
    }


def which() -> dict[str, Tensor]:
    """The list of far rows over several programs: scattered ones, of the last block only, and none."""
    g = torch.Generator().manual_seed(0)
    rows, logit = 3 * repair.WHICH_ROWS + 5, torch.zeros(3 * repair.WHICH_ROWS + 5)
    scattered = torch.where(torch.rand(rows, generator=g) < 0.1, 2.0**60, 2.0**59)
    last, none = torch.zeros(rows), torch.zeros(rows)
    last[-2:], none[7] = torch.inf, torch.nan
    found = {}
    for name, odds in (("scattered", scattered), ("last", last), ("none", none)):
        far = torch.full((1 + rows,), -1, dtype=torch.int32)
        grid = (triton.cdiv(rows, repair.WHICH_ROWS),)
        repair.which_rows_kernel[grid](odds, logit, far, rows, repair.WHICH_ROWS)
        found |= {name: odds, f"{name}, found": far}
    return found


def entropy_gradients() -> dict[str, Any]:
    """Over the ladder, with a masked row; E in place, beside it, and in bfloat16. ``aside``: with another target than
    the likeliest token, whose part of the gradient is then what the others leave."""
    cases = {}
    for nats, aside in [*((nats, False) for nats in ENTROPIES), (0.35, True), (0.1, True), (0.0, True)]:
        vocab = 2401 if nats > 4 else 300
        inputs = inputs_at(nats, rows=12, width=24, vocab=vocab, dtype=F32, bias=True, temperature=0.7)
        target = (inputs.target + 1) % vocab if aside else inputs.target
        inputs = inputs._replace(target=torch.where(torch.arange(12) == 3, -100, target))
        k = torch.linspace(-1, 2, 12)
        e = torch.full((12, vocab + 7), 7.0)
        rows = reference.plain_odds(*inputs[:2], inputs.bias, inputs.target, 0.7, e[:, :vocab], entropy=True)
        assert rows.entropy is not None
        masked = inputs.target == -100
        scales = [torch.where(masked, 0.0, x) / 0.7 for x in (inputs.grad, k)]
        own = rows.unit / (rows.odds + rows.unit) * (rows.logprob + rows.entropy)
        rest = *scales, rows.odds + rows.unit, rows.entropy, own
        out, narrow = torch.full((12, vocab + 3), 5.0), e[:, :vocab].bfloat16()
        narrow_out = torch.empty_like(narrow)
        entropy_gradient.spread_entropy(e[:, :vocab], *rest, out[:, :vocab])
        entropy_gradient.spread_entropy(narrow, *rest, narrow_out)
        alone = torch.zeros(12), *rest[1:]
        wide_alone, narrow_alone, given = torch.empty(12, vocab), torch.empty_like(narrow), e.clone()
        entropy_gradient.spread_entropy(e[:, :vocab], *alone, wide_alone)
        entropy_gradient.spread_entropy(narrow, *alone, narrow_alone)
        entropy_gradient.spread_entropy(e[:, :vocab], *rest, e[:, :vocab])
        cases[f"{nats} nats" + ", aside" * aside] = {
            "inputs": inputs._asdict(), "grad_entropy": k, "rest": list(rest), "logprob": rows.logprob,
            "e": given, "out, entropy alone": wide_alone, "narrow out, entropy alone": narrow_alone,
            "in place": e, "out": out, "narrow": narrow, "narrow out": narrow_out,
        }  # fmt: skip
    return cases


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, about the NaN and infinities meant here
    cublas_odds.BLOCK = 512
    found = {
        "far": far_rows(), "ladder": ladder(), "softcap": softcaps(), "masked": masked_columns(), "which": which(),
        "entropy": entropy_gradients(),
    }  # fmt: skip
    torch.save(found, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
