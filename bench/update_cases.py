"""What `bench/update_step.py` counts and times: models and batches of prompts and responses, by the names of cases."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig, load_config
from gapg.marginal_loss import Masked
from gapg.update import with_gradient
from gapg_kernels.policy_loss import group_advantages
from peers import updates
from update_step_report import MARGINAL, OURS

SETTINGS = ("pack", "response_positions", "skip_zero_advantage", "share_prompts")
IMPLS = (*OURS, *MARGINAL, *updates.PEERS)
PLACES = dict(zip(MARGINAL, (2, math.inf), strict=True))
"""In each response; where a tokenizer writes the phrase in several tokens, it can begin at few."""
HELP = 0
"""The token that begins the phrase, which no response holds."""

VOCAB = 151_936
QWEN = {
    name: Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )
    for name, hidden, inner, layers, heads in (
        ("0.5B", 896, 4864, 24, 14), ("1.5B", 1536, 8960, 28, 12), ("3B", 2048, 11_008, 36, 16),
    )
}  # fmt: skip
TOY = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`prompts` groups of `samples` responses of lognormal lengths; `equal`: the part whose rewards are all equal."""

    name: str
    model: PreTrainedConfig
    prompt: int
    equal: float
    prompts: int = 32
    samples: int = 8
    response: int = 256
    token_cap: int = 16_384

    def __str__(self) -> str:
        shape = f"{self.prompts} x P={self.prompt} mean R={self.response} G={self.samples}"
        return f"{self.name}, {shape}, {self.equal:.0%} all equal"

    @property
    def key(self) -> str:
        """What `--case` calls it."""
        return f"{self.name}-P{self.prompt}-{100 * self.equal:.0f}"

    @property
    def data(self) -> tuple[list[Example], Tensor]:
        """All responses, and their rewards [prompts, samples]."""
        return _draw(self.model.vocab_size, self.prompts, self.prompt, self.samples, self.response, self.equal)

    @property
    def given(self) -> int:
        """Tokens, a prompt counted once a response."""
        return sum(map(len, self.data[0]))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.data[0]))

    def config(self, name: str, dtype: str = "bfloat16") -> RunConfig:
        """Of a run whose updates are this one, by that implementation of ours."""
        savings = OURS.index(name) if name in OURS else len(SETTINGS)
        on = [i < savings for i in range(len(SETTINGS))]
        values = [str(x).lower() for x in on[:3]] + ["always" if on[3] else "never"]
        given = {f"update.{name}": value for name, value in zip(SETTINGS, values, strict=True)}
        given |= {"token_cap": str(self.token_cap), "model.dtype": dtype}
        given |= {"method": "marginal"} if name in MARGINAL else {}
        given |= {"optim.lr": str(updates.LR), "optim.warmup_steps": "0"}
        sizes = {"prompts_per_step": self.prompts, "samples_per_prompt": self.samples}
        sizes |= {"max_prompt_tokens": self.prompt, "max_new_tokens": self.longest - self.prompt}
        return load_config("quickstart", given | {f"rollout.{name}": str(size) for name, size in sizes.items()})

    def masked(self, name: str) -> tuple[list[Example], Masked]:
        """The responses as sampled with help forbidden, for the marginal estimator; the engine told no hazards."""
        examples, table = self.data
        places = PLACES[name]
        asked = [replace(e, deciding=_spread(len(e.response_ids), places)) for e in examples]
        return asked, Masked(torch.ones(len(table)), torch.full_like(table, torch.nan))

    def batches(self, name: str) -> list[PackedBatch]:
        """As `policy_update` makes them for that implementation, on the CPU."""
        config, (examples, table) = self.config(name), self.data
        chosen = self.masked(name)[0] if name in MARGINAL else with_gradient(config, examples, table)
        return packed_batches(
            chosen, config.token_cap, torch.device("cpu"), share=config.update.share_prompts == "always",
            padded=config.update.pack is False, every_position=not config.update.response_positions,
        )  # fmt: skip

    def padded(self, sequences: int = updates.MICRO_BATCH) -> list[updates.Padded]:
        """A peer's micro-batches of so many sequences, on the CPU."""
        examples, table = self.data
        advantages = group_advantages(table)
        weights = [float(advantages[e.group, e.sample]) for e in examples]
        return list(updates.padded(examples, weights, float(table.numel()), sequences))


def _spread(tokens: int, places: float) -> list[tuple[int, ...]]:
    """Which tokens could begin the phrase at each of a response's tokens: one, at so many places evenly apart."""
    if places >= tokens:
        return [(HELP,)] * tokens
    at = {int(tokens * i // (places + 1)) for i in range(1, int(places) + 1)}
    return [(HELP,) if t in at else () for t in range(tokens)]


@lru_cache(maxsize=4)
def _draw(
    vocab: int, prompts: int, prompt_tokens: int, samples: int, response: int, equal: float
) -> tuple[list[Example], Tensor]:
    draw, sigma = random.Random(0), 0.6
    table = torch.tensor([([0.0, 1.0] * samples)[:samples]] * prompts)
    table[: round(equal * prompts)] = 1.0
    examples = []
    for group in range(prompts):
        prompt = [draw.randrange(1, vocab) for _ in range(prompt_tokens)]
        for sample in range(samples):
            length = round(response * draw.lognormvariate(-(sigma**2) / 2, sigma))
            length = min(max(length, 1), 4 * response)
            ids = [draw.randrange(1, vocab) for _ in range(length)]
            examples.append(Example(prompt, ids, rollout_logprobs=[-1.0] * length, group=group, sample=sample))
    return examples, table


REAL = [Case(name, QWEN[name], p, equal) for name in QWEN for p in (256, 1024) for equal in (0.0, 0.3)]
SMALL = [Case("toy", TOY, p, equal, prompts=4, response=64, token_cap=2048) for p in (64, 128) for equal in (0.0, 0.5)]
CASES = {case.key: case for case in (*REAL, *SMALL)}


def own_case(shape: tuple[int, int, int], device: str) -> Case:
    """Of prompt tokens, mean response tokens and samples a prompt: at 1.5B on CUDA, else of the toy."""
    prompt, response, samples = shape
    like = CASES["toy-P64-0" if device == "cpu" else "1.5B-P1024-30"]
    cap = max(like.token_cap, prompt + 4 * response)
    return replace(like, prompt=prompt, response=response, samples=samples, equal=0.3, token_cap=cap)


def parse_shape(text: str) -> tuple[int, int, int]:
    """P,R,G of the command line. Raises argparse.ArgumentTypeError."""
    try:
        prompt, response, samples = map(int, text.split(","))
    except ValueError:
        prompt = response = samples = 0
    if prompt < 1 or response < 1 or samples < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give P,R,G, tokens of a prompt and of a mean response and two samples or more, as in 1024,256,8"
        )
    return prompt, response, samples
