"""Loss and backward of TRL's GRPOTrainer on one batch, as it comes and with `gapg.integrations.trl`, in one run.

    OMP_NUM_THREADS=1 python bench/trl_step.py     # a small model on a CPU, eight of 1.5B's layers on a GPU
    python bench/trl_step.py --case varied --rounds 3 --seconds 60

All are trainers of one model, and are timed in turn: TRL's own, then each switch added (`pack`, `skip_zero_advantage`).
Time is by device events, on a CPU in processor time. Peak memory is what a call has alive beyond the weights, its
gradients included. The distance is that of its gradient from TRL's, relative to the norm.

TRL 1.16 makes no [B, T, V] logits either: its head goes through the vocabulary in tiles. On CUDA it scores completions
alone, as ours does; without Triton, as on a CPU, it scores every position, prompts and padding too, so a CPU's figures
hold that difference besides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import heads
import record
from gapg.integrations.trl import FusedLogprobs
from gapg.tasks.countdown import Countdown
from record import Row

STOCK = "TRL"
SWITCHES: dict[str, dict[str, bool]] = {
    "fused": {},
    "fused, packed": {"pack": True},
    "fused, packed, skipping": {"pack": True, "skip_zero_advantage": True},
}
"""Of ours, by name."""


@dataclass(frozen=True)
class Case:
    """``varied``: prompts and completions from a quarter to all of their width; every second advantage is 0."""

    rows: int
    prompt: int
    completion: int
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    varied: bool

    @property
    def key(self) -> str:
        """What `--case` calls it."""
        return "varied" if self.varied else "equal"

    def __str__(self) -> str:
        spread = "varied lengths, half the advantages 0" if self.varied else "equal lengths, no advantage 0"
        size = f"{self.rows} x ({self.prompt} + {self.completion}), hidden {self.hidden}, {self.layers} layers"
        return f"{size}, V={self.vocab}, {spread}"

    def model(self, device: str) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).train()

    def batch(self, device: str) -> dict[str, Any]:
        """As TRL makes it: prompts padded on the left, completions on the right."""
        draw = torch.Generator().manual_seed(0)

        def ids(width: int) -> Tensor:
            return torch.randint(2, self.vocab, (self.rows, width), generator=draw)

        def lengths(width: int) -> Tensor:
            low = width // 4 if self.varied else width
            return torch.randint(low, width + 1, (self.rows, 1), generator=draw)

        advantages = torch.randn(self.rows, generator=draw)
        if self.varied:
            advantages[::2] = 0
        answered = (torch.arange(self.completion) < lengths(self.completion)).long()
        made = {
            "prompt_ids": ids(self.prompt),
            "prompt_mask": (torch.arange(self.prompt) >= self.prompt - lengths(self.prompt)).long(),
            "completion_ids": ids(self.completion),
            "completion_mask": answered,
            "advantages": advantages,
            "num_items_in_batch": answered.sum(),
        }
        return {name: x.to(device) for name, x in made.items()}


CASES = {
    "cpu": [Case(16, 32, 96, 32_768, 256, 768, 2, 4, varied) for varied in (False, True)],
    "cuda": [Case(16, 512, 1_536, 151_936, 1_536, 8_960, 8, 12, varied) for varied in (False, True)],
}

Step = Callable[[], float]


def steps(case: Case, device: str) -> tuple[PreTrainedModel, dict[str, Step]]:
    """The model, and one call of loss and backward by each trainer, which gives the loss."""
    model, inputs = case.model(device), case.batch(device)
    tokenizer = Countdown(max_number=8, max_target=30).tokenizer()
    made: dict[str, Step] = {}
    kinds: dict[str, tuple[Any, dict[str, bool]]] = {STOCK: (GRPOTrainer, {})}
    kinds |= {name: (FusedLogprobs, switches) for name, switches in SWITCHES.items()}
    for name, (kind, switches) in kinds.items():
        model.__dict__.pop("forward", None)  # the head of the trainer before
        with tempfile.TemporaryDirectory() as folder:
            trainer = kind(
                model=model,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=GRPOConfig(
                    output_dir=folder, per_device_train_batch_size=case.rows, num_generations=4, report_to=[],
                    use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
                ),
                train_dataset=Dataset.from_list([{"prompt": "1"}] * case.rows),
                processing_class=tokenizer,
                **switches,
            )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        made[name] = _step(trainer, model, model.forward, inputs)
    return model, made


def _step(trainer: GRPOTrainer, model: PreTrainedModel, forward: Any, inputs: dict[str, Any]) -> Step:
    def step() -> float:
        model.forward = forward
        model.zero_grad()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        return float(loss.detach())

    return step


def measure(case: Case, device: str, rounds: int, seconds: float | None = None) -> list[Row]:
    """The rows of one case: time, peak memory, the gradient's distance from TRL's, tokens through the model."""
    model, made = steps(case, device)
    counted: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
    apart, peaks, tokens, stock = {}, {}, {}, torch.empty(0)
    for name, step in made.items():
        step()
        tokens[name] = [float(counted.pop())]
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        stock = gradient if name == STOCK else stock
        apart[name] = [float((gradient - stock).norm() / stock.norm())]
        del gradient
        model.zero_grad()
        peaks[name] = [float(heads.peak_bytes(step))]
    hook.remove()
    clock: record.Clock = "cuda" if device == "cuda" else "cpu"
    samples = record.interleaved(made, rounds=rounds, clock=clock, seconds=seconds, warm=False)
    return [
        *record.timing_rows(str(case), samples),
        *record.timing_rows(str(case), peaks, "peak memory", "B"),
        *record.timing_rows(str(case), apart, "gradient distance", "of TRL's"),
        *record.timing_rows(str(case), tokens, "tokens", "tokens"),
    ]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {case.key: case for case in CASES[device]}
    parser = record.parser(__doc__, "trl")
    pick, names = record.pick(cases), f"of {', '.join(cases)}"
    parser.add_argument("--case", type=pick, action="extend", metavar="NAMES", help=names)
    parser.add_argument("--rounds", type=record.positive, default=7)
    parser.add_argument("--seconds", type=float, help="no round begins after so many, a case")
    given = parser.parse_args()
    rows: list[Row] = []
    for key, case in cases.items():
        if given.case and key not in given.case:
            continue
        found = measure(case, device, given.rounds, given.seconds)
        rows += found
        record.write("trl_step", rows, given.output / f"{device}.json")  # stays, whatever happens to the next case
        for row in found:
            print(f"{row['case']:90} {row['impl']:24} {row['metric']:18} {row['median']:.4g} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
