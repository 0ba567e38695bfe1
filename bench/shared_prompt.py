"""One prompt for all its responses against the prompt repeated for each: forward and backward of a decoder, in one run.

    OMP_NUM_THREADS=1 python bench/shared_prompt.py     # small models on a CPU, eight of 1.5B's layers on a GPU
    python bench/shared_prompt.py --case P1024-R256 --seconds 20

Beside the times (by device events, on a CPU in processor time) each case has the round-by-round ratio, what
`gapg.batches.sharing` predicts for it, and how far the two runs' gradients lie apart: both are float32 on a CPU and
bfloat16 on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import record
from gapg.batches.batching import Example, PackedBatch, one_batch
from gapg.batches.sharing import RATES, saving, shape_of
from gapg.model import attention
from gapg.model.policy import response_logprobs
from record import Row

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
    "cuda": [Case(4, 1024, 256, varied=True, **QWEN_1_5B), Case(4, 256, 720, varied=True, **QWEN_1_5B)],
}


def updates(model: PreTrainedModel, groups: Groups) -> dict[str, Callable[[], None]]:
    """``shared`` and ``repeated``: forward and backward of the same responses' weighted log-probs, by name."""
    draw = random.Random(0)
    vocab = model.config.get_text_config().vocab_size

    def ids(count: int) -> list[int]:
        return [draw.randrange(1, vocab) for _ in range(count)]

    examples = []
    for group, (prompt, responses) in enumerate(groups):
        prompt_ids = ids(prompt)
        examples += [Example(prompt_ids, ids(length), draw.gauss(0, 1), group=group) for length in responses]

    def update(batch: PackedBatch) -> None:
        model.zero_grad()
        (batch.weight * response_logprobs(model, batch, compute=model.dtype)).sum().backward()

    ways = {"shared": True, "repeated": False}
    return {name: partial(update, one_batch(examples, model.device, share=share)) for name, share in ways.items()}


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


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {case.key: case for case in CASES[device]}
    parser = record.parser(__doc__, "shared_prompt")
    pick, names = record.pick(cases), f"of {', '.join(cases)}"
    parser.add_argument("--case", type=pick, action="extend", metavar="NAMES", help=names)
    parser.add_argument("--rounds", type=record.positive, default=9)
    parser.add_argument("--seconds", type=float, help="no round begins after so many, a case")
    given = parser.parse_args()
    attention.register()
    rows: list[Row] = []
    for key, case in cases.items():
        if given.case and key not in given.case:
            continue
        found = measure(str(case), case.model(device), case.groups(), given.rounds, given.seconds)
        rows += found
        record.write("shared_prompt", rows, given.output / f"{device}.json")  # stays, whatever happens to the next case
        for row in found:
            print(f"{row['case']:60} {row['impl']:9} {row['metric']:18} {row['median']:.4g} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
