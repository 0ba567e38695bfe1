"""The roofline's invariants: what must hold whatever the rates are."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import record, roofline
from bench.roofline import CARDS, HEADS, SHAPES, Card, Head, Shape

BY_NAME = {head.name: head for head in HEADS}
OURS = BY_NAME["ours"]

cards = st.builds(
    Card,
    name=st.just("any"),
    gemm_flops=st.floats(1e12, 1e16),
    hbm_bytes=st.floats(1e11, 1e14),
    exponentials=st.floats(1e11, 1e14),
    launch=st.floats(0, 1e-4),
)
shapes = st.builds(Shape, st.integers(256, 40_000), st.integers(128, 8_192), st.integers(1_000, 200_000))


def best(head: Head, shape: Shape, card: Card) -> float:
    return roofline.bounds(roofline.terms(head, shape, card))[0]


def worst(head: Head, shape: Shape, card: Card) -> float:
    return roofline.bounds(roofline.terms(head, shape, card))[1]


@settings(max_examples=50)
@given(cards, shapes, st.sampled_from(HEADS))
def test_terms_add_up_and_nothing_is_under_its_floor(card: Card, shape: Shape, head: Head) -> None:
    parts = roofline.terms(head, shape, card)
    low, high = roofline.bounds(parts)
    assert parts.keys() == roofline.TERMS.keys() and all(seconds >= 0 for seconds in parts.values())
    assert math.isclose(sum(parts.values()), high)
    assert roofline.floor(head, shape, card) <= low * (1 + 1e-9) <= high * (1 + 2e-9)


@settings(max_examples=50)
@given(cards, shapes)
def test_every_design_that_does_more_work_is_slower(card: Card, shape: Shape) -> None:
    assert worst(OURS, shape, card) <= worst(BY_NAME["ours, E recomputed"], shape, card)
    for less in ("ours, forward only", "ours, frozen weight", "ours, half the rows zero"):
        assert worst(BY_NAME[less], shape, card) <= worst(OURS, shape, card)


@settings(max_examples=30)
@given(cards, shapes, st.sampled_from(HEADS))
def test_a_faster_card_is_never_slower(card: Card, shape: Shape, head: Head) -> None:
    faster = dataclasses.replace(card, hbm_bytes=1.4 * card.hbm_bytes)
    assert worst(head, shape, faster) <= worst(head, shape, card)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_designs_at_the_shapes_we_care_about(shape: Shape) -> None:
    """The odds form's reason to exist, at the stated rates: no design of the table that trains a head is below it."""
    others = [BY_NAME[n] for n in ("ours, E recomputed", "control: cuBLAS + one pass", "chunked over V")]
    others.append(BY_NAME["logits, then d(logits)"])
    for card in CARDS:
        assert all(best(OURS, shape, card) < best(other, shape, card) for other in others)
        products = roofline.terms(OURS, shape, card)["GEMMs"]
        assert math.isclose(products, 6 * math.prod(shape) / card.gemm_flops)
        assert math.isclose(products, roofline.floor(OURS, shape, card))


def test_fewer_chunks_read_and_write_the_sum_of_dw_less_often() -> None:
    shape, card = SHAPES[1], CARDS[0]
    counts = [roofline.chunk_count(OURS, shape, workspace=gib << 30) for gib in (1, 2, 4, 8)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 1
    sums = [roofline.terms(OURS, shape, card, workspace=gib << 30)["sum of dW"] for gib in (1, 2, 4, 8)]
    assert all(math.isclose(s / sums[0], n / counts[0]) for s, n in zip(sums, counts, strict=True))


def test_the_files_hold_every_prediction_with_its_assumptions(tmp_path: Path) -> None:
    rows = roofline.write(tmp_path)
    found = json.loads((tmp_path / "roofline.json").read_text())
    assert found["predicted"] is True and found["rows"] == json.loads(json.dumps(rows))
    assert len(rows) == len(CARDS) * len(SHAPES) * len(HEADS)
    assert {card["name"] for card in found["assumptions"]["cards"]} == {"H100", "H200"}
    assert (tmp_path / "roofline.png").stat().st_size > 20_000
    committed = json.loads((roofline.RESULTS / "roofline.json").read_text())
    assert found == committed, "the assumptions changed: python bench/roofline.py"


def test_a_measurement_is_set_beside_its_prediction() -> None:
    case = str(SHAPES[0])
    measured = {
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "rows": [
            {"case": "x", "shape": case, "impl": "gapg", "metric": "time", "median": 0.012, "predicted_as": "ours"},
            {"case": "x", "shape": case, "impl": "other", "metric": "time", "median": 0.5},
            record.error_row(case, "gone", "not installed"),
        ],
    }
    text = roofline.compare(measured)
    assert "12.00" in text and "500" not in text
    with pytest.raises(ValueError, match="no prediction for 'NVIDIA T4'"):
        roofline.compare(measured | {"machine": {"device": "NVIDIA T4"}})
