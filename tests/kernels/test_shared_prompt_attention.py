"""Responses that share a prompt against the definition: softmax in float64, with the prompt repeated for each."""

from collections import defaultdict
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gapg_kernels import equal_lengths, flash
from gapg_kernels.shared_layout import SharedPrompts, share_prompts
from gapg_kernels.shared_prompt_attention import (
    Pieces,
    shared_prompt_attention,
    varlen_backward,
    varlen_forward,
)
from tests.kernels.counting import beyond_torch_2_11
from tests.kernels.flash_on_cpu import flash_on_cpu

Groups = list[tuple[int, list[int]]]
"""Each prompt's length and those of its responses."""

GROUPS: Groups = [(5, [3, 3, 1]), (1, [1]), (7, [4, 9, 9, 2]), (1, [6, 1]), (12, [1, 1, 1])]
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def layout_of(groups: Groups, device: str = "cpu") -> SharedPrompts:
    prompts, responses = [p for p, _ in groups], [r for _, rs in groups for r in rs]
    return share_prompts(
        cumulative(prompts + responses), cumulative(prompts), cumulative([sum(r) for _, r in groups]), device
    )


def definition(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float, window: int | None) -> Tensor:
    """Each prompt, and each response with a prompt of its own: causal attention of that sequence alone."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    segments = torch.arange(len(q)).split([p for p, _ in groups] + [r for _, rs in groups for r in rs])
    prompts = segments[: len(groups)]
    owners = [prompt for prompt, (_, rs) in zip(prompts, groups, strict=True) for _ in rs]
    outs = []
    for segment, owner in zip(segments, [torch.arange(0)] * len(groups) + owners, strict=True):
        keys = torch.cat([owner, segment])
        scores = torch.einsum("qhd,khd->hqk", q[segment], k[keys]) * scale
        allowed = torch.ones(len(segment), len(keys)).tril(len(owner)).bool()
        if window is not None:
            allowed = allowed.triu(len(owner) - window + 1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v[keys]))
    return torch.cat(outs)


def inputs(tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and d(out), laid out as transformers has them: heads outermost."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads[0], tokens), (heads[1], tokens), (heads[1], tokens), (heads[0], tokens))
    made = [torch.randn(*shape, head_dim, dtype=torch.float64, generator=generator) for shape in shapes]
    return [x.to(dtype).transpose(0, 1) for x in made]


def exact(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, groups: Groups, scale: float, window: int | None = None
) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = definition(*leaves, groups, scale, window)
    return [out, *torch.autograd.grad(out, leaves, grad.double())]


def ours(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: SharedPrompts, scale: float | None, window: int | None = None
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = shared_prompt_attention(*leaves, layout, scale, window)
    assert out.is_contiguous()
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_close(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        error = ((a.double() - b).norm() / b.norm().clamp_min(0.1)).item()  # with one key, dq and dk are 0
        assert error < bound, f"{name}: {error}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_it_is_its_definition(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    layout = layout_of(GROUPS)
    values = inputs(layout.tokens, heads, head_dim, dtype)
    got = ours(*values, layout, None)
    assert {x.dtype for x in got} == {dtype}
    assert_close(got, exact(*values, GROUPS, head_dim**-0.5), BOUNDS[dtype])


group = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=5))


@settings(max_examples=60)
@given(st.lists(group, min_size=1, max_size=5), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([None, 0.3]))
def test_any_groups(groups: Groups, heads: tuple[int, int], scale: float | None) -> None:
    """Of one response, of none, of empty ones; prompts and responses of one token."""
    layout = layout_of(groups)
    values = inputs(layout.tokens, heads, 8, torch.float64)
    assert_close(ours(*values, layout, scale), exact(*values, groups, 8**-0.5 if scale is None else scale), 1e-12)
    assert layout.max_sequence == max(p + r for p, rs in groups for r in [0, *rs])


def test_far_logits_stay_finite() -> None:
    """A piece whose keys are all but impossible weighs nothing, in either order."""
    layout = layout_of(GROUPS)
    values = inputs(layout.tokens, (2, 1), 8, torch.float32)
    values[0] = values[0] * 200
    assert_close(ours(*values, layout, None), exact(*values, GROUPS, 8**-0.5), 1e-4)


def test_gradcheck_and_the_rules_for_operators() -> None:
    groups: Groups = [(3, [2, 1]), (1, [2])]
    layout = layout_of(groups)
    leaves = [x.contiguous().requires_grad_() for x in inputs(layout.tokens, (2, 1), 4, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: shared_prompt_attention(*qkv, layout), leaves)
    sizes = layout.prompt_tokens, layout.max_segment, layout.max_prompt, layout.max_responses
    arguments = (*leaves, layout.cu_segments, layout.cu_prompts, layout.cu_responses, *sizes, 0.5)
    torch.library.opcheck(torch.ops.gapg.shared_prompt_attention.default, arguments)


def test_compiled_whole() -> None:
    compiled = torch.compile(shared_prompt_attention, fullgraph=True, backend="aot_eager")
    for groups in (GROUPS, GROUPS[::-1], GROUPS[:2]):
        layout = layout_of(groups)
        values = inputs(layout.tokens, (4, 2), 16, torch.float32)
        leaves = [x.detach().requires_grad_() for x in values[:3]]
        out = compiled(*leaves, layout)
        got = [out, *torch.autograd.grad(out, leaves, values[3])]
        assert all(torch.equal(a, b) for a, b in zip(got, ours(*values, layout, None), strict=True))
    halves = [x.bfloat16() for x in values[:3]]
    with flash_on_cpu():
        windowed = compiled(*halves, layout, window=5)
        assert torch.equal(windowed, shared_prompt_attention(*halves, layout, window=5))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_makes_the_inputs_one_type(kind: torch.dtype) -> None:
    layout = layout_of(GROUPS)
    low = torch.float64 if kind == torch.float64 else torch.bfloat16
    *values, grad = inputs(layout.tokens, (2, 1), 16, kind)
    leaves = [x.detach().requires_grad_() for x in values]
    with torch.autocast("cpu", torch.bfloat16):
        out = shared_prompt_attention(*leaves, layout)
    expected = ours(*(x.to(low) for x in (*values, grad)), layout, None)
    got = torch.autograd.grad(out, leaves, grad.to(low))
    assert out.dtype == low and {g.dtype for g in got} == {kind}
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip((out, *got), expected, strict=True))
    if kind == torch.float32:
        with pytest.raises(ValueError, match=r"under torch\.autocast, or load it in one type"):
            shared_prompt_attention(values[0], values[1], values[2].bfloat16(), layout)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_plain_form_for_other_devices_is_what_the_cpu_computes(dtype: torch.dtype, causal: bool) -> None:
    """Also the backward of a merged piece, whose out and lse are over more keys than it has."""
    generator = torch.Generator().manual_seed(0)
    keys = 6 if causal else 9
    q, out, grad = (torch.randn(2, 4, 6, 16, generator=generator).to(dtype) for _ in range(3))
    k, v = (torch.randn(2, 2, keys, 16, generator=generator).to(dtype) for _ in range(2))
    forwards = [f(q, k, v, causal, 0.3) for f in (equal_lengths.forward, equal_lengths.plain_forward)]
    merged = forwards[0][1] + 0.7
    backwards = [
        f(grad, q, k, v, out, merged, causal, 0.3) for f in (equal_lengths.backward, equal_lengths.plain_backward)
    ]
    for cpu, plain in ((forwards[0], forwards[1]), backwards):
        for a, b in zip(cpu, plain, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert ((a - b).double().norm() / b.double().norm()).item() < BOUNDS[dtype]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "prompts", "responses", "message"),
    [
        ([], [], [], "one row of numbers each"),
        ([[0, 2]], [[0, 2]], [[0, 0]], "one row of numbers each"),
        ([0, 0, 3, 5], [0, 0, 3], [0, 1, 2], "a prompt of no tokens cannot be shared"),
        ([0, 2, 4, 5, 6], [0, 3, 4], [0, 1, 2], "must begin with cu_prompts"),
        ([1, 2, 4, 5], [1, 2], [0, 3], "from 0 on"),
        ([0, 2, 4, 5, 6], [0, 2, 4], [0, 2], "as long as cu_prompts"),
        ([0, 2, 6, 4, 8], [0, 2], [0, 6], "must not fall"),
        ([0, 2, 4, 5, 8], [0, 2, 4], [0, 2, 1], "must not fall"),
        ([0, 2, 4, 5, 8], [0, 2, 4], [0, 1, 3], "from 0 to the number of response tokens"),
        ([0, 2, 4, 5, 8], [0, 2, 4], [0, 2, 4], "along starts of responses"),
    ],
)
def test_arrays_that_contradict_each_other(
    segments: list[Any], prompts: list[Any], responses: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        share_prompts(segments, prompts, responses)


def test_shapes_that_do_not_fit() -> None:
    layout = layout_of(GROUPS)
    q, k, v, _ = inputs(layout.tokens, (4, 2), 8, torch.float32)
    with pytest.raises(ValueError, match=f"of {layout.tokens} tokens, and q has {layout.tokens - 1}"):
        shared_prompt_attention(q[1:], k[1:], v[1:], layout)
    with pytest.raises(ValueError, match="must agree"):
        shared_prompt_attention(q[:, :3], k, v, layout)
    with pytest.raises(ValueError, match="must agree"):
        shared_prompt_attention(q, k[..., :4], v, layout)
    half = torch.empty(layout.tokens, 2, 20, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="at most 256, not 20"):
        shared_prompt_attention(half, half, half, layout_of(GROUPS, "meta"))


# --- the CUDA route --------------------------------------------------------------------------------------------------


def pieces_of(layout: SharedPrompts) -> Pieces:
    sizes = layout.prompt_tokens, layout.max_segment, layout.max_prompt, layout.max_responses
    return Pieces(layout.cu_segments, layout.cu_prompts, layout.cu_responses, *sizes)


@settings(max_examples=40)
@given(st.lists(group, min_size=1, max_size=4), st.sampled_from([(2, 2), (4, 2)]))
@example([(3, [1]), (2, [])], (4, 2))  # at most one query an entry, and an entry of none
@example([(1, [1, 0])], (4, 2))
def test_the_cuda_route_on_a_flash_attention_of_the_cpu(groups: Groups, heads: tuple[int, int]) -> None:
    """Every call within the kernels' contract, which they check there, and the result is right."""
    layout = layout_of(groups)
    values = inputs(layout.tokens, heads, 8, torch.bfloat16)
    with flash_on_cpu():
        got = ours(*values, layout, 0.3)
    assert {x.dtype for x in got} == {torch.bfloat16}
    assert_close(got, exact(*values, groups, 0.3), 1.5e-2)


@settings(max_examples=40)
@given(st.lists(group, min_size=1, max_size=4), st.integers(1, 14), st.sampled_from([(2, 2), (4, 2)]))
@example([(9, [5, 0, 3]), (4, []), (7, [6])], 5, (4, 2))
def test_within_a_window_both_routes_are_the_definition(groups: Groups, window: int, heads: tuple[int, int]) -> None:
    layout = layout_of(groups)
    values = inputs(layout.tokens, heads, 8, torch.float64)
    assert_close(ours(*values, layout, 0.3, window), exact(*values, groups, 0.3, window), 1e-13)
    halves = [x.bfloat16() for x in values]
    with flash_on_cpu():
        got = ours(*halves, layout, 0.3, window)
    assert {x.dtype for x in got} == {torch.bfloat16}
    assert_close(got, exact(*halves, groups, 0.3, window), 1.5e-2)


def test_a_window_that_covers_every_sequence_changes_no_bit() -> None:
    layout = layout_of(GROUPS)
    values = inputs(layout.tokens, (4, 2), 8, torch.float32)
    whole, covered, cut = (ours(*values, layout, None, w) for w in (None, layout.max_sequence, layout.max_sequence - 1))
    assert all(torch.equal(a, b) for a, b in zip(whole, covered, strict=True)) and not torch.equal(whole[0], cut[0])


def test_within_a_window_it_is_one_launch_each_way_that_waits_for_nothing() -> None:
    """At real sizes, on fake tensors, which raise where the route would wait for the device."""
    groups, window = [(1024, [256] * 8)] * 4, 512
    layout = layout_of(groups)
    with FakeTensorMode() as mode, mock.patch.object(flash, "has_flash", lambda device: True), Operators() as operators:
        on_device = layout._replace(**{x: mode.from_tensor(getattr(layout, x)) for x in layout._fields[:3]})
        q, k, v = (torch.empty(layout.tokens, n, 128, dtype=torch.bfloat16, requires_grad=True) for n in (12, 2, 2))
        shared_prompt_attention(q, k, v, on_device, window=window).sum().backward()
    assert q.grad is not None and k.grad is not None and k.grad.dtype == torch.bfloat16
    keys = layout.tokens + 32 * (window - 1)
    (forward,), (backward,) = (operators.calls[f"aten._flash_attention_{way}"] for way in ("forward", "backward"))
    assert [x.shape for x in forward[0][:3]] == [(layout.tokens, 12, 128), (keys, 2, 128), (keys, 2, 128)]
    assert [x.shape for x in forward[0][3:5]] == [(37,), (37,)] and forward[0][5:9] == (1024, 1280, 0.0, True)
    assert backward[0][8:12] == (1024, 1280, 0.0, True)
    added = [args[0].dtype for args, _ in operators.calls["aten.index_add"]]
    assert added == [torch.float32] * 2  # every copy's gradient, before any is rounded


class Operators(TorchDispatchMode):
    """Every operator's arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[tuple[Any, ...], Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name.replace("::", ".")].append((args, result))
        return result


@beyond_torch_2_11
def test_pytorchs_flash_attention_gets_two_launches_each_way() -> None:
    """At real sizes, on fake tensors, which raise where the route would wait for the device."""
    prompts, responses, p, r = 4, 8, 1024, 256
    tokens, at = prompts * (p + responses * r), prompts * p
    with FakeTensorMode(), Operators() as operators, FlopCounterMode(display=False) as counter:
        q, grad = (torch.empty(tokens, 12, 128, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.empty(tokens, 2, 128, dtype=torch.bfloat16) for _ in range(2))
        sizes = (prompts * (1 + responses), prompts, prompts)
        cu = [torch.empty(n + 1, dtype=torch.int32) for n in sizes]
        pieces = Pieces(*cu, at, p, p, responses * r)
        out, lse = varlen_forward(q, k, v, pieces, 0.1)
        grads = varlen_backward(grad, q, k, v, out, lse, pieces, 0.1)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (q.dtype, q.shape, torch.float32, (12, tokens))
    assert [(g.dtype, g.shape) for g in grads] == [(x.dtype, x.shape) for x in (q, k, v)]
    rows = tokens - at
    expected = [(tokens, tokens, 0, 0, p, p, True), (rows, at, 2, 1, responses * r, p, False)]
    for name, skip in (("forward", 0), ("backward", 1)):
        calls = operators.calls[f"aten._flash_attention_{name}"]
        assert len(calls) == 2
        for (arguments, _), (q_rows, k_rows, cu_q, cu_k, max_q, max_k, causal) in zip(calls, expected, strict=True):
            q_, k_, v_, *rest = arguments[skip:]
            assert (q_.shape, k_.shape, v_.shape) == ((q_rows, 12, 128), (k_rows, 2, 128), (k_rows, 2, 128))
            assert {x.dtype for x in (q_, k_, v_)} == {torch.bfloat16}
            if skip:
                out_, lse_, *rest = rest
                assert arguments[0].shape == out_.shape == q_.shape and arguments[0].dtype == out_.dtype == q_.dtype
                assert (lse_.dtype, lse_.shape, lse_.is_contiguous()) == (torch.float32, (12, q_rows), True)
            assert rest[0] is cu[cu_q] and rest[1] is cu[cu_k]
            assert tuple(rest[2:6]) == (max_q, max_k, 0.0, causal)
    # q and v of the prompts and responses are views: nothing was gathered
    assert not {"aten.index_select", "aten.index", "aten.gather"} & operators.calls.keys()
    work = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    pairs = sizes[0] * p * p + prompts * p * responses * r  # fake: every segment counts as the longest
    assert work == {
        "aten._flash_attention_forward": 4 * 12 * 128 * pairs,
        "aten._flash_attention_backward": 10 * 12 * 128 * pairs,
    }


def test_counted_work() -> None:
    """The operator's own formula: exact with data, and without it what PyTorch's kernels would count."""
    pairs = sum(p * p + sum(r * r for r in rs) + p * sum(rs) for p, rs in GROUPS)
    segments = len(GROUPS) + sum(len(rs) for _, rs in GROUPS)
    most = segments * 12**2 + len(GROUPS) * 12 * max(sum(rs) for _, rs in GROUPS)
    for device, count in (("cpu", pairs), ("meta", most)):
        layout = layout_of(GROUPS, device)
        shapes = ((layout.tokens, 4, 8), (layout.tokens, 2, 8), (layout.tokens, 2, 8))
        leaves = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            shared_prompt_attention(*leaves, layout).sum().backward()
        work = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
        assert work["gapg.shared_prompt_attention"] == 4 * 4 * 8 * count
        assert work["gapg.shared_prompt_attention_backward"] == 10 * 4 * 8 * count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_on_a_gpu_it_is_its_definition(heads: tuple[int, int], head_dim: int) -> None:
    groups: Groups = [(300, [200, 1, 77]), (1, [130]), (129, [64] * 8), (40, [])]
    layout = layout_of(groups, "cuda")
    values = inputs(layout.tokens, heads, head_dim, torch.bfloat16)
    on_gpu = [x.cuda() for x in values]
    for window in (None, 100):
        expected = exact(*values, groups, head_dim**-0.5, window)
        assert_close([x.cpu() for x in ours(*on_gpu, layout, None, window)], expected, 1e-2)
        full = ours(*(x.float() for x in on_gpu), layout, None, window)
        assert_close([x.cpu() for x in full], expected, 1e-5)
