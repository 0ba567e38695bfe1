"""What the type of the parameters changes in an update, and how long responses may be: counted and planned, not timed.

    OMP_NUM_THREADS=1 python bench/update_plan.py     # plan.json

`a layer` rows: one decoder layer's forward and backward on tensors without data, CUDA's route, under autocast to
bfloat16, in a packed micro-batch of 16,384 tokens. Counted are the operators that are neither a product nor attention
(norms, residuals, rotary embeddings, the gate, casts of weights and gradients, sums of gradients) and the bytes that
they read and write; each operator is a launch where nothing fuses them. A count predicts no time.

`responses` rows: the memory plan of a run (`gapg.model.memory_plan`, whose tests hold it to what allocators saw) with
prompts of up to 1,024 tokens: its total in micro-batches of one sequence, and the largest token cap in 80 GB.
"""

from __future__ import annotations

from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import record
import update_count
from gapg.batches.batching import Example, packed_batches
from gapg.config import load_config
from gapg.errors import ConfigError
from gapg.model import attention
from gapg.model.memory import fitting_token_cap
from gapg.model.memory_plan import plan_memory
from gapg.model.precision import round_parameters
from gapg_kernels import flash
from record import Row
from update_cases import QWEN

Parameters = Literal["float32", "bfloat16"]

CAPACITY = 80 * 10**9
SEQUENCES, LENGTH = 16, 1024
PROMPT = 1024
RESPONSES = (8192, 16_384, 32_768)
CHECKPOINTED = {"model.gradient_checkpointing": "true"}
ROUNDED = CHECKPOINTED | {"model.parameters": "bfloat16"}
SETTINGS = {
    "activations kept": {},
    "checkpointed": CHECKPOINTED,
    "checkpointed, bfloat16 parameters": ROUNDED,
    "checkpointed, bfloat16 parameters, offloaded": ROUNDED | {"optim.offload": "true"},
}

_PRODUCTS = ("mm", "bmm", "attention", "gapg")
"""Parts of the names of operators that are not elementwise."""


def layer_rows(name: str, shape: Qwen2Config) -> list[Row]:
    rows: list[Row] = []
    both: tuple[Parameters, ...] = ("float32", "bfloat16")
    for parameters in both:
        one, two = (_count(shape, layers, parameters) for layers in (1, 2))
        for metric, unit, a, b in zip(("operators", "bytes moved"), ("operators", "B"), one, two, strict=True):
            found = {f"{parameters} parameters": [float(b - a)]}
            rows += record.timing_rows(f"{name}, a layer, {SEQUENCES * LENGTH} tokens", found, metric, unit)
    return rows


def _count(shape: Qwen2Config, layers: int, parameters: Parameters) -> tuple[int, int]:
    """(operators, bytes) of a micro-batch that adds to the gradients of another, through so many layers."""
    shape = Qwen2Config(**{**shape.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    (batch,) = packed_batches([Example([0], [0] * (LENGTH - 1))] * SEQUENCES, SEQUENCES * LENGTH, torch.device("cpu"))
    with mock.patch.object(flash, "has_flash", lambda device: True), FakeTensorMode() as fakes:
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention.NAME, dtype=torch.float32).train()
        if parameters == "bfloat16":
            round_parameters(model)
        for p in model.parameters():
            p.grad = torch.empty_like(p, dtype=torch.float32)
        fake = update_count.faked(batch, fakes.from_tensor)
        with _Traffic() as traffic:
            update_count.loss_of_ours(model, fake).backward()
    return traffic.operators, traffic.bytes


class _Traffic(TorchDispatchMode):
    """Counts operators that are no product and make no mere view, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        writes = func._schema.is_mutable or not {_storage(x) for x in outputs} <= {_storage(x) for x in inputs}
        name = str(func)
        if writes and not any(part in name for part in (*_PRODUCTS, "empty")):
            self.operators += 1
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*inputs, *outputs))
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def plan_rows(name: str, shape: Qwen2Config) -> list[Row]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention.NAME, dtype=torch.float32)
    rows: list[Row] = []
    for response in RESPONSES:
        case = f"{name}, responses of {response} tokens"
        for setting, given in SETTINGS.items():
            sizes = {"max_prompt_tokens": PROMPT, "max_new_tokens": response, "prompts_per_step": 32}
            base = {"model.dtype": "bfloat16", "token_cap": str(PROMPT + response)}
            config = load_config("quickstart", base | {f"rollout.{k}": str(v) for k, v in sizes.items()} | given)
            plan = plan_memory(model.train(), config, torch.device("cuda"), CAPACITY)
            rows += record.timing_rows(case, {setting: [float(plan.total)]}, "memory plan", "B")
            try:
                cap = fitting_token_cap(model, config, torch.device("cuda"), CAPACITY)
            except ConfigError as error:
                rows.append(record.error_row(case, setting, error))
                continue
            rows += record.timing_rows(case, {setting: [float(cap)]}, "token cap in 80 GB", "tokens")
    return rows


def tables(rows: list[Row]) -> str:
    """Markdown: of layers, and of responses."""
    found = record.medians(rows)
    layers = [
        [case.partition(",")[0], impl, f"{found[case, impl, 'operators']:.0f}", f"{value / 2**30:.2f}"]
        for (case, impl, metric), value in found.items()
        if metric == "bytes moved"
    ]
    cases = list(record.by_case(rows, "memory plan"))
    plans = [[setting, *(_cell(found, case, setting) for case in cases)] for setting in SETTINGS if cases]
    head = ["", *(case.partition("responses of ")[2] for case in cases)]
    return "\n\n".join(
        (
            record.markdown(["a layer of", "", "operators", "GiB moved"], layers, right=(2, 3)),
            record.markdown(head, plans, right=range(1, len(head))),
        )
    )


def _cell(found: dict[tuple[str, str, str], float], case: str, setting: str) -> str:
    cap = found.get((case, setting, "token cap in 80 GB"))
    return f"{found[case, setting, 'memory plan'] / 1e9:.1f} GB, " + ("does not fit" if cap is None else f"{cap:.0f}")


def main() -> None:
    given = record.parser(__doc__, "update_step").parse_args()
    attention.register()
    shape = QWEN["1.5B"]
    rows = [*layer_rows("1.5B", shape), *plan_rows("1.5B", shape)]
    record.write("update_plan", rows, given.output / "plan.json")
    print(tables(rows))


if __name__ == "__main__":
    main()
