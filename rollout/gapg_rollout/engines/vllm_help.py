"""`HelpControl` inside vLLM: logits processors that steer the help phrase and record how near it came.

Import this module only where vLLM is installed. vLLM has two model runners, with an interface each: version 2 needs
Triton for its device, version 1 serves the rest (CPUs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from gapg_rollout.engines.help import HelpSteering
from gapg_rollout.records import Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ARGUMENT = "gapg_help_row"
"""The extra argument of a request that is steered: its row in `HelpTrace`."""


class HelpTrace:
    """What one `generate` call asks of the processor, and what it records of its R requests of at most T new tokens.

    `shift_RT` turns the log-prob that vLLM reports into the one before the bias: that of a forced token is replaced,
    any other is shifted (and a biased deciding token's is lowered by the bias too).
    """

    current: HelpTrace | None = None
    """The open call's trace: vLLM builds the processor itself, so this is how the two meet. One call at a time."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], each: int, device: str) -> None:
        self.steering = HelpSteering(sampling, prompts, each, device)
        self.shift_RT = torch.zeros_like(self.steering.margin_RT)

    def finish(
        self, row: int, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """(log-probs before the bias, help margin, help log-odds) of a finished request."""
        length, steering = len(token_ids), self.steering
        bias = steering.control.bias / steering.temperature
        could_begin = (steering.margin_RT[row, :length] > -math.inf).tolist()
        biased = [
            bias if math.isfinite(bias) and could_begin[t] and steering.decides(token_ids, t) else 0.0
            for t in range(length)
        ]
        shifts = self.shift_RT[row, :length].tolist()
        ((margin, log_odds),) = steering.recorded(slice(row, row + 1), [length])
        return tuple(lp + s - b for lp, s, b in zip(logprobs, shifts, biased, strict=True)), margin, log_odds

    def steer(
        self, logits_BV: torch.Tensor, row_B: torch.Tensor, step_B: torch.Tensor, recent_BL: torch.Tensor
    ) -> torch.Tensor:
        """The logits with the bias, or with nothing but a forced token. Records at (row, step); see `HelpSteering`."""
        bias, temperature = self.steering.control.bias, self.steering.temperature
        deciding_BV, forced_B = self.steering.look(logits_BV, 1.0, row_B, step_B, recent_BL)
        if bias == math.inf:
            likeliest_B = logits_BV.where(deciding_BV, -torch.inf).argmax(-1)
            forced_B = torch.where(deciding_BV.any(-1), likeliest_B, forced_B)
            bias = 0.0

        before_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
        choice_B1 = forced_B.clamp(min=0)[:, None]
        forced_logp_B = before_BV.gather(1, choice_B1).squeeze(1)
        # the normaliser was 0 before the bias
        log_normaliser_B = torch.where(deciding_BV, before_BV + bias / temperature, before_BV).logsumexp(-1)
        self.shift_RT[row_B, step_B] = torch.where(forced_B >= 0, forced_logp_B, log_normaliser_B)

        steered_BV = torch.where(deciding_BV, logits_BV + bias, logits_BV)
        only_BV = torch.full_like(logits_BV, -torch.inf).scatter_(1, choice_B1, 0.0)
        return torch.where(forced_B[:, None] >= 0, only_BV, steered_BV)


def _row(params: SamplingParams) -> int:
    return int((params.extra_args or {}).get(ARGUMENT, -1))


class HelpProcessor(LogitsProcessor):
    """For the first model runner, which hands over each request's list of generated tokens."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[int, list[int]]] = {}  # batch index -> (row, generated tokens)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self._requests,
            batch_update,
            lambda params, _, generated: (_row(params), generated) if _row(params) >= 0 else None,
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        trace = HelpTrace.current
        if trace is None or not self._requests:
            return logits
        length = trace.steering.look_back
        index, (rows, generated) = list(self._requests), zip(*self._requests.values(), strict=True)
        recent = [[*[-1] * (length - len(g)), *g[max(0, len(g) - length) :]] for g in generated]
        index_B = torch.tensor(index, device=logits.device)
        row_B = torch.tensor(rows, device=logits.device)
        step_B = torch.tensor([len(g) for g in generated], device=logits.device)
        recent_BL = torch.tensor(recent, dtype=torch.long, device=logits.device).view(len(index), length)
        logits[index_B] = trace.steer(logits[index_B], row_B, step_B, recent_BL)
        return logits


class HelpProcessorV2(LogitsProcessorV2):
    """For the second model runner, which keeps all tokens on the device."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._states = req_states
        self._row_of_slot = np.full(req_states.max_num_reqs, -1, dtype=np.int64)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._row_of_slot[req_idx] = _row(sampling_params)
        return bool(self._row_of_slot[req_idx] >= 0)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        rows = self._row_of_slot[ctx.idx_mapping_np]
        trace = HelpTrace.current
        if trace is None or not (rows >= 0).any():
            return logits
        row_B = torch.from_numpy(rows).to(logits.device, non_blocking=True)
        slot_B = ctx.expanded_idx_mapping.long()
        end_B = ctx.pos.long() + 1  # tokens before the one to be sampled
        step_B = end_B - self._states.prompt_len.gpu[slot_B].long()
        # A row whose prompt is still being read samples nothing that is kept; one past the end is discarded too.
        wanted_B = (row_B >= 0) & (step_B >= 0) & (step_B < trace.shift_RT.shape[1])
        index_B = wanted_B.nonzero().squeeze(1)
        row_B, slot_B, end_B, step_B = (x[index_B] for x in (row_B, slot_B, end_B, step_B))
        back_L = torch.arange(-trace.steering.look_back, 0, device=logits.device)
        tokens_BL = self._states.all_token_ids.gpu[slot_B[:, None], (end_B[:, None] + back_L).clamp(min=0)].long()
        recent_BL = torch.where(step_B[:, None] + back_L >= 0, tokens_BL, -1)
        logits[index_B] = trace.steer(logits[index_B], row_B, step_B, recent_BL)
        return logits


def help_processor_class() -> type[HelpProcessor] | type[HelpProcessorV2]:
    """The processor for the model runner that vLLM will choose."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    return HelpProcessorV2 if (HAS_TRITON if chosen is None else chosen) else HelpProcessor
