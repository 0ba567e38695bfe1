"""Packing against textbook best-fit decreasing, and the layout against its plain definition."""

import bisect
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gapg_packing.pack import Cost, PackedArrays, lay_out, pack

MODELS = [None, Cost(), Cost(3e9, 9e4), Cost(1, 1 / 4000), Cost(0, 1)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a cap that holds them; caps straddle the word (64) and summary (4096) borders of the bitset."""
    cap = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 4095, 4096, 4097, 8193, 300_001])))
    sizes = st.one_of(st.integers(1, cap), st.integers(max(1, cap // 2 - 2), min(cap, cap // 2 + 2)))
    return draw(st.lists(sizes, max_size=60)), cap


def textbook(lengths: list[int], cap: int) -> int:
    """How many bins best-fit decreasing opens, with a sorted list of the bins' rooms."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        best = bisect.bisect_left(rooms, length)
        bisect.insort(rooms, (rooms.pop(best) if best < len(rooms) else cap) - length)
    return len(rooms)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_every_sequence_once_under_the_cap_in_no_more_bins_than_the_textbook(problem: tuple[list[int], int]) -> None:
    lengths, cap = problem
    packing = pack(lengths, cap)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert packing.offsets[0] == 0 and packing.offsets[-1] == len(lengths)
    loads = [sum(lengths[i] for i in members) for members in packing.bins]
    assert all(0 < load <= cap for load in loads)
    assert loads == sorted(loads, reverse=True)
    assert len(packing) == len(packing.bins) == textbook(lengths, cap)
    again = pack(np.array(lengths, np.int32), cap)
    assert np.array_equal(packing.order, again.order) and np.array_equal(packing.offsets, again.offsets)


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(1, 9), st.sampled_from(MODELS))
def test_bins_divide_by_the_ranks(problem: tuple[list[int], int], ranks: int, cost: Cost | None) -> None:
    lengths, cap = problem
    packing = pack(lengths, cap, ranks=ranks, cost=cost)
    sizes = [len(members) for members in packing.bins]
    assert len(packing) % ranks == 0
    assert len(packing) < textbook(lengths, cap) + ranks
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert np.all(np.diff(packing.offsets) >= 0)
    for members in packing.bins:
        inside = [lengths[i] for i in members]
        assert sum(inside) <= cap
        assert inside == sorted(inside, reverse=True)
    assert min(sizes, default=1) > 0 or max(sizes) == 1, "an empty bin while another could have been split"
    again = pack(np.array(lengths, np.int32), cap, ranks=ranks, cost=cost)
    assert np.array_equal(packing.order, again.order) and np.array_equal(packing.offsets, again.offsets)


def test_bins_come_by_decreasing_cost() -> None:
    lengths, cost = [10, 6, 6, 3, 3, 3, 2], Cost(1, 0.5)
    for ranks in (1, 2):
        packing = pack(lengths, 12, ranks=ranks, cost=cost)
        costs = [float(cost(np.take(lengths, members)).sum()) for members in packing.bins]
        for rank in range(ranks):
            assert costs[rank::ranks] == sorted(costs[rank::ranks], reverse=True)


def sample(kind: str, n: int, seed: int) -> np.ndarray:
    """Lengths of 16..8192 from a skewed, a flat, a two-humped and a short-tailed distribution."""
    random = np.random.default_rng(seed)
    if kind == "lognormal":
        return np.clip(random.lognormal(np.log(900), 0.9, n), 16, 8192).astype(np.int64)
    if kind == "uniform":
        return random.integers(16, 8193, n)
    if kind == "bimodal":
        return np.where(random.random(n) < 0.8, random.integers(100, 600, n), random.integers(4000, 8193, n))
    return np.clip(random.normal(1000, 100, n), 16, 8192).astype(np.int64)


KINDS = st.sampled_from(["lognormal", "uniform", "bimodal", "normal"])


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(1000, 3000), st.integers(0, 2**32), st.sampled_from(MODELS), st.sampled_from([2, 4, 8]))
def test_ranks_cost_the_same_within_half_a_percent(kind: str, n: int, seed: int, cost: Cost | None, ranks: int) -> None:
    lengths, cap = sample(kind, n, seed), 16_384
    least = len(pack(lengths, cap))
    assume(least > 7 * ranks)  # 8 bins a rank once their number divides
    packing = pack(lengths, cap, ranks=ranks, cost=cost)
    assert len(packing) == -(-least // ranks) * ranks
    assert max(int(lengths[members].sum()) for members in packing.bins) <= cap
    costs = (cost or Cost())(lengths)
    totals = [sum(float(costs[members].sum()) for members in packing.bins[rank::ranks]) for rank in range(ranks)]
    assert max(totals) <= 1.005 * np.mean(totals)


@settings(max_examples=30, deadline=None)
@given(KINDS, st.integers(0, 2**32), st.sampled_from([64, 72, 80]))
def test_ranks_stay_balanced_where_bins_have_no_room_to_spare(kind: str, seed: int, bins: int) -> None:
    """The smallest cap for which best-fit decreasing needs `bins` bins: hardly a sequence can be moved."""
    lengths, cost = sample(kind, 1200, seed), Cost(3e9, 9e4)
    caps = range(int(lengths.max()), int(lengths.sum()))
    cap = caps[bisect.bisect_left(caps, True, key=lambda cap: len(pack(lengths, cap)) <= bins)]
    packing = pack(lengths, cap, ranks=8, cost=cost)
    totals = [sum(float(cost(lengths[members]).sum()) for members in packing.bins[rank::8]) for rank in range(8)]
    assert len(packing) == bins or len(pack(lengths, cap)) < bins
    assert max(totals) <= 1.005 * np.mean(totals)


@pytest.mark.parametrize("seed", range(5))
def test_added_bins_make_all_bins_emptier(seed: int) -> None:
    """Instead of full bins and a few halves: micro-batches at the same position then hold about the same."""
    lengths = sample("lognormal", 1000, seed)
    loads = [int(lengths[members].sum()) for members in pack(lengths, int(lengths.sum()) // 74, ranks=8).bins]
    assert len(loads) == 80
    assert np.quantile(loads, 0.9) <= 1.02 * np.mean(loads)


def test_bins_that_best_fit_had_to_add_are_filled_evenly_too() -> None:
    # 20 tokens fit 2 bins of 10, but three 6s do not
    loads = [sum([6, 6, 6, 1, 1][i] for i in members) for members in pack([6, 6, 6, 1, 1], 10, ranks=2).bins]
    assert sorted(loads) == [2, 6, 6, 6]


def test_only_the_ratio_of_a_cost_matters() -> None:
    lengths = sample("lognormal", 1000, 0)
    for one, other in [
        (None, Cost(7.0)),
        (Cost(1, 1 / 4000), Cost(4e300, 1e297)),
        (Cost(2, 2**-12), Cost(2**-60, 2**-73)),
    ]:
        a, b = (pack(lengths, 16_384, ranks=8, cost=cost) for cost in (one, other))
        assert np.array_equal(a.order, b.order) and np.array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, -1), (float("nan"), 1), (1, float("inf"))])
def test_costs_are_finite_and_not_negative(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        pack([1, 2], 8, cost=Cost(*weights))


@pytest.mark.parametrize(
    ("lengths", "cap", "bins"),
    [
        ([7] * 8, 8, 8),  # verl #7553: eight sequences that only fit alone
        ([2**14 + 1] * 3 + [2**14], 2**14 + 1, 4),  # TRL #3887: a cap just above a power of two
        ([2**12] * 5, 2**12 + 1, 5),
        ([64, 1] * 4, 2**6 + 1, 4),
        ([1] * 100, 2**31 - 1, 1),
        ([5], 5, 1),
        ([], 8, 0),
    ],
)
def test_cases_that_broke_other_packers(lengths: list[int], cap: int, bins: int) -> None:
    packing = pack(lengths, cap)
    assert len(packing) == bins
    assert all(sum(lengths[i] for i in members) <= cap for members in packing.bins)


def test_fewer_sequences_than_ranks_leave_empty_bins_at_the_end() -> None:
    assert [members.tolist() for members in pack([4, 9], 16, ranks=4).bins] == [[1], [0], [], []]


def test_large_batches_stay_within_one_bin_of_the_lower_bound() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(900), 0.9, 10_000), 16, 8192).astype(np.int64)
    assert len(pack(lengths, 16_384)) <= -(-int(lengths.sum()) // 16_384) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 9, 10], 8), r"sequence 1 has 9 tokens, more than the cap of 8: raise token_cap or lower rollout"),
        (([3, 0], 8), "sequence 1 has 0 tokens"),
        (([3, -4], 8), "sequence 1 has -4 tokens"),
        (([3], 0), "token cap is 0"),
        (([3], -8), "token cap is -8"),
        (([3], 2**31), "token cap"),
        (([3.0], 8), "lengths must be integers, not float64"),
        (([True], 8), "lengths must be integers, not bool"),
        (([[3]], 8), "one dimension"),
    ],
)
def test_errors_name_the_sequence_and_the_fix(arguments: tuple[Any, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


def test_integers_are_read_in_whatever_form_they_come() -> None:
    plain = np.array([3, 7, 5])
    shifted = np.zeros(25, np.uint8)
    shifted[1:] = plain.view(np.uint8)
    forms = [plain.tolist(), plain.astype(np.uint8), plain.astype(">i8"), plain.repeat(2)[::2], plain[::-1][::-1]]
    for lengths in (*forms, shifted[1:].view(np.int64)):
        assert pack(lengths, np.int64(9)).order.tolist() == [2, 0, 1]
        tokens = np.arange(15)
        arrays = lay_out(tokens, [0, 3, 10, 15], lengths, np.ones(3, ">f8"), [1])
        assert arrays.input_ids.tolist() == tokens[3:10].tolist()


@pytest.mark.parametrize("ranks", [0, -1, 2**20 + 1])
def test_ranks_must_be_sensible(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks is {ranks}"):
        pack([3], 8, ranks=ranks)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int], float]], list[int]]:
    """Sequences as (prompt, response, coefficient), and a bin of them in any order."""
    ids = st.integers(0, 2**31)
    sequence = st.tuples(
        st.lists(ids, min_size=1, max_size=5), st.lists(ids, max_size=6), st.floats(-2, 2, width=32, allow_nan=False)
    )
    sequences = draw(st.lists(sequence, max_size=8))
    members = draw(st.permutations(range(len(sequences))))
    return sequences, members[: draw(st.integers(0, len(members)))]


def flat(sequences: list[tuple[list[int], list[int], float]]) -> tuple[Any, ...]:
    tokens = [token for prompt, response, _ in sequences for token in prompt + response]
    offsets = np.cumsum([0] + [len(prompt) + len(response) for prompt, response, _ in sequences])
    return tokens, offsets, [len(prompt) for prompt, _, _ in sequences], [c for _, _, c in sequences]


def plainly(sequences: list[tuple[list[int], list[int], float]], members: list[int]) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {name: [] for name in PackedArrays.__dataclass_fields__ if name != "cu_responses"}
    rows["cu_seqlens"] = [0]
    for member in members:
        prompt, response, coefficient = sequences[member]
        for position, token in enumerate(prompt + response):
            if position >= len(prompt):
                rows["response_index"].append(len(rows["input_ids"]) - 1)
                rows["targets"].append(token)
                rows["sequence_ids"].append(member)
                rows["coefficients"].append(coefficient)
            rows["input_ids"].append(token)
            rows["position_ids"].append(position)
        rows["cu_seqlens"].append(len(rows["input_ids"]))
    return rows


@settings(max_examples=200, deadline=None)
@given(batches())
def test_layout_is_its_plain_definition(batch: tuple[list[tuple[list[int], list[int], float]], list[int]]) -> None:
    sequences, members = batch
    tokens, offsets, prompts, weights = flat(sequences)
    arrays = lay_out(tokens, offsets, prompts, weights, members)
    made = dict(vars(arrays))
    assert made.pop("cu_responses") is None and arrays.cu_prompts.size == 0
    assert {name: array.tolist() for name, array in made.items()} == plainly(sequences, members)
    assert arrays.max_length == max((len(sequences[m][0]) + len(sequences[m][1]) for m in members), default=0)
    dtypes = {name: array.dtype for name, array in made.items()}
    assert dtypes.pop("cu_seqlens") == np.int32 and dtypes.pop("coefficients") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [2]}, "no sequence 2"),
        ({"members": [-1]}, "no sequence -1"),
        ({"prompt_lengths": [1, 0]}, "sequence 1 has no prompt token"),
        ({"prompt_lengths": [4, 1]}, "sequence 0 has a prompt longer than itself"),
        ({"offsets": [0, 3, 9]}, "sequence 1 lies outside the tokens"),
        ({"offsets": [0, 3]}, "one more start"),
        ({"coefficients": [1.0]}, "as many coefficients"),
        ({"tokens": [0.5] * 5}, "tokens must be integers"),
        ({"members": [[0]]}, "members must have one dimension"),
    ],
)
def test_layout_errors_name_the_sequence(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": [1, 2, 3, 4, 5],
        "offsets": [0, 3, 5],
        "prompt_lengths": [1, 1],
        "coefficients": [0.5, 1.0],
        "members": [0, 1],
    }
    with pytest.raises(ValueError, match=message):
        lay_out(**{**arguments, **change})
