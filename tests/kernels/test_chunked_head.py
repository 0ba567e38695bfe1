"""ChunkedHead: loops of one's own, and what they must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels.chunked_head import ChunkedHead
from gapg_kernels.linear_loss import linear_loss
from tests.kernels.float64_oracle import Inputs, error, inputs_at, truth


def inputs() -> Inputs:
    return inputs_at(2.0, rows=60, width=32, vocab=500, dtype=torch.float32, bias=True, temperature=0.7)


def loop(given: Inputs, head: ChunkedHead) -> tuple[Tensor, list[Tensor | None]]:
    """log-probs, and d loss / d hidden of every chunk, for loss = sum of grad * logprob."""
    logprob, by_hidden = list[Tensor](), list[Tensor | None]()
    for part in head.chunks(given.hidden):
        chunk = head.forward_chunk(given.hidden[part], given.target[part])
        logprob.append(chunk.logprob)
        by_hidden.append(head.backward_chunk(chunk, given.grad[part]))
    return torch.cat(logprob), by_hidden


@pytest.mark.parametrize("room", [2 << 30, 500 * 4 * 7])
@pytest.mark.parametrize("patch", [False, True])
def test_a_loop_over_chunks_is_the_whole(room: int, patch: bool) -> None:
    given = inputs()
    want = truth(given)
    head = ChunkedHead(given.weight, bias=given.bias, temperature=0.7, patch_target=patch, workspace_bytes=room)
    logprob, by_hidden = loop(given, head)
    weight, bias = head.gradients()
    assert (logprob - want.logprob).abs().max() < 1e-5 and not logprob.requires_grad
    assert len(by_hidden) == (1 if room > 1 << 30 else 9)
    for got, exact in (
        (torch.cat([x for x in by_hidden if x is not None]), want.hidden),
        (weight, want.weight),
        (bias, want.bias),
    ):
        assert error(got, exact) < 1e-5


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needs: tuple[bool, bool, bool]) -> None:
    given = inputs()
    want = truth(given)
    head = ChunkedHead(given.weight, bias=given.bias, temperature=0.7, needs=needs)
    (by_hidden,), gradients = loop(given, head)[1], head.gradients()
    for got, exact, need in zip((by_hidden, *gradients), want[1:], needs, strict=True):
        assert (got is not None) == need
        assert not need or error(got, exact) < 1e-5


def test_a_patched_target_with_a_softcap_is_the_exact_one() -> None:
    given, found = inputs(), []
    for patch in (False, True):
        head = ChunkedHead(given.weight, bias=given.bias, softcap=4.0, patch_target=patch)
        found.append([*loop(given, head)[1], *head.gradients()])
    for exact, patched in zip(*found, strict=True):
        assert exact is not None and error(patched, exact.double()) < 1e-5


def test_main_grad_is_added_to() -> None:
    given, main_grad = inputs(), torch.ones(500, 32)
    head = ChunkedHead(given.weight, bias=given.bias, temperature=0.7, main_grad=main_grad)
    loop(given, head)
    weight, bias = head.gradients()
    assert weight is None and bias is not None
    assert error(main_grad - 1, truth(given).weight) < 1e-4


def test_no_rows() -> None:
    head = ChunkedHead(torch.randn(5, 4), bias=torch.zeros(5))
    assert head.chunks(torch.empty(0, 4)) == head.chunks(torch.empty(0, 4), cuts=[0, 0]) == []
    weight, bias = head.gradients()
    assert weight is not None and bias is not None
    assert weight.shape == (5, 4) and bias.shape == (5,) and not weight.any() and not bias.any()


def test_a_gradient_by_everything_at_once_is_that_of_linear_loss() -> None:
    given = inputs()
    k, o = torch.linspace(-1, 1, 60), torch.linspace(2, -1, 120).view(60, 2)
    given = given._replace(target=given.target.clamp_max(497))
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    out = linear_loss(
        hidden, weight, given.target,
        lambda logprob, entropy, log_odds, c, k, o: (c * logprob).sum() + (k * entropy).sum() + (o * log_odds).sum(),
        rows={"c": given.grad, "k": k, "o": o}, bias=given.bias, entropy=True, mask_columns=(498, 499),
    )  # fmt: skip
    out.loss.backward()
    head = ChunkedHead(given.weight, bias=given.bias, entropy=True, mask_columns=(498, 499))
    chunk = head.forward_chunk(given.hidden, given.target)
    by_hidden = head.backward_chunk(chunk, given.grad, k, o)
    assert by_hidden is not None and hidden.grad is not None and torch.equal(by_hidden, hidden.grad)
    assert torch.equal(head.gradients()[0], weight.grad)  # type: ignore[arg-type]


def test_a_chunk_goes_backward_once_and_before_the_next() -> None:
    """A gradient by the entropy changes E, and the next chunk takes its place."""
    given = inputs()
    head = ChunkedHead(given.weight, entropy=True)
    first = head.forward_chunk(given.hidden[:30], given.target[:30])
    second = head.forward_chunk(given.hidden[30:], given.target[30:])
    once = "call it once, before the next forward_chunk"
    with pytest.raises(ValueError, match=once):
        head.backward_chunk(first, given.grad[:30])
    head.backward_chunk(second, given.grad[30:], given.grad[30:])
    with pytest.raises(ValueError, match=once):
        head.backward_chunk(second, given.grad[30:])
    looking = ChunkedHead(given.weight, needs=(False, False, False))
    with pytest.raises(ValueError, match="where needs is not all False"):
        looking.backward_chunk(looking.forward_chunk(given.hidden, given.target), given.grad)


@pytest.mark.parametrize(
    ("message", "shapes", "options"),
    [
        (r"grad \(60, 1\) must be \[60\]", [(60, 1)], {}),
        (r"grad \(\) must be \[60\]", [()], {}),
        (r"grad_entropy \(60,\) must be None: the head was not asked for it", [(60,), (60,)], {}),
        (r"grad_log_odds \(60,\) must be \[60, 2\]", [(60,)] * 3, {"entropy": True, "mask_columns": (0, 1)}),
        ("a patched target has a gradient by log-probs only", [(60,), (60,)], {"entropy": True, "patch_target": True}),
    ],
)
def test_gradients_that_do_not_fit_the_chunk(message: str, shapes: list[tuple[int, ...]], options: Any) -> None:
    given = inputs()
    head = ChunkedHead(given.weight, **options)
    chunk = head.forward_chunk(given.hidden, given.target)
    with pytest.raises(ValueError, match=message):
        head.backward_chunk(chunk, *(torch.ones(shape) for shape in shapes))
    assert head.backward_chunk(chunk, torch.ones(60).double()) is not None  # it is not used up; another type is taken


def test_cuts_are_of_all_rows() -> None:
    head = ChunkedHead(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"cuts must ascend from 0 to 8, the number of rows, not \[0, 5\]"):
        head.chunks(torch.empty(8, 4), cuts=[0, 5])


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "temperature must be positive", {"temperature": -1.0}),
        (ValueError, "softcap must be positive", {"softcap": 0.0}),
        (ValueError, r"mask_columns \[500\] must be different ids in \[0, 500\)", {"mask_columns": [500]}),
        (ValueError, "main_grad .* must be contiguous", {"main_grad": torch.zeros(500, 3)}),
        (ValueError, "one row needs 2000 bytes, workspace_bytes is 1999", {"workspace_bytes": 1999}),
        (TypeError, "bias is torch.float64", {"bias": torch.zeros(500).double()}),
    ],
)
def test_what_it_refuses(kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    given = inputs()
    with pytest.raises(kind, match=message):
        loop(given, ChunkedHead(given.weight, **options))
