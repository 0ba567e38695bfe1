"""Train a device language model to answer what it can and call a cloud model for the rest (arXiv 2509.24050).

For other trainers: ``Example`` and ``packed_batches`` lay responses end to end, with one copy of their prompt;
``response_loss`` and ``response_logprobs`` take such a batch through a transformers model and the fused head.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gapg.batches.batching import Example, PackedBatch, packed_batches
    from gapg.model.policy import response_logprobs, response_loss

__all__ = ["Example", "PackedBatch", "packed_batches", "response_logprobs", "response_loss"]

_POLICY = ("response_logprobs", "response_loss")


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the second home needs transformers, which `import gapg` alone does not."""
    if name not in __all__:
        raise AttributeError(f"module 'gapg' has no attribute {name!r}")
    return getattr(import_module("gapg.model.policy" if name in _POLICY else "gapg.batches.batching"), name)
