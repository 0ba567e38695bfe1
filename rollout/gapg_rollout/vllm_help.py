"""`HelpControl` inside vLLM: logits processors that steer the help phrase and record how near it came.

Import this module only where vLLM is installed. vLLM has two model runners, with an interface each: version 2 needs
Triton for its device, version 1 serves the rest (CPUs). Steering looks at nothing but the tokens so far, so preempted
and reordered requests are steered alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from gapg_rollout.records import HelpControl

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ARGUMENT = "gapg_help_row"
"""The extra argument of a request that is steered: its row in `HelpTrace`."""


class HelpTrace:
    """What one `generate` call asks of the processor, and what it records: all [R requests, T new tokens].

    `margin_RT` is (best deciding token's logit - best other logit) where the bias applied, -inf elsewhere, and
    `log_odds_RT` the log-odds of a deciding token there. `shift_RT` turns the log-prob that vLLM reports into the one
    before the bias: that of a forced token is replaced, any other is shifted (and a biased deciding token's is lowered
    by the bias too).
    """

    current: HelpTrace | None = None
    """The open call's trace: vLLM builds the processor itself, so this is how the two meet. One call at a time."""

    def __init__(
        self, control: HelpControl, temperature: float, requests: int, max_new_tokens: int, device: str
    ) -> None:
        self.control = control
        self.temperature = temperature or 1.0  # greedy log-probs are those at temperature 1
        self.spellings = control.by_prefix
        self.token_ids = sorted({s.token_id for s in self.spellings})
        self.token_S = torch.tensor([s.token_id for s in self.spellings], device=device)
        phrases = [(*s.prefix_ids, s.token_id, *s.rest_ids) for s in self.spellings]
        self.look_back = max(map(len, phrases)) - 1
        self._prefix_SL = self._pattern([s.prefix_ids for s in self.spellings], device)
        begun = [
            (phrase[:n], phrase[n])
            for s, phrase in zip(self.spellings, phrases, strict=True)
            for n in range(len(s.prefix_ids) + 1, len(phrase))
        ]
        self._begun_PL = self._pattern([part for part, _ in begun], device)
        self._next_P = torch.tensor([-1, *(token for _, token in begun)], device=device)  # after a first for no match
        self.margin_RT = torch.full((requests, max_new_tokens), -torch.inf, device=device)
        self.log_odds_RT = torch.full_like(self.margin_RT, -torch.inf)
        self.shift_RT = torch.zeros((requests, max_new_tokens), device=device)

    def finish(
        self, row: int, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """(log-probs before the bias, help margin, help log-odds) of a finished request."""
        margins = self.margin_RT[row, : len(token_ids)].tolist()
        shifts = self.shift_RT[row, : len(token_ids)].tolist()
        log_odds = self.log_odds_RT[row, : len(token_ids)].tolist()
        bias = self.control.bias / self.temperature
        biased = [
            bias if math.isfinite(bias) and margin > -math.inf and self._decides(token_ids, t) else 0.0
            for t, margin in enumerate(margins)
        ]
        before = tuple(lp + shift - b for lp, shift, b in zip(logprobs, shifts, biased, strict=True))
        return before, max(margins, default=-math.inf), tuple(x for x in log_odds if x > -math.inf)

    def _decides(self, token_ids: tuple[int, ...], t: int) -> bool:
        """Whether token t begins the phrase in some spelling."""
        return any(
            token_ids[t] == s.token_id and token_ids[: t + 1][-len(s.prefix_ids) - 1 : -1] == s.prefix_ids
            for s in self.spellings
        )

    def steer(
        self, logits_BV: torch.Tensor, row_B: torch.Tensor, step_B: torch.Tensor, recent_BL: torch.Tensor
    ) -> torch.Tensor:
        """The logits with the bias, or with nothing but a forced token. Records margin, odds and shift at (row, step).

        `recent_BL` holds the last L = `look_back` generated tokens, -1 where there are fewer.
        """
        bias, begun_BP = self.control.bias, self._ends_with(self._begun_PL, recent_BL)
        order_P = torch.arange(1, len(self._next_P), device=begun_BP.device)
        # the last that matches is that of the longest prefix; 0: none does
        forced_B = self._next_P[torch.cat([torch.zeros_like(row_B)[:, None], begun_BP * order_P], 1).amax(1)]
        fits_BS = self._ends_with(self._prefix_SL, recent_BL) & (forced_B < 0)[:, None]
        deciding_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for token_id in self.token_ids:
            deciding_BV[:, token_id] = fits_BS[:, self.token_S == token_id].any(1)
        helps_BV, others_BV = logits_BV.where(deciding_BV, -torch.inf), logits_BV.masked_fill(deciding_BV, -torch.inf)
        self.margin_RT[row_B, step_B] = helps_BV.amax(-1) - others_BV.amax(-1)
        odds_B = (helps_BV / self.temperature).logsumexp(-1) - (others_BV / self.temperature).logsumexp(-1)
        self.log_odds_RT[row_B, step_B] = odds_B
        if bias == math.inf:
            forced_B = torch.where(deciding_BV.any(-1), helps_BV.argmax(-1), forced_B)
            bias = 0.0

        before_BV = torch.log_softmax(logits_BV / self.temperature, dim=-1)
        choice_B1 = forced_B.clamp(min=0)[:, None]
        forced_logp_B = before_BV.gather(1, choice_B1).squeeze(1)
        # the normaliser was 0 before the bias
        log_normaliser_B = torch.where(deciding_BV, before_BV + bias / self.temperature, before_BV).logsumexp(-1)
        self.shift_RT[row_B, step_B] = torch.where(forced_B >= 0, forced_logp_B, log_normaliser_B)

        steered_BV = torch.where(deciding_BV, logits_BV + bias, logits_BV)
        only_BV = torch.full_like(logits_BV, -torch.inf).scatter_(1, choice_B1, 0.0)
        return torch.where(forced_B[:, None] >= 0, only_BV, steered_BV)

    def _pattern(self, endings: list[tuple[int, ...]], device: str) -> torch.Tensor:
        """[P, L] the endings, filled up at the left with -2, which stands for any token."""
        filled = [[*[-2] * (self.look_back - len(ids)), *ids] for ids in endings]
        return torch.tensor(filled, dtype=torch.long, device=device).view(len(endings), self.look_back)

    @staticmethod
    def _ends_with(pattern_PL: torch.Tensor, recent_BL: torch.Tensor) -> torch.Tensor:
        """[B, P] which tokens so far end in which pattern."""
        return ((recent_BL[:, None] == pattern_PL) | (pattern_PL == -2)).all(-1)


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
        length = trace.look_back
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
        wanted_B = (row_B >= 0) & (step_B >= 0) & (step_B < trace.margin_RT.shape[1])
        index_B = wanted_B.nonzero().squeeze(1)
        row_B, slot_B, end_B, step_B = (x[index_B] for x in (row_B, slot_B, end_B, step_B))
        back_L = torch.arange(-trace.look_back, 0, device=logits.device)
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
