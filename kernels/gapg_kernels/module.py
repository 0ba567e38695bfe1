"""The fused head as a module, in the place of a model's ``lm_head``.

FSDP and DDP wrap modules: inside ``forward`` FSDP2 has gathered the weight, and its gradient goes the usual way.

>>> import torch
>>> lm_head = torch.nn.Linear(8, 32, bias=False)
>>> head = LogprobHead(lm_head)
>>> hidden, target = torch.randn(2, 3, 8), torch.randint(32, (2, 3))
>>> head(hidden, target).shape
torch.Size([2, 3])
>>> out = head(hidden, target, loss=lambda logprob: -logprob.sum())
>>> out.loss.backward()
>>> lm_head.weight.grad.shape
torch.Size([32, 8])
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn

from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import LinearLoss, Loss, linear_loss


class LogprobHead(nn.Module):
    """Log-probs of given tokens, or a loss over them, from hidden states; no [T, V] logits.

    Args:
        lm_head: its weight [V, H] and bias become this module's own, the same parameters under the same names.
        temperature: divides the logits; positive.
        softcap: logits become ``softcap * tanh(logit / softcap)`` before the temperature; None: no.

    Raises TypeError for a head that is no Linear.
    """

    def __init__(self, lm_head: nn.Linear, *, temperature: float = 1.0, softcap: float | None = None) -> None:
        if not isinstance(lm_head, nn.Linear):  # an adapter's layer has a weight too, and adds to what it gives
            raise TypeError(f"LogprobHead: lm_head is of {type(lm_head)}: pass the torch.nn.Linear itself")
        super().__init__()
        self.weight, self.bias = lm_head.weight, lm_head.bias
        self.temperature, self.softcap = temperature, softcap

    @overload
    def forward(self, hidden: Tensor, target: Tensor, loss: None = None) -> Tensor: ...

    @overload
    def forward(self, hidden: Tensor, target: Tensor, loss: Loss, **options: Any) -> LinearLoss: ...

    def forward(self, hidden: Tensor, target: Tensor, loss: Loss | None = None, **options: Any) -> Tensor | LinearLoss:
        """Without ``loss`` the log-probs [...] of hidden [..., H] at target [...]; with it `linear_loss` of all T rows.

        Raises ValueError for another shape of target, TypeError for options without a loss; else what `linear_logprob`
        and `linear_loss` raise.
        """
        if target.shape != hidden.shape[:-1]:
            shapes = f"{tuple(hidden.shape)} and target {tuple(target.shape)}"
            raise ValueError(f"LogprobHead: hidden {shapes}: a target for each hidden state, of the same leading shape")
        rows, index = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        scale, cap = self.temperature, self.softcap
        if loss is not None:
            return linear_loss(
                rows, self.weight, index, loss, bias=self.bias, temperature=scale, softcap=cap, **options
            )
        if options:
            raise TypeError(f"LogprobHead: {', '.join(options)}: options of a loss; pass loss=...")
        logprob = linear_logprob(rows, self.weight, index, bias=self.bias, temperature=scale, softcap=cap)
        return logprob.view(target.shape)
