"""The losses of five papers as functions that `gapg_kernels.linear_loss` takes.

A loss gets the log-probs [C] of a chunk of tokens and the same rows of whatever else it was given, all [C]:

    old, reference   log-probs under the policy that sampled, and under the reference policy
    advantage        of the token's response
    share            the token's part of the paper's mean, which every chunk knows: 1 / (responses * the response's
                     tokens) in GRPO and GSPO, 1 / the batch's tokens in DAPO and CISPO, 0 where a token is masked

and returns its chunk's sum. GSPO and DPO are losses of whole sequences: ``cuts`` keeps those of a chunk together.

    rows = {"old": old, "advantage": advantage, "share": share}
    linear_loss(hidden, weight, target, dapo, rows=rows).loss.backward()
    loss = partial(gspo, responses=64)
    linear_loss(hidden, weight, target, loss, rows=rows, cuts=cu_seqlens.tolist()).loss.backward()
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grpo(
    logprob: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, share: Tensor, *, clip: float = 0.2,
    beta: float = 0.04,
) -> Tensor:  # fmt: skip
    """arXiv 2402.03300: -mean_i mean_t (min(r A, clip(r, 1 - e, 1 + e) A) - beta (q - log q - 1)), with
    r = pi / pi_old and q = pi_ref / pi."""
    ratio, gap = (logprob - old).exp(), reference - logprob
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return (share * (beta * (gap.exp() - gap - 1) - gain)).sum()


def dapo(
    logprob: Tensor, old: Tensor, advantage: Tensor, share: Tensor, *, low: float = 0.2, high: float = 0.28
) -> Tensor:
    """arXiv 2503.14476: -sum_t min(r A, clip(r, 1 - e_low, 1 + e_high) A) / tokens, with r = pi / pi_old."""
    ratio = (logprob - old).exp()
    return -(share * torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)).sum()


def cispo(logprob: Tensor, old: Tensor, advantage: Tensor, share: Tensor, *, high: float = 0.28) -> Tensor:
    """arXiv 2506.13585: -sum_t stop_gradient(min(r, 1 + e_high)) A log pi / tokens, with r = pi / pi_old."""
    weight = (logprob.detach() - old).exp().clamp(max=1 + high)
    return -(share * weight * advantage * logprob).sum()


def gspo(
    logprob: Tensor, old: Tensor, advantage: Tensor, share: Tensor, cuts: Tensor, *, responses: int,
    low: float = 3e-4, high: float = 4e-4,
) -> Tensor:  # fmt: skip
    """arXiv 2507.18071: -mean_i min(s A, clip(s, 1 - e_low, 1 + e_high) A), with s = exp(mean_t log r)."""
    ratio = (responses * per_sequence(share * (logprob - old), cuts)).exp()
    part = per_sequence(share * advantage, cuts)
    return -torch.min(ratio * part, ratio.clamp(1 - low, 1 + high) * part).sum()


def dpo(logprob: Tensor, reference: Tensor, sign: Tensor, cuts: Tensor, *, pairs: int, beta: float = 0.1) -> Tensor:
    """arXiv 2305.18290: -mean log sigmoid(beta (log r_w - log r_l)), with r = pi / pi_ref of a whole response.

    Between two cuts lies a pair; ``sign`` is 1 in the tokens of the response that won, -1 in the other's, else 0."""
    margin = per_sequence(sign * (logprob - reference), cuts)
    return -F.logsigmoid(beta * margin).sum() / pairs


def per_sequence(x: Tensor, cuts: Tensor) -> Tensor:
    """The sum of x [C] between each two of ``cuts`` [n + 1], [n], in float64; in the order of the rows, and the host
    does not wait for the device."""
    return torch.segment_reduce(x.double(), "sum", offsets=cuts)
