"""`method: marginal` as CUDA gets it, at real sizes and without a GPU: the same update (see test_cuda_route_update.py),
whose head also gives the hazards first.

Its head is no single operator, so what runs here is the route of cards without the fused GEMM, its kernel's launches
left out; where tensors of 16 bits are summed in float32, the fake CPU widens the factors, which CUDA need not.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedModel

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig
from gapg.marginal_loss import MarginalLoss, Masked
from gapg.optim import make_optimizer
from gapg.update import policy_update
from gapg_kernels import cublas_odds, routes
from tests.cuda_route.real_sizes import FULL, HALF, VOCAB, Operators, fake_policy, qwen
from tests.cuda_route.test_cuda_route_update import (
    CAP,
    PROMPTS,
    SAVINGS,
    check_optimizer,
    check_shared_attention,
    examples,
    fake_model,
    layer_weights,
    settings,
    work,
)
from tests.kernels.counting import Launch, triton_launches

NO_SKIP = tuple(name for name in SAVINGS if name != "skip_zero_advantage")
RIGHT = torch.tensor([[1.0, 0.0] * 4] * 3 + [[0.0] * 8] * 2 + [[1.0] * 8])
HELP = 7
"""The token that begins the phrase."""

pytestmark = pytest.mark.usefixtures("flash_everywhere")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    monkeypatch.setattr(routes, "route", lambda hidden: cublas_odds.cublas_odds)
    with triton_launches() as found:
        yield found


def masked_examples(places: float) -> list[Example]:
    """Where the phrase is one token it can begin everywhere, else after its first ones. No two are equal."""
    found = []
    for e in examples():
        ids = [HELP + 1 + e.sample, *e.response_ids[1:]]
        at = set(range(len(ids))) if places >= len(ids) else {len(ids) // 2, len(ids) - 1}
        deciding = [(HELP,) if t in at else () for t in range(len(ids))]
        found.append(replace(e, response_ids=ids, deciding=deciding))
    return found


def marginal_settings(on: tuple[str, ...], **overrides: str) -> RunConfig:
    return settings(on, method="marginal", **overrides)


def masked() -> Masked:
    return Masked(torch.ones(len(RIGHT)), torch.full_like(RIGHT, torch.nan))


def update(model: PreTrainedModel, config: RunConfig, given: list[Example]) -> Operators:
    """What an update calls until it reads the gradient norm."""
    optimizer = make_optimizer(model, config.optim)
    with pytest.raises(DataDependentOutputException), Operators() as operators:
        policy_update(model, optimizer, config, 0, given, RIGHT, masked=masked())
    return operators


class Product(NamedTuple):
    """One matrix product [m, k] x [k, n]."""

    m: int
    k: int
    n: int
    dtypes: frozenset[torch.dtype]

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


def products(operators: Operators) -> list[Product]:
    found = []
    for name in ("aten.mm", "aten.addmm", "aten.addmm_"):
        for call in operators.calls[name]:
            a, b = call.args[-2:] if name != "aten.mm" else call.args[:2]
            found.append(Product(a.shape[0], a.shape[1], b.shape[1], frozenset({a.dtype, b.dtype})))
    return found


def check_products(operators: Operators, body_flops: int, rows: int, places: int, hidden: int) -> None:
    """The body's in 16 bits; the head's are three of all rows, and one of the places; a column's own are thin."""
    found = products(operators)
    of_head = [p for p in found if VOCAB in (p.m, p.k, p.n) and 1 not in (p.m, p.k, p.n)]
    of_column = [p for p in found if 1 in (p.m, p.k, p.n)]
    of_body = [p for p in found if p not in of_head and p not in of_column]
    assert sum(p.flops for p in of_body) == body_flops
    assert {p.dtypes for p in of_body} == {frozenset({HALF})}
    assert sum(p.flops for p in of_head) == (6 * rows + 2 * places) * hidden * VOCAB
    forward = [p for p in of_head if (p.k, p.n) == (hidden, VOCAB)]
    assert sum(p.m for p in forward) == rows + places
    assert sum(p.flops for p in of_column) < 1e-4 * sum(p.flops for p in of_head)
    copies = [(call.args[0], call.result) for call in operators.calls["aten._to_copy"] if VOCAB in call.args[0].shape]
    assert {b.dtype for a, b in copies if a.dtype == FULL} == {HALF}, "the master is rounded for the head"
    assert any(a.shape[-1] == VOCAB for a, _ in copies) and {a.dtype for a, _ in copies if a.shape[-1] == VOCAB} == {
        HALF
    }, "and E is stored so"


def places_of(given: list[Example]) -> int:
    return sum(bool(tokens) for e in given for tokens in e.deciding)


@pytest.mark.parametrize(("name", "places"), [("0.5B", math.inf), ("1.5B", 2)])
def test_an_update_is_gapgs_and_the_heads_forward_where_the_phrase_could_begin(
    name: str, places: float, launches: list[Launch]
) -> None:
    """All responses are trained on, right or wrong together: no two are worth the same."""
    shape, given = qwen(name, layers=1), masked_examples(places)
    model, config = fake_model(shape), marginal_settings(SAVINGS)
    operators = update(model, config, given)
    tokens, rows, _ = work(NO_SKIP)
    body = 6 * sum(layer_weights(shape).values()) * tokens
    check_products(operators, body, rows, places_of(given), shape.hidden_size)
    micro_batches = check_shared_attention(operators, shape, tokens, 1)
    assert 1 < micro_batches == len(operators.calls["aten.embedding"])
    assert len(launches) >= 2 * micro_batches, "in the head's kernels: the hazards, then the loss"
    check_optimizer(operators, model)


def test_groups_over_several_micro_batches_cost_a_forward_more() -> None:
    """Their responses' worth hangs on one another's hazards, so those are computed first, of all of them."""
    shape, given = qwen("0.5B", layers=1), [e for e in masked_examples(2) if e.group in (2, 4)]
    config = marginal_settings(("pack", "response_positions"), token_cap="5000")
    batches = packed_batches(given, 5000, torch.device("cpu"), whole_groups=True)
    spread = [b for b in batches if b.decisions is not None and not b.decisions.whole]
    assert 1 < len(spread) < len(batches)
    model = fake_model(shape)
    operators = update(model, config, given)
    tokens, twice = (sum(b.input_ids.numel() for b in of) for of in (batches, spread))
    again = sum(len(b.decisions.response) for b in spread if b.decisions is not None)
    rows = sum(len(e.response_ids) for e in given)
    body = (6 * tokens + 2 * twice) * sum(layer_weights(shape).values())
    check_products(operators, body, rows, places_of(given) + again, shape.hidden_size)
    assert len(operators.calls["aten.embedding"]) == len(batches) + len(spread)
    check_optimizer(operators, model)


def fake_batch(batch: PackedBatch, fakes: FakeTensorMode) -> PackedBatch:
    """The same without data, its layouts too."""

    def fake(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return fakes.from_tensor(x)
        return type(x)(map(fake, x)) if isinstance(x, tuple | list) and not hasattr(x, "_make") else x

    found = {f.name: fake(getattr(batch, f.name)) for f in fields(batch)}
    if batch.shared is not None:
        found["shared"] = batch.shared._make(map(fake, batch.shared))
    assert batch.decisions is not None
    found["decisions"] = replace(
        batch.decisions, **{f.name: fake(getattr(batch.decisions, f.name)) for f in fields(batch.decisions)}
    )
    return replace(batch, **found)


@pytest.mark.parametrize(("score", "places"), [("log", 2), ("brier", math.inf), ("price", 2)])
def test_a_micro_batch_asks_its_batch_for_no_value(score: str, places: float) -> None:
    """Neither for its hazards nor for its loss; a read of one would wait for the GPU, and raises here."""
    config = marginal_settings(SAVINGS, **{"marginal.score": score, "loss.tis_cap": "2"})
    batch, *_ = packed_batches(masked_examples(places), CAP, torch.device("cpu"), share=True)
    with FakeTensorMode() as fakes, Operators() as operators:
        model = fake_policy(qwen("1.5B", layers=1))
        fake = fake_batch(batch, fakes)
        known = Masked(torch.ones(len(PROMPTS)), torch.ones(RIGHT.shape))  # fakes too, as they are made here
        loss = MarginalLoss(model, config, fakes.from_tensor(RIGHT), known)
        loss.look_ahead([replace(fake, decisions=replace(fake.decisions, whole=False))])
        out = loss(fake, 48.0)
        out.loss.backward()
    assert not operators.calls["aten._local_scalar_dense"]
    assert (out.logprob.dtype, out.logprob.shape) == (FULL, batch.target.shape)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.dtype, parameter.grad.shape) == (FULL, parameter.shape), name
