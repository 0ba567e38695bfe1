"""One switch for runs on CUDA that give the same bits again; on the CPU they do without it."""

import os

import torch


def use_deterministic_algorithms() -> None:
    """PyTorch computes every sum in an order that does not hang on timing, for the whole process.

    Without it three parts of an update add by atomics on CUDA, in whatever order their threads arrive: the attention's
    backward, the backward of `index_select` where an index occurs twice (a shared prompt's last token predicts the
    first token of every response), and cuBLAS where several streams share its workspace. An operator that has no such
    order raises RuntimeError, which names it. Call it before anything computes on the GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch refuses products without it
    # or each new buffer is written once more
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
