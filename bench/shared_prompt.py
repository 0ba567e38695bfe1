"""One prompt for all its responses against the prompt repeated for each: forward and backward of a decoder, in one run.

    OMP_NUM_THREADS=1 python bench/shared_prompt.py     # small models on a CPU, eight of 1.5B's layers on a GPU
    python bench/shared_prompt.py --case P1024-R256 --seconds 20     # or by number, from 0

Beside the times (by device events, on a CPU in processor time) each case has the round-by-round ratio, what
`gapg.batches.sharing` predicts for it, and how far the two runs' gradients lie apart: both are float32 on a CPU and
bfloat16 on a GPU. Results go to bench/results/shared_prompt/<device>.json, those of chosen cases only where --output
says.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import record
from gapg.batches.sharing import RATES, saving, shape_of
from gapg.model import attention
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.shared_prompt_attention import share
from record import Row

RESULTS = record.ROOT / "bench" / "results" / "shared_prompt"

Groups = list[tuple[int, list[int]]]
"""Each prompt's length and those of its responses."""


@dataclass(frozen=True)
class Case:
    """``varied``: response lengths from half to one and a half times ``response``."""

    prompts: int
    prompt: int
    response: int
    samples: int = 8
    varied: bool = False
    hidden: int = 256
    inner: int = 768
    layers: int = 4
    heads: int = 4

    @property
    def key(self) -> str:
        """What `--case` calls it."""
        return f"P{self.prompt}-R{self.response}" + "-equal" * (not self.varied)

    def __str__(self) -> str:
        spread = "varied" if self.varied else "equal"
        model = f"hidden {self.hidden}, {self.layers} layers"
        return f"{self.prompts} x P={self.prompt} R={self.response} ({spread}) G={self.samples}, {model}"

    def groups(self) -> Groups:
        draw = random.Random(0)
        low, high = (self.response // 2, self.response * 3 // 2) if self.varied else (self.response,) * 2
        return [(self.prompt, [draw.randint(low, high) for _ in range(self.samples)]) for _ in range(self.prompts)]

    def model(self, device: str) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=2,
            initializer_range=min(0.1, 1.6 / self.hidden**0.5),  # attention that is neither flat nor on one key
            pad_token_id=0,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME)
        return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).train()


QWEN_1_5B = {"hidden": 1536, "inner": 8960, "layers": 8, "heads": 12}
CASES = {
    "cpu": [
        Case(1, 512, 64),
        Case(1, 512, 64, varied=True),
        Case(1, 128, 128, varied=True),
        Case(1, 64, 256, varied=True),
        Case(8, 20, 10, varied=True, hidden=64, inner=192, layers=2),
    ],
    "cuda": [
        Case(4, 1024, 256, varied=True, **QWEN_1_5B),
        Case(4, 256, 720, varied=True, **QWEN_1_5B),
    ],
}


def updates(model: PreTrainedModel, groups: Groups) -> dict[str, Callable[[], None]]:
    """``shared`` and ``repeated``: forward and backward of the same responses' weighted log-probs, by name."""
    device, draw = model.device, torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompts, responses = [p for p, _ in groups], [r for _, rs in groups for r in rs]
    prompt_ids = list(torch.randint(1, vocab, (sum(prompts),), generator=draw).split(prompts))
    response_ids = list(torch.randint(1, vocab, (sum(responses),), generator=draw).split(responses))
    owner = [p for p, (_, rs) in enumerate(groups) for _ in rs]
    target, weight = torch.cat(response_ids).to(device), torch.randn(sum(responses), generator=draw).to(device)

    starts = _cumulative(prompts + responses)
    layout = share(starts, _cumulative(prompts), _cumulative([sum(rs) for _, rs in groups]), device)
    positions = [torch.arange(p) for p in prompts]
    positions += [torch.arange(prompts[g], prompts[g] + r) for g, r in zip(owner, responses, strict=True)]
    index = [
        torch.cat([starts[g + 1 : g + 2] - 1, torch.arange(at, at + r - 1)])
        for g, at, r in zip(owner, starts[len(prompts) :].tolist(), responses, strict=False)
    ]
    lengths = [prompts[g] + r for g, r in zip(owner, responses, strict=True)]
    ends = _cumulative(lengths)[1:].tolist()
    rows = {
        "shared": (prompt_ids + response_ids, positions, index, attention.shared_arguments(layout)),
        "repeated": (
            [x for g, ids in zip(owner, response_ids, strict=True) for x in (prompt_ids[g], ids)],
            [torch.arange(n) for n in lengths],
            [torch.arange(end - r - 1, end - 1) for end, r in zip(ends, responses, strict=True)],
            attention.packed_arguments(_cumulative(lengths).int().to(device), max(lengths)),
        ),
    }

    def update(ids: Tensor, positions: Tensor, index: Tensor, arguments: dict[str, Any]) -> None:
        model.zero_grad()
        states = model.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments
        ).last_hidden_state[0]
        head = model.get_output_embeddings().weight
        (weight * linear_logprob(states.index_select(0, index), head, target)).sum().backward()

    def bind(row: tuple[list[Tensor], list[Tensor], list[Tensor], dict[str, Any]]) -> Callable[[], None]:
        *tensors, arguments = row
        ids, positions, index = (torch.cat(x).to(device) for x in tensors)
        return lambda: update(ids, positions, index, arguments)

    return {name: bind(row) for name, row in rows.items()}


def measure(name: str, model: PreTrainedModel, groups: Groups, rounds: int, seconds: float | None = None) -> list[Row]:
    """The rows of one case: times of both, their ratio round by round, the prediction, and the gradients' distance.

    No round begins after so many seconds.
    """
    impls = updates(model, groups)
    gradients = []
    for impl in impls.values():
        impl()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    device = model.device.type
    clock: record.Clock = "cuda" if device == "cuda" else "cpu"
    samples = record.interleaved(impls, rounds=rounds, clock=clock, seconds=seconds, warm=False)
    ratios = [b / a for a, b in zip(samples["shared"], samples["repeated"], strict=True)]
    what = saving(groups, shape_of(model), RATES[device])
    tokens = {"repeated": what.tokens_unshared, "shared": what.tokens_unshared - what.tokens_saved}
    return [
        *record.timing_rows(name, samples),
        *record.timing_rows(name, {"shared": ratios}, "speedup", "x repeated"),
        *record.timing_rows(name, {"shared": [what.speedup]}, "predicted speedup", "x repeated"),
        *record.timing_rows(name, {"shared": [apart]}, "gradient distance", "of repeated"),
        *record.timing_rows(name, {k: [float(v)] for k, v in tokens.items()}, "tokens", "tokens"),
    ]


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def pick(cases: list[Case]) -> Callable[[str], list[str]]:
    """An argparse type: keys of cases, from their names, parts of them, or numbers from 0."""
    keys = [case.key for case in cases]
    by_name = record.pick(keys)

    def chosen(text: str) -> list[str]:
        numbers = {str(i): key for i, key in enumerate(keys)}
        return by_name(",".join(numbers.get(part, part) for part in text.split(",")))

    return chosen


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CASES[device]
    names = ", ".join(case.key for case in cases)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=pick(cases), action="extend", metavar="NAMES", help=f"of {names}; or numbers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, help="no round begins after so many, a case")
    parser.add_argument("--output", type=Path, help="folder for the JSON")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be 1 or more")
    folder = given.output or (None if given.case else RESULTS)
    attention.register()
    rows: list[Row] = []
    for case in cases:
        if given.case and case.key not in given.case:
            continue
        found = measure(str(case), case.model(device), case.groups(), given.rounds, given.seconds)
        rows += found
        if folder:  # what is measured stays, whatever happens to the next case
            record.write("shared_prompt", rows, folder / f"{device}.json")
        for row in found:
            print(f"{row['case']:60} {row['impl']:9} {row['metric']:18} {row['median']:.4g} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
