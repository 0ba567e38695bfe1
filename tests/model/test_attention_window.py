"""Packed rows within a sliding window, against transformers' eager attention and the definition."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig

from gapg.errors import ConfigError
from gapg.model import attention
from gapg.model.route import choose_route
from gapg_kernels.shared_layout import share_prompts
from gapg_kernels.shared_prompt_attention import shared_prompt_attention
from tests.kernels.flash_on_cpu import flash_on_cpu
from tests.model.test_attention import LENGTHS, SHAPE, build, error, gradients, one_by_one, packed


@pytest.mark.parametrize("window", [2, 4, 8, 9])
def test_a_sliding_window_is_transformers_eager_in_outputs_and_every_gradient(window: int) -> None:
    """LENGTHS are up to 9; the last covers them."""
    config = MistralConfig(**SHAPE, sliding_window=window)
    plain, model, batch = build(config, "eager"), build(config, attention.NAME), packed(LENGTHS)
    expected, got = one_by_one(plain, batch), model(**batch).logits
    assert error(got, expected) < 1e-6
    unbounded = one_by_one(build(MistralConfig(**SHAPE, sliding_window=None), "eager"), batch)
    assert (error(unbounded, expected) < 1e-6) == (window == 9)
    expected_gradients, got_gradients = gradients(plain, expected), gradients(model, got)
    assert expected_gradients.keys() == got_gradients.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in expected_gradients.items():
        assert error(got_gradients[parameter], gradient) < 3e-6, parameter


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 10), st.sampled_from([(4, 2), (3, 1)]))
@example([0, 1], 1, (4, 2))  # at most one query a sequence, and a sequence of none
def test_within_a_window_both_routes_are_the_definition(
    lengths: list[int], window: int, heads: tuple[int, int]
) -> None:
    exact = [torch.randn(sum(lengths), h, 8, dtype=torch.float64) for h in (heads[0], heads[1], heads[1], heads[0])]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (sequence[:, None] == sequence).tril().triu(1 - window)

    def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * 0.3
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)

    def results(function: Any, *values: torch.Tensor) -> list[torch.Tensor]:
        *leaves, weights = values
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weights)]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.packed_attention(q, k, v, cu, max(lengths), 0.3, window)

    for a, b in zip(results(ours, *exact), results(defined, *exact), strict=True):
        torch.testing.assert_close(a, b)
    if not sum(lengths):
        return
    halves = [x.bfloat16() for x in exact]
    with flash_on_cpu():
        got = results(ours, *halves)
    for a, b in zip(got, results(defined, *(x.double() for x in halves)), strict=True):
        assert ((a - b).norm() / b.norm().clamp_min(0.1)).item() < 1.5e-2


def test_a_window_reaches_the_kernel_on_the_meta_device_only_where_it_cuts() -> None:
    x = torch.empty(16, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    for window, expected in ((None, {}), (8, {}), (7, {"window_size_left": 6, "window_size_right": 0})):
        with Flash() as calls:
            attention.packed_attention(x, x, x, cu, 8, window=window).sum().backward()
        forward, backward = calls.seen
        assert {n: v for n, v in forward.items() if n != "scale"} == expected
        assert {n: v for n, v in backward.items() if n != "scale" and v is not None} == expected


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_token_is_refused(window: int) -> None:
    x, cu = torch.randn(3, 2, 8), torch.tensor([0, 3]).int()
    with pytest.raises(ValueError, match=f"at least 1 token, not {window}: pass None"):
        attention.packed_attention(x, x, x, cu, 3, window=window)
    with pytest.raises(ValueError, match=f"at least 1 token, not {window}: pass None"):
        shared_prompt_attention(x, x, x, share_prompts([0, 2, 3], [0, 2], [0, 1]), window=window)


@pytest.mark.usefixtures("nothing_said")
def test_beyond_a_border_that_is_too_far_to_try_a_model_is_not_packed(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 4's chunks of 8192 tokens would else be ignored in longer sequences, which are off by nats."""
    config = MistralConfig(**SHAPE, sliding_window=5000, max_position_embeddings=8000)
    assert choose_route(build(config, attention.NAME), longest=5000)
    with pytest.raises(ConfigError, match=r"^update.pack=true: model mistral: computes in another way beyond 5000 t"):
        choose_route(build(config, attention.NAME), True, longest=5001)
    assert not choose_route(build(config, attention.NAME), longest=5001)
    assert "beyond 5000 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_neither_are_rotations_that_follow_the_longest_of_a_batch(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    config = MistralConfig(**SHAPE, sliding_window=None, max_position_embeddings=5000, rope_parameters=rope)
    assert choose_route(build(config, attention.NAME), longest=5000)
    if kind == "default":
        assert choose_route(build(config, attention.NAME), longest=5001)
    else:
        with pytest.raises(ConfigError, match=r"beyond 5000 tokens, .* 5001: padded rows are tried up to 4160$"):
            choose_route(build(config, attention.NAME), longest=5001)


class Flash(TorchDispatchMode):
    """The keyword arguments of the FlashAttention operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_flash_attention_" in func.overloadpacket._qualified_op_name:
            self.seen.append(kwargs)
        return func(*args, **(kwargs or {}))
