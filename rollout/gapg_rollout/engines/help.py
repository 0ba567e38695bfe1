"""`HelpControl` inside an engine: where the help phrase can begin, what must follow it, and how near it came.

It looks at nothing but the tokens so far, so rows may be reordered, dropped and computed again, each in its order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gapg_rollout.records import Sampling


class HelpSteering:
    """The state of R responses of at most T new tokens.

    `margin_RT` is (best deciding token's logit - best other logit) where the phrase could begin, -inf elsewhere, and
    `log_odds_RT` the log-odds of a deciding token there, at the sampling temperature.
    `look_back`: how many of the last tokens tell where the phrase stands.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], each: int, device: torch.device | str
    ) -> None:
        """prompts: in tokens, of `each` responses, which are `each` rows. Raises ValueError without a HelpControl."""
        control, rows, max_new_tokens = sampling.help, len(prompts) * each, sampling.max_new_tokens
        if control is None:
            raise ValueError("sampling.help is None: there is nothing to steer")
        self.control = control
        self.temperature = sampling.temperature or 1.0  # greedy log-probs are those at temperature 1
        self._spellings = control.by_prefix
        tokens = sorted({s.token_id for s in self._spellings})
        self._token_K = torch.tensor(tokens, device=device)
        self._of_token = [[i for i, s in enumerate(self._spellings) if s.token_id == token] for token in tokens]
        phrases = [(*s.prefix_ids, s.token_id, *s.rest_ids) for s in self._spellings]
        self.look_back = max(*map(len, phrases), 2 if control.blocks else 1) - 1
        begun = [
            (phrase[:n], phrase[n])
            for s, phrase in zip(self._spellings, phrases, strict=True)
            for n in range(len(s.prefix_ids) + 1, len(phrase))
        ]
        self._prefix_SL = self._pattern([s.prefix_ids for s in self._spellings], device)
        self._begun_PL = self._pattern([part for part, _ in begun], device)
        self._next_P = torch.tensor([-1, *(token for _, token in begun)], device=device)  # after a first for no match
        self.margin_RT = torch.full((rows, max_new_tokens), -torch.inf, device=device)
        self.log_odds_RT = torch.full_like(self.margin_RT, -torch.inf)
        if control.blocks:
            self._open_K, self._close_K = torch.tensor(control.blocks, device=device).T
            # [r, t]: what closes the think block in which row r said its token t - 1, -1 for none
            self._block_RT = torch.full((rows, max_new_tokens + 1), -1, device=device)
            first = torch.tensor([control.block_after(prompt, sampling.thinking) for prompt in prompts], device=device)
            self._block_RT[:, 0] = first.repeat_interleave(each)

    def look(
        self,
        scores_BV: torch.Tensor,
        divisor: float,
        row_B: torch.Tensor,
        step_B: torch.Tensor | int,
        recent_BL: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, V] bool: this token begins the phrase here, [B] the token that a begun phrase needs, -1 for none).

        Records margin and log-odds at (row, step).

        Args:
            scores_BV: The logits divided by `divisor`, up to a constant of each row.
            recent_BL: The last L = `look_back` generated tokens, -1 where there are fewer.
        """
        forced_B = self._forced(recent_BL)
        could_BS = (forced_B < 0)[:, None]
        if self.control.blocks:
            outside_B = self._block(row_B, step_B, recent_BL[:, -1]) < 0
            forced_B, could_BS = torch.where(outside_B, forced_B, -1), could_BS & outside_B[:, None]
        fits_BS = self._ends_with(self._prefix_SL, recent_BL) & could_BS
        fits_BK = torch.stack([fits_BS[:, of_token].any(1) for of_token in self._of_token], 1)
        deciding_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
        deciding_BV[:, self._token_K] = fits_BK
        helps_BK = scores_BV[:, self._token_K].where(fits_BK, -torch.inf)
        others_BV = scores_BV.masked_fill(deciding_BV, -torch.inf)
        self.margin_RT[row_B, step_B] = (helps_BK.amax(-1) - others_BV.amax(-1)) * divisor
        scale = self.temperature / divisor
        if scale != 1:
            helps_BK, others_BV = helps_BK / scale, others_BV / scale
        self.log_odds_RT[row_B, step_B] = helps_BK.logsumexp(-1) - others_BV.logsumexp(-1)
        return deciding_BV, forced_B

    def _block(self, row_B: torch.Tensor, step_B: torch.Tensor | int, last_B: torch.Tensor) -> torch.Tensor:
        """[B] what closes the think block of what is said now, -1 for none; last_B: the token before, -1 for none."""
        block_B = self._block_RT[row_B, step_B]
        opened_B = torch.where(last_B[:, None] == self._open_K, self._close_K, -1).amax(1)
        next_B = torch.where(block_B >= 0, torch.where(last_B == block_B, -1, block_B), opened_B)
        self._block_RT[row_B, step_B + 1] = next_B
        return next_B

    def _forced(self, recent_BL: torch.Tensor) -> torch.Tensor:
        """[B] the token that a begun phrase needs, -1 for none."""
        if not len(self._begun_PL):  # phrases of one token
            return torch.full((len(recent_BL),), -1, device=recent_BL.device)
        begun_BP = self._ends_with(self._begun_PL, recent_BL)
        order_P = torch.arange(1, len(self._next_P), device=begun_BP.device)
        # the last that matches is that of the longest prefix; 0: none does
        latest_B = (begun_BP * order_P).amax(1)
        return self._next_P[latest_B]

    def decides(self, token_ids: tuple[int, ...], t: int) -> bool:
        """Whether token t begins the phrase in some spelling, if the phrase could begin there."""
        return any(
            token_ids[t] == s.token_id and token_ids[: t + 1][-len(s.prefix_ids) - 1 : -1] == s.prefix_ids
            for s in self._spellings
        )

    def recorded(self, rows: slice, lengths: list[int]) -> list[tuple[float, tuple[float, ...]]]:
        """(help margin, help log-odds) of these rows, whose responses have these lengths."""
        best, odds = self.margin_RT[rows].cummax(1).values.tolist(), self.log_odds_RT[rows].tolist()
        columns = zip(best, odds, lengths, strict=True)
        return [(margins[n - 1], tuple(x for x in row[:n] if x > -torch.inf)) for margins, row, n in columns]

    def _pattern(self, endings: list[tuple[int, ...]], device: torch.device | str) -> torch.Tensor:
        """[P, L] the endings, filled up at the left with -2, which stands for any token."""
        filled = [[*[-2] * (self.look_back - len(ids)), *ids] for ids in endings]
        return torch.tensor(filled, dtype=torch.long, device=device).view(len(endings), self.look_back)

    @staticmethod
    def _ends_with(pattern_PL: torch.Tensor, recent_BL: torch.Tensor) -> torch.Tensor:
        """[B, P] which tokens so far end in which pattern."""
        return ((recent_BL[:, None] == pattern_PL) | (pattern_PL == -2)).all(-1)
