"""Every way from hidden states to a policy gradient that `bench/heads.py` compares, ours among them.

Each peer is called as its users call it and made to compute the same thing: the gradients, for hidden and weight, of
``sum_t coefficient_t logprob_t``. Losses that know no coefficient for each token are compared with the float64 gradient
of their own loss, the sum of the cross entropy, and say so in ``computes``. A peer that cannot run raises.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from problems import Problem

POLICY, ENTROPY = "policy gradient", "cross entropy"


class Unavailable(RuntimeError):
    """Why a peer cannot run here."""


class Outcome(NamedTuple):
    """logprob [T] where the peer gives it; the gradients for hidden [T, H] and, where it is trained, weight [V, H]."""

    logprob: Tensor | None
    hidden: Tensor
    weight: Tensor | None


P = ParamSpec("P")
T = TypeVar("T")
Run = Callable[[], Outcome]
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """``prepare(problem, trained)`` gives one forward and backward; ``load``, where it is known, the log-probs alone.

    ``trained``: the weight wants a gradient too. ``computes``: see this module's docstring.
    """

    name: str
    prepare: Callable[[Problem, bool], Run]
    load: Callable[[], LogProb] | None = None
    computes: str = POLICY
    trained_only: bool = False
    predicted_as: str | None = None
    """its name in `roofline`"""

    def coefficient(self, problem: Problem) -> Tensor:
        """[T]: d loss / d logprob of what it computes."""
        return problem.coefficient() if self.computes == POLICY else -torch.ones_like(problem.coefficient())

    def forward(self, problem: Problem) -> Callable[[], Tensor]:
        """Log-probs alone, without gradients."""
        if self.load is None:
            raise Unavailable("has no forward of its own")
        logprob = self.load()

        def run() -> Tensor:
            with torch.no_grad():
                return logprob(problem.hidden, problem.weight, problem.target)

        return run


def leaves(problem: Problem, trained: bool) -> tuple[Tensor, Tensor]:
    """hidden and weight as a training step has them."""
    return problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_(trained)


def outcome(logprob: Tensor | None, loss: Tensor, hidden: Tensor, weight: Tensor) -> Outcome:
    """The gradients of ``loss``."""
    grads = torch.autograd.grad(loss, [hidden, weight] if weight.requires_grad else [hidden])
    return Outcome(None if logprob is None else logprob.detach(), grads[0], grads[1] if len(grads) == 2 else None)


def by_logprob(name: str, load: Callable[[], LogProb], **fields: Any) -> Peer:
    """A peer that gives log-probs [T], differentiable; the coefficients are applied to them."""

    def prepare(problem: Problem, trained: bool) -> Run:
        logprob = load()
        hidden, weight = leaves(problem, trained)
        coefficient = problem.coefficient()

        def run() -> Outcome:
            found = logprob(hidden, weight, problem.target)
            return outcome(found, (coefficient * found).sum(), hidden, weight)

        return run

    return Peer(name, prepare, load, **fields)


def by_sum(name: str, load: Callable[[], LogProb], **fields: Any) -> Peer:
    """A peer that gives the summed cross entropy only."""

    def prepare(problem: Problem, trained: bool) -> Run:
        summed = load()
        hidden, weight = leaves(problem, trained)
        return lambda: outcome(None, summed(hidden, weight, problem.target), hidden, weight)

    return Peer(name, prepare, computes=ENTROPY, **fields)


def require_cuda(what: str) -> None:
    """Raises where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise Unavailable(f"{what} needs CUDA")


def bare_packages(*names: str) -> None:
    """Makes packages known, parents first, without running their ``__init__``: their modules can then be imported."""
    for name in names:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)


# --- ours ------------------------------------------------------------------------------------------------------------


def _linear_logprob(workspace: int) -> LogProb:
    from gapg_kernels.linear_logprob import linear_logprob

    return functools.partial(linear_logprob, workspace_bytes=workspace)


def _linear_loss(problem: Problem, trained: bool, *, workspace: int) -> Run:
    """GRPO on its own samples, as a user writes it: the clipped ratio is 1, so its gradient is the coefficient."""
    from gapg_kernels.linear_loss import linear_loss

    hidden, weight = leaves(problem, trained)
    rows = {"advantage": -problem.coefficient()}

    def grpo(logprob: Tensor, advantage: Tensor) -> Tensor:
        ratio = (logprob - logprob.detach()).exp()
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()

    def run() -> Outcome:
        found = linear_loss(hidden, weight, problem.target, grpo, rows=rows, workspace_bytes=workspace)
        return outcome(found.logprob, found.loss, hidden, weight)

    return run


def _fused(problem: Problem, trained: bool, *, summed: bool = False, **options: Any) -> Run:
    """As a trainer calls it: rows of zero advantage, which the host's tables tell, are left out of the head."""
    from gapg_kernels.fused_policy_loss import fused_policy_loss
    from gapg_kernels.policy_loss import rows_with_advantage

    hidden, weight = leaves(problem, trained and not summed)
    total = torch.zeros_like(weight, dtype=torch.float32) if summed else None

    def run() -> Outcome:
        at = rows_with_advantage(problem.rewards, problem.group, problem.sample)
        kept, target, group, sample = hidden, problem.target, problem.group, problem.sample
        rows = at.to(hidden.device, non_blocking=True)
        if len(at) < len(hidden):
            kept, target = kept.index_select(0, rows), target.index_select(0, rows)
            group, sample = group[at], sample[at]
        scale: dict[str, Any] = {"denominator": problem.sequences, "main_grad": total, **options}
        loss, _, logprob, _ = fused_policy_loss(kept, weight, target, problem.rewards, group, sample, **scale)
        found = outcome(logprob.new_zeros(len(hidden)).index_copy(0, rows, logprob), loss, hidden, weight)
        return found._replace(weight=total) if summed else found

    return run


def _without_the_fused_gemm(run: Callable[P, T]) -> Callable[P, T]:
    """The same with cuBLAS and one pass over the logits in the place of our GEMM, which only a card has."""
    from gapg_kernels import routes

    require_cuda("the control")

    def control(*args: P.args, **options: P.kwargs) -> T:
        with mock.patch.object(routes, "uses_kernel", lambda hidden: False):
            return run(*args, **options)

    return control


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def _eager_half(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(1, target[:, None])[:, 0].float()


@functools.cache
def _compiled() -> LogProb:
    return torch.compile(_eager, dynamic=False)


def _torch_chunked() -> LogProb:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options).float()

    return logprob


class StoredLogits(torch.autograd.Function):
    """The obvious fused design: logits kept in 16 bits for backward, beside a float32 log-sum-exp of the exact ones."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = hidden.float() @ weight.float().t()
        total = logits.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, target, logits.to(hidden.dtype), total)
        return logits.gather(1, target[:, None])[:, 0] - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, target, logits, total = ctx.saved_tensors
        d = -(logits.float() - total[:, None]).exp_()
        d.scatter_add_(1, target[:, None], torch.ones_like(d[:, :1]))
        d = (d * grad[:, None]).to(hidden.dtype).float()
        return (d @ weight.float()).to(hidden.dtype), (d.t() @ hidden.float()).to(weight.dtype), None


# --- others ----------------------------------------------------------------------------------------------------------


def _cut(impl: str, **options: Any) -> Callable[[], LogProb]:
    """25.1.1, the newest release, has no other options: both its sums over tiles are in the inputs' 16 bits."""

    def load() -> LogProb:
        from cut_cross_entropy import linear_cross_entropy

        def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return -linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl, **options).float()

        return logprob

    return load


def _trl() -> LogProb:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, COLUMNS, None, 1.0, ())[0]

    return logprob


def _verl() -> LogProb:
    require_cuda("verl's kernel")
    # The kernel's two files need torch and triton only; what these packages run first imports ray and tensordict.
    bare_packages("verl", "verl.utils")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, 1.0, "none")[0]


def _quack(**options: Any) -> Callable[[], LogProb]:
    """By itself it takes its scaled-exp products on sm_90 in bfloat16 where 128 divides V, else tunes plain ones."""

    def load() -> LogProb:
        require_cuda("quack")
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return functools.partial(chunked_linear_cross_entropy, reduction="sum", **options)

    return load


def _liger_scaled() -> LogProb:
    """On sm_90 its CuTe kernels, or an ImportError where CUTLASS's DSL is missing; PyTorch in chunks elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return lambda hidden, weight, target: -Scaled.apply(hidden, weight, target)


def _liger_cute() -> LogProb:
    """All logits at once; sm_90, bfloat16, where 128 divides T and 256 divides V."""
    require_cuda("Liger's CuTe loss")
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return functools.partial(liger_fused_linear_cross_entropy_sm90, reduction="sum")


def _liger_triton() -> LogProb:
    require_cuda("Liger's Triton loss")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, target: loss(weight, hidden, target)


def _liger_grpo(problem: Problem, trained: bool) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = leaves(problem, trained)
    shape = (problem.sequences, problem.length)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=problem.length
    )
    target, mask = problem.target.view(shape), torch.ones(shape, dtype=torch.int64, device=hidden.device)
    advantages = problem.advantages() * problem.length  # "dr_grpo" divides by sequences times length
    rows = hidden.view(*shape, -1)
    return lambda: outcome(None, loss(rows, weight, target, mask, advantages)[0], hidden, weight)


def ours(workspace: int = 2 << 30) -> list[Peer]:
    """Ours, each within ``workspace`` bytes for what is [T, V]."""
    fused = functools.partial(_fused, workspace_bytes=workspace)
    logprob = functools.partial(_linear_logprob, workspace)
    return [
        Peer("gapg fused_policy_loss", fused, predicted_as="ours"),
        Peer("gapg fused_policy_loss, patched", functools.partial(fused, target_term="patched")),
        Peer("gapg fused_policy_loss, main_grad", functools.partial(fused, summed=True), trained_only=True),
        Peer("gapg linear_loss", functools.partial(_linear_loss, workspace=workspace)),
        by_logprob("gapg linear_logprob", logprob),
        Peer(
            "gapg control: cuBLAS + one pass",
            lambda problem, trained: _without_the_fused_gemm(fused(problem, trained)),
            lambda: _without_the_fused_gemm(logprob()),
            predicted_as="control: cuBLAS + one pass",
        ),
    ]


OTHERS = [
    by_logprob("PyTorch eager", lambda: _eager),
    by_logprob("PyTorch eager, 16-bit softmax", lambda: _eager_half),
    by_logprob("PyTorch torch.compile", _compiled),
    by_logprob("PyTorch linear_cross_entropy", _torch_chunked),
    by_logprob("TRL chunked log-probs", _trl, predicted_as="chunked over V"),
    Peer("Liger GRPO loss", _liger_grpo),
    by_logprob("Liger scaled cross entropy", _liger_scaled, predicted_as="Liger, sm_90"),
    by_sum("Liger cross entropy (Triton)", _liger_triton),
    by_sum("Liger cross entropy (CuTe)", _liger_cute),
    by_logprob("cut-cross-entropy cce", _cut("cce")),
    by_logprob("cut-cross-entropy cce, unfiltered", _cut("cce", filter_eps=None)),
    by_logprob("cut-cross-entropy torch_compile", _cut("torch_compile")),
    by_logprob("verl linear_cross_entropy", _verl),
    by_sum("quack chunked cross entropy", _quack(), predicted_as="quack, scaled exp"),
    by_sum("quack chunked cross entropy, 8192 rows", _quack(chunk_size=8192)),
]
PEERS = [*ours(), *OTHERS]
"""In the order they are reported."""

DESIGN = by_logprob("16-bit logits + fp32 log-sum-exp", lambda: StoredLogits.apply)
"""No product, a design: in the tables of errors only."""
