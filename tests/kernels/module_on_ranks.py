"""One of two ranks that train a small model with the fused head as a module: under DDP, and sharded by FSDP2.

python -m tests.kernels.module_on_ranks RANK FOLDER     # one process a rank; each saves FOLDER/RANK.pt
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gapg_kernels import LogprobHead
from tests.kernels.two_ranks import save_and_end

RANKS, T, H, V = 2, 7, 16, 41


class Model(nn.Module):
    """Hidden states, then a head: ours, or logits with a softmax."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same on all ranks
        self.body, head = nn.Linear(H, H), nn.Linear(H, V)
        self.head = LogprobHead(head, temperature=0.7) if fused else head

    def forward(self, x: Tensor, target: Tensor, with_loss: bool) -> Tensor:
        hidden = self.body(x).tanh()
        if not isinstance(self.head, LogprobHead):
            logits = self.head(hidden) / 0.7
            return loss(logits.log_softmax(-1).gather(-1, target[..., None])[..., 0])
        return self.head(hidden, target, loss=loss).loss if with_loss else loss(self.head(hidden, target))


def loss(logprob: Tensor) -> Tensor:
    return -(0.3 * logprob).exp().sum()


def sharded(model: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients(wrap: Callable[[Model], nn.Module], fused: bool, rank: int, with_loss: bool = False) -> list[Tensor]:
    model = Model(fused)
    wrapped = wrap(model)
    torch.manual_seed(1 + rank)
    wrapped(torch.randn(1, T, H), torch.randint(0, V, (1, T)), with_loss).backward()
    grads = [x.grad for x in model.parameters()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in grads]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    found = {"plain": gradients(DistributedDataParallel, False, rank)}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", sharded)):
        found[name] = gradients(wrap, True, rank)
        found[f"{name}, its loss"] = gradients(wrap, True, rank, with_loss=True)
    save_and_end(found, rank, folder)


if __name__ == "__main__":
    main()
