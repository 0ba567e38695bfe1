"""What of an update adds in no fixed order on CUDA; the switch for it, and that everything there follows the switch."""

import os

import pytest
import torch

from gapg.deterministic import use_deterministic_algorithms
from tests.cuda_route.real_sizes import qwen
from tests.cuda_route.test_cuda_route_update import SAVINGS, fake_model, settings, update

FOLLOW = {"index_add", "_flash_attention_backward", "shared_prompt_attention_backward"}
"""Of what an update calls, what adds by atomics and has an order under the switch.

torch.use_deterministic_algorithms names the first; the second reads the switch (aten's attention_backward.cu, and
torch.nn.attention's _fa3.py and _fa4.py); the third calls the second.
"""
OTHERS = {
    "scatter_add", "scatter_add_", "scatter_reduce", "index_put", "index_put_", "put_", "gather", "index_copy", "histc",
    "bincount", "median", "cumsum", "nll_loss_forward", "nll_loss_backward", "embedding_bag", "index_reduce",
}  # fmt: skip
"""The others that may be called for a language model, and either need an order or have none."""


@pytest.mark.parametrize("on", [SAVINGS[:3], SAVINGS], ids=["repeated prompts", "shared prompts"])
@pytest.mark.usefixtures("flash_everywhere")
def test_an_update_adds_by_no_other_atomics(on: tuple[str, ...]) -> None:
    operators, _ = update(fake_model(qwen("0.5B", layers=1)), settings(on))
    on_device = {
        name.split(".")[1]
        for name, calls in operators.calls.items()
        if any(getattr(x, "fake_mode", None) for call in calls for x in call.args)
    }
    attention = "shared_prompt_attention_backward" if on is SAVINGS else "_flash_attention_backward"
    assert on_device & FOLLOW == {"index_add", attention}
    assert not on_device & OTHERS


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_the_switch_sets_all_three_parts(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        use_deterministic_algorithms()
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (given or ":4096:8")
    finally:
        torch.use_deterministic_algorithms(False)
