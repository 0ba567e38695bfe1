"""GPU kernels of the policy update and their plain-PyTorch references: tensors only, no model, no config, no loop."""

from gapg_kernels.chunked_head import Chunk, ChunkedHead
from gapg_kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import LinearLoss, linear_loss
from gapg_kernels.module import LogprobHead
from gapg_kernels.policy_loss import (
    PolicyLoss,
    PolicyLossOptions,
    group_advantages,
    policy_loss,
    rows_with_advantage,
    summarize,
)
from gapg_kernels.routes import describe
from gapg_kernels.shared_layout import SharedPrompts, share_prompts
from gapg_kernels.shared_prompt_attention import shared_prompt_attention

__all__ = [
    "Chunk",
    "ChunkedHead",
    "FusedLoss",
    "LinearLoss",
    "LogprobHead",
    "PolicyLoss",
    "PolicyLossOptions",
    "SharedPrompts",
    "describe",
    "fused_policy_loss",
    "group_advantages",
    "linear_logprob",
    "linear_loss",
    "policy_loss",
    "rows_with_advantage",
    "share_prompts",
    "shared_prompt_attention",
    "summarize",
]
