"""The fused head inside verl: its ``linear_cross_entropy``, computed in odds form.

verl (read at 0.9.1) gets log-probs and entropies without logits from one function,
``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, when a model has ``use_fused_kernels=True`` and
``fused_kernel_options.impl_backend=triton``. `install` puts `linear_cross_entropy` of this file in its place. Needs
torch and verl; nothing else of this package is imported. Checked against verl's signatures and its formula in
tests/integrations/test_verl.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys

import torch.distributed as dist
from torch import Tensor

from gapg_kernels.linear_logprob import linear_logprob

MODULE = "verl.utils.kernel.linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` and entropies of ``softmax(hidden @ weight^T / temperature)``, both differentiable.

    The arguments are verl's, in verl's order and with verl's defaults.

    Args:
        hidden: [..., H] bfloat16 or float32.
        weight: [V, H], the whole LM head.
        labels: [...] integer token ids, N of them; the shape of ``hidden`` without H.
        temperature: divides the logits.
        reduction: of the log-probs alone: "none", "sum" or "mean", as in verl.
        dist_process_group: the ranks that share the vocabulary (tensor parallelism). None, or a group of one.

    Returns:
        (log-probs [N] float32, or a scalar with a reduction; entropies [N] float32, in nats). Flat, as verl's are.

    Raises:
        ValueError: another reduction; a vocabulary that is split over ranks; and what `linear_logprob` raises.
        TypeError: what `linear_logprob` raises.
    """
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError("linear_cross_entropy: the odds form needs the whole vocabulary on a rank; use TP size 1")
    kind = reduction.lower()
    if kind not in ("none", "sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction must be none, sum or mean, not {reduction!r}")
    logprob, entropy = linear_logprob(
        hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, return_entropy=True
    )
    if kind != "none":
        logprob = logprob.sum() if kind == "sum" else logprob.mean()
    return logprob, entropy


def install() -> None:
    """Put `linear_cross_entropy` into verl, in this process. May be called again.

    verl's transformers models look the function up when they run; its Megatron modules keep the one they imported, and
    are handed the new one here if they are loaded already.

    Raises:
        ImportError: no verl, or one without that module.
        RuntimeError: a verl whose function takes other arguments than 0.9.1's.
    """
    module = importlib.import_module(MODULE)
    asked = list(inspect.signature(module.LinearCrossEntropy.forward).parameters)[1:]
    given = list(inspect.signature(linear_cross_entropy).parameters)
    if asked != given:
        raise RuntimeError(
            f"{MODULE} takes {asked}, and this package gives {given}, verl 0.9.1's: install that version"
        )
    theirs = module.linear_cross_entropy
    for name, loaded in list(sys.modules.items()):
        if name.partition(".")[0] == "verl" and vars(loaded).get("linear_cross_entropy") is theirs:
            vars(loaded)["linear_cross_entropy"] = linear_cross_entropy
