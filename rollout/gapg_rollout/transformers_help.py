"""`HelpControl` inside the in-process engine: steers the help phrase and records how near each response came to it."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from gapg_rollout.records import HelpControl


class HelpSteering:
    """The state of one wave of R responses of at most T new tokens, for S spellings of prefixes of at most K tokens.

    `index` [B] picks the rows that still decode.
    """

    def __init__(self, control: HelpControl, rows: int, max_new_tokens: int, device: torch.device) -> None:
        self.bias, spellings = control.bias, control.by_prefix
        self.margin_R = torch.full((rows,), -torch.inf, device=device)
        self.log_odds_RT = torch.full((rows, max_new_tokens), -torch.inf, device=device)
        self.token_ids = sorted({s.token_id for s in spellings})
        self.token_S = torch.tensor([s.token_id for s in spellings], device=device)
        k = max(len(s.prefix_ids) for s in spellings)
        prefixes = [[*[-1] * (k - len(s.prefix_ids)), *s.prefix_ids] for s in spellings]  # -1 is any token
        self.prefix_SK = torch.tensor(prefixes, dtype=torch.long, device=device)
        longest = max(len(s.rest_ids) for s in spellings) + 1
        rests = [[*s.rest_ids, *[-1] * (longest - len(s.rest_ids))] for s in spellings]
        self.rest_SL = torch.tensor(rests, device=device)
        # the tokens of a begun phrase that are still to come, then -1
        self.forced_RL = torch.full((rows, longest), -1, dtype=torch.long, device=device)

    def fits(self, tokens_RT: torch.Tensor, index: torch.Tensor, step: int) -> torch.Tensor:
        """[B, S] bool: the prefix of this spelling stands, and no phrase is being written."""
        k = self.prefix_SK.shape[1]
        recent_BK = pad(tokens_RT[index, max(0, step - k) : step], (max(0, k - step), 0), value=-2)
        stands_BS = ((recent_BK[:, None] == self.prefix_SK) | (self.prefix_SK == -1)).all(-1)
        return stands_BS & (self.forced_RL[index, :1] < 0)

    def steer(
        self,
        logp_BV: torch.Tensor,
        temperature: float,
        fits_BS: torch.Tensor,
        index: torch.Tensor,
        step: int,
        unfinished: torch.Tensor,
    ) -> torch.Tensor:
        """Adds the bias where a spelling fits, and records how far the phrase was from being chosen."""
        deciding = torch.zeros_like(logp_BV, dtype=torch.bool)
        for token_id in self.token_ids:
            deciding[:, token_id] = fits_BS[:, self.token_S == token_id].any(1)
        helps, others = logp_BV.where(deciding, -torch.inf), logp_BV.masked_fill(deciding, -torch.inf)
        margin = (helps.amax(-1) - others.amax(-1)) * temperature
        best = torch.maximum(self.margin_R[index], margin)
        self.margin_R[index] = torch.where(unfinished, best, self.margin_R[index])
        self.log_odds_RT[index, step] = helps.logsumexp(-1) - others.logsumexp(-1)
        return torch.where(deciding, logp_BV + self.bias / temperature, logp_BV)

    def force_rest(self, token: torch.Tensor, fits_BS: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[B] the chosen tokens, or those that a begun phrase needs; a phrase that begins here is noted."""
        forced = self.forced_RL[index]
        begins_BS = fits_BS & (token[:, None] == self.token_S)
        longest_B = (begins_BS * torch.arange(1, len(self.token_S) + 1, device=token.device)).amax(1)  # 0: none
        left = torch.cat([forced[:, 1:], forced.new_full((len(forced), 1), -1)], 1)
        left = torch.where((longest_B > 0)[:, None], self.rest_SL[longest_B - 1], left)
        self.forced_RL[index] = left
        return torch.where(forced[:, 0] >= 0, forced[:, 0], token)

    def recorded(self, span: slice, lengths: list[int]) -> list[tuple[float, tuple[float, ...]]]:
        """(help margin, help log-odds) of the responses in `span`, of these lengths."""
        rows = zip(self.margin_R[span].tolist(), self.log_odds_RT[span].tolist(), lengths, strict=True)
        return [(margin, tuple(x for x in odds[:n] if x > -math.inf)) for margin, odds, n in rows]
