"""One of two ranks that share an LM head and have rows of their own: d(weight) and d(bias) by FSDP and by our heads.

python -m tests.kernels.sharded_head RANK FOLDER     # one process a rank; each saves FOLDER/RANK.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial

from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from tests.kernels.two_ranks import save_and_end

RANKS, T, H, V = 2, 6, 16, 41
PLACEMENTS = {"average": [Partial("avg")], "sum": [Partial()], "plain": None}


def by_linear_logprob(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return -linear_logprob(hidden, weight, target, bias=bias).sum()


def by_fused_policy_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    row, rewards = torch.zeros(T, dtype=torch.long), torch.tensor([[1.0, 0.0]])  # a response of advantage 1
    return fused_policy_loss(hidden, weight, target, rewards, row, row, denominator=1.0, bias=bias).loss


def gradients(layer: nn.Linear, loss: Tensor) -> list[Tensor]:
    """d(weight) and d(bias), whole, as the layer's parameters keep them."""
    layer.zero_grad()
    loss.backward()
    return [x.grad.full_tensor() for x in (layer.weight, layer.bias)]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    layer = nn.Linear(H, V)  # the same on both ranks
    fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    torch.manual_seed(1 + rank)
    hidden, target = torch.randn(T, H), torch.randint(0, V, (T,))
    logprob = layer(hidden).log_softmax(-1).gather(1, target[:, None])
    found = {"FSDP": gradients(layer, -logprob.sum())}
    for head in (by_linear_logprob, by_fused_policy_loss):
        for name, placements in PLACEMENTS.items():
            weight, bias = (x.full_tensor(grad_placements=placements) for x in (layer.weight, layer.bias))
            found[f"{head.__name__}, {name}"] = gradients(layer, head(hidden, weight, bias, target))
    save_and_end(found, rank, folder)


if __name__ == "__main__":
    main()
