"""The roofline's invariants: what must hold whatever the rates are."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import record
import roofline
import roofline_report
from gapg_kernels.tiles import TILES
from roofline_designs import CARDS, HEADS, SHAPES, Card, Head, Range, Shape

BY_NAME = {head.name: head for head in HEADS}
OURS, PAIR = BY_NAME["ours"], BY_NAME["ours, pair tile"]
L2, EPILOGUE = "L2 beyond the products", "epilogue"

rates = st.floats(1e11, 1e14)
cards = st.builds(
    Card,
    name=st.just("any"),
    gemm_flops=st.floats(1e12, 1e16),
    hbm_bytes=rates,
    l2_bytes=st.tuples(rates, rates).map(lambda pair: Range(max(pair), min(pair))),
    clock=st.floats(1e8, 1e10),
    launch=st.floats(0, 1e-4),
)
shapes = st.builds(Shape, st.integers(256, 40_000), st.integers(128, 8_192), st.integers(1_000, 200_000))


def best(head: Head, shape: Shape, card: Card) -> float:
    return roofline.bounds(roofline.terms(head, shape, card)).best


def worst(head: Head, shape: Shape, card: Card) -> float:
    return roofline.bounds(roofline.terms(head, shape, card)).worst


@settings(max_examples=100)
@given(cards, shapes, st.sampled_from(HEADS))
def test_terms_add_up_and_nothing_is_under_its_floor(card: Card, shape: Shape, head: Head) -> None:
    parts = roofline.terms(head, shape, card)
    low, high = roofline.bounds(parts)
    assert parts.keys() == roofline.TERMS.keys()
    assert all(0 <= part.best <= part.worst * (1 + 1e-9) for part in parts.values())
    assert math.isclose(sum(part.worst for part in parts.values()), high)
    assert roofline.floor(head, shape, card) <= low * (1 + 1e-9) <= high * (1 + 2e-9)


@settings(max_examples=50)
@given(cards, shapes)
def test_every_design_that_does_more_work_is_slower(card: Card, shape: Shape) -> None:
    assert worst(OURS, shape, card) <= worst(BY_NAME["ours, E recomputed"], shape, card)
    for less in ("ours, forward only", "ours, frozen weight"):
        assert worst(BY_NAME[less], shape, card) <= worst(OURS, shape, card)
    half, whole = (roofline.terms(head, shape, card) for head in (BY_NAME["ours, half the rows zero"], OURS))
    # Fewer rows may fill their last wave worse, and their last tile, which reads as much of L2 as a full one.
    for name in half.keys() - {"last waves of dH", L2}:
        assert half[name].worst <= whole[name].worst * (1 + 1e-9), name  # but for rounding


@settings(max_examples=50)
@given(cards, shapes, st.sampled_from(HEADS), st.sampled_from(["hbm_bytes", "l2_bytes", "clock"]))
def test_a_faster_card_is_never_slower(card: Card, shape: Shape, head: Head, rate: str) -> None:
    value = getattr(card, rate)
    faster = Range(1.4 * value.best, 1.4 * value.worst) if isinstance(value, Range) else 1.4 * value
    better = dataclasses.replace(card, **{rate: faster})
    assert worst(head, shape, better) <= worst(head, shape, card)
    assert best(head, shape, better) <= best(head, shape, card)


@settings(max_examples=50)
@given(cards, shapes)
def test_the_wider_tile_asks_less_of_l2_and_two_programs_hide_more_of_their_epilogues(card: Card, shape: Shape) -> None:
    wide, pair = roofline.terms(OURS, shape, card), roofline.terms(PAIR, shape, card)
    assert wide[L2].best <= pair[L2].best and wide[L2].worst <= pair[L2].worst
    assert 0 <= pair[EPILOGUE].best <= pair[EPILOGUE].worst and wide[EPILOGUE].best > 0
    covered = wide["GEMMs"].best / OURS.gemms  # by the products of a forward
    assert pair[EPILOGUE].best <= max(0.0, pair[EPILOGUE].worst - covered) * (1 + 1e-9)
    for name in wide.keys() - {L2, EPILOGUE}:
        assert wide[name] == pair[name], name


@pytest.mark.parametrize(("head", "terabytes"), [(OURS, 9.3), (PAIR, 12.3)], ids=["wide", "pair"])
def test_what_l2_must_deliver_at_the_stated_gemm_rate(head: Head, terabytes: float) -> None:
    """(bm + bn) * 2 bytes for bm * bn * 2 flops; an L2 of half that rate takes the products' time once more."""
    shape = Shape(16_384, 2_048, 131_072)
    enough = dataclasses.replace(CARDS[0], l2_bytes=Range(1.01e12 * terabytes, 0.5e12 * terabytes))
    parts = roofline.terms(head, shape, enough)
    assert parts[L2].best == 0
    assert math.isclose(parts[L2].worst, parts["GEMMs"].best / head.gemms, rel_tol=0.02)


@settings(max_examples=50)
@given(cards, shapes, st.sampled_from([head for head in HEADS if head.tile]))
def test_the_share_of_the_epilogue_falls_with_the_hidden_width(card: Card, shape: Shape, head: Head) -> None:
    narrow, wide = (
        roofline.terms(head, shape._replace(hidden=width), card) for width in (shape.hidden, 2 * shape.hidden)
    )
    assert wide[EPILOGUE].worst == narrow[EPILOGUE].worst > 0 and wide[EPILOGUE].best <= narrow[EPILOGUE].best
    assert wide[EPILOGUE].worst / wide["GEMMs"].worst < narrow[EPILOGUE].worst / narrow["GEMMs"].worst


@pytest.mark.parametrize(("width", "share"), [(2_048, 0.09), (1_536, 0.12), (896, 0.20)])
def test_the_epilogue_costs_what_the_instructions_say(width: int, share: float) -> None:
    """About 3,000 clocks a tile: 888 instructions a thread, of which 128 exponentials, against 16 * H of products."""
    parts = roofline.terms(OURS, Shape(16_384, width, 151_936), CARDS[0])
    product = parts["GEMMs"].best / OURS.gemms
    assert parts[EPILOGUE].best / product < share < parts[EPILOGUE].worst / product
    assert roofline.terms(PAIR, Shape(16_384, width, 151_936), CARDS[0])[EPILOGUE].best == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_designs_at_the_shapes_we_care_about(shape: Shape) -> None:
    """The odds form's reason to exist, at the stated rates: no other policy loss is below it. Below it is quack's cross
    entropy only, the same three products with a sum of dW that hides."""
    others = [BY_NAME[n] for n in ("ours, E recomputed", "control: cuBLAS + one pass", "chunked over V")]
    others += [BY_NAME["logits, then d(logits)"], BY_NAME["Liger, sm_90"]]
    for card in CARDS:
        assert all(best(OURS, shape, card) < best(other, shape, card) for other in others)
        assert best(BY_NAME["quack, scaled exp"], shape, card) < best(OURS, shape, card) < best(PAIR, shape, card)
        products = roofline.terms(OURS, shape, card)["GEMMs"].best
        assert math.isclose(products, 6 * math.prod(shape) / card.gemm_flops)
        assert math.isclose(products, roofline.floor(OURS, shape, card))


def test_fewer_chunks_read_and_write_the_sum_of_dw_less_often() -> None:
    shape, card = SHAPES[1], CARDS[0]
    counts = [len(roofline.chunk_rows(OURS, shape, workspace=gib << 30)) for gib in (1, 2, 4, 8)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 1
    sums = [roofline.terms(OURS, shape, card, workspace=gib << 30)["sum of dW"].worst for gib in (1, 2, 4, 8)]
    # 8 bytes an element and chunk, but the first chunk only writes (4 less), and 6 to round the sum
    assert all(math.isclose(s / sums[0], (8 * n + 2) / (8 * counts[0] + 2)) for s, n in zip(sums, counts, strict=True))


def test_the_last_wave_of_dh_idles_what_its_tiles_leave() -> None:
    """Three chunks of 5,632, 5,632 and 5,120 rows: 352, 352 and 320 tiles of 128x256 on 132 multiprocessors."""
    shape, card = SHAPES[1], CARDS[0]
    assert roofline.chunk_rows(OURS, shape) == [5632, 5632, 5120]
    found = roofline.terms(OURS, shape, card)["last waves of dH"]
    rows = 2 * 5632 * (396 / 352 - 1) + 5120 * (396 / 320 - 1)
    assert found.best == 0 and math.isclose(found.worst, 2 * rows * shape.hidden * shape.vocab / card.gemm_flops)
    full = roofline.terms(OURS, Shape(132 * 128, 2_048, 151_936), card, workspace=1 << 40)["last waves of dH"]
    assert full.worst == 0  # 8 waves


def test_the_files_hold_every_prediction_with_its_assumptions(tmp_path: Path) -> None:
    written = roofline.write(tmp_path)
    found = json.loads((tmp_path / "roofline.json").read_text())
    assert found["predicted"] is True and found["rows"] == json.loads(json.dumps(written["rows"]))
    assert len(found["rows"]) == len(CARDS) * len(SHAPES) * len(HEADS)
    assert {card["name"] for card in found["assumptions"]["cards"]} == {"H100", "H200"}
    assert (tmp_path / "roofline.png").stat().st_size > 20_000
    table = roofline_report.table(written["rows"], roofline.TERMS)
    assert all(table.count(f"\n{head.name} ") == len(CARDS) * len(SHAPES) for head in HEADS)
    committed = json.loads((record.RESULTS / "roofline" / "roofline.json").read_text())
    assert found == committed, "the assumptions changed: python bench/roofline.py"


def test_one_sentence_a_card_says_what_is_predicted_for_both_tiles_and_quack() -> None:
    shape, card = SHAPES[1], CARDS[0]
    text = roofline.sentence(card, shape)
    bare = BY_NAME["bare GEMMs, 3"]
    assert text.startswith(f"{card.name}, T H V = {shape}: ") and "with the pair, which should lose; quack's" in text
    for head in (OURS, PAIR, BY_NAME["quack, scaled exp"]):
        low, high = sorted(side(head, shape, card) / side(bare, shape, card) for side in (best, worst))
        assert f"{low:.2f} to {high:.2f}" in text


def test_each_assumption_of_a_design_moves_its_own_term() -> None:
    """Of what no other test here holds: published rates, sums that hide, two forwards, others' exponentials."""
    shape, card = SHAPES[1], CARDS[0]

    def moved(head: Head, **changed: Any) -> dict[str, tuple[Range, Range]]:
        before, after = (
            roofline.terms(head, shape, card),
            roofline.terms(dataclasses.replace(head, **changed), shape, card),
        )
        return {name: (before[name], after[name]) for name in before if before[name] != after[name]}

    liger, quack, twice = (BY_NAME[n] for n in ("Liger, sm_90", "quack, scaled exp", "ours, E recomputed"))
    (products,) = (moved(liger, flops=None, sum_hides=False, written=0, read=0, weight_sum=0)["GEMMs"],)
    assert math.isclose(products[0].best, products[1].best * card.gemm_flops / 698e12)
    assert math.isclose(products[0].worst, products[1].worst * card.gemm_flops / 666e12)
    shown = moved(quack, sum_hides=False)
    assert shown.keys() == {"sum of dW"} and shown["sum of dW"][0].best < shown["sum of dW"][1].best
    assert math.isclose(shown["sum of dW"][0].best, 10 * shape.vocab * shape.hidden / card.hbm_bytes)
    shown = moved(quack, exponentials=0)
    assert shown.keys() == {EPILOGUE} and shown[EPILOGUE][0].best == shown[EPILOGUE][1].worst == 0
    assert math.isclose(shown[EPILOGUE][0].worst, shape.tokens * shape.vocab / 16 / card.clocks.worst)
    shown = moved(twice, forwards=1)
    assert shown.keys() == {L2, EPILOGUE}
    assert all(math.isclose(two.worst, 2 * one.worst) for two, one in shown.values())
    shown = moved(BY_NAME["ours, forward only"], gemms=3)
    assert shown[EPILOGUE][0].worst < shown[EPILOGUE][1].worst  # to store E takes instructions
    counted = roofline.machine_code()
    for head, columns in ((OURS, 256), (PAIR, 128)):
        tile = TILES[9, 0][head.tile or ""]
        assert counted[f"odds_gemm_{head.tile}_store"]["exponentials"] * tile.warps * 32 == tile.bm * columns


def measured(*rows: dict[str, Any], device: str = "NVIDIA H100 80GB HBM3", **machine: Any) -> dict[str, Any]:
    return {"machine": {"device": device, **machine}, "rows": [*rows, record.error_row("x", "gone", "not installed")]}


def timed(shape: Shape, predicted_as: str, seconds: float) -> dict[str, Any]:
    row = {"case": "x", "impl": "any", "metric": "time", "median": seconds}
    return row | {"shape": str(shape), "predicted_as": predicted_as}


@pytest.mark.parametrize("shape", [SHAPES[0], Shape(1_600, 640, 50_257)], ids=str)
def test_a_measurement_is_set_beside_its_prediction_at_any_shape(shape: Shape) -> None:
    low, high = best(OURS, shape, CARDS[0]), worst(OURS, shape, CARDS[0])
    said = {
        0.9 * low: "10% below best: an assumption is too low",
        low + 0.25 * (high - low): "25% of the way from best to worst",
        1.2 * high: "20% above worst: the model lacks a term",
    }
    for seconds, words in said.items():
        line = roofline.compare(measured(timed(shape, "ours", seconds))).splitlines()[-1]
        assert str(shape) in line and f"{seconds * 1e3:.2f}" in line and line.endswith(words)


def test_rows_without_a_prediction_are_left_out() -> None:
    unknown = {"case": "x", "shape": str(SHAPES[0]), "impl": "other", "metric": "time", "median": 0.5}
    rows = [unknown, unknown | {"predicted_as": None}, unknown | {"predicted_as": "of another revision"}]
    rows.append({"case": "x", "impl": "no shape", "metric": "time", "median": 0.5, "predicted_as": "ours"})
    text = roofline.compare(measured(*rows))
    assert "no row of this record has a prediction" in text and "500" not in text
    assert roofline.compare(measured(*rows, timed(SHAPES[0], "chunked over V", 0.4))).count("above worst") == 1


def test_what_the_card_itself_reaches_replaces_the_stated_rates() -> None:
    shape, card = SHAPES[1], CARDS[0]
    ceilings = [
        {"case": "ceiling", "impl": "product of 8192^3, bf16", "unit": "FLOP/s", "median": 0.5 * card.gemm_flops},
        {"case": "ceiling", "impl": "copy of 4 GiB", "unit": "B/s", "median": 0.5 * card.hbm_bytes},
    ]
    seconds = 2 * best(OURS, shape, card)
    stated, own = roofline.compare(measured(timed(shape, "ours", seconds), *ceilings)).split("The same from")
    assert "the model lacks a term" in stated and "395.00 measured" in stated
    assert "of the way from best to worst" in own


def test_a_card_without_a_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="no prediction for 'NVIDIA T4'"):
        roofline.compare(measured(device="NVIDIA T4"))
    with pytest.raises(ValueError, match="'NVIDIA H100 PCIe': the cards are H100 with 132"):
        roofline.compare(measured(device="NVIDIA H100 PCIe", multiprocessors=114))
