"""Groups that share a prompt: packed whole or in parts, laid out with one copy of the prompt."""

import bisect
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg_packing.pack import Cost, PackedArrays, Packing, lay_out, pack


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Lengths, prompt lengths, group ids in any order, and a cap that holds each prompt with one response."""
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 40), min_size=1, max_size=9)), max_size=9)
    )
    rows = [
        (prompt + response, prompt, 7 * g - 20)
        for g, (prompt, responses) in enumerate(shapes)
        for response in responses
    ]
    rows = draw(st.permutations(rows))
    cap = max((length for length, _, _ in rows), default=1) + draw(st.integers(0, 150))
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], cap


def textbook(sizes: list[int], cap: int) -> int:
    """How many bins best-fit decreasing opens, with a sorted list of the bins' rooms."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        best = bisect.bisect_left(rooms, size)
        bisect.insort(rooms, (rooms.pop(best) if best < len(rooms) else cap) - size)
    return len(rooms)


def parts(packing: Packing, groups: list[int]) -> list[list[list[int]]]:
    """For each bin, its runs of sequences of one group."""
    return [[list(run) for _, run in groupby(members.tolist(), key=groups.__getitem__)] for members in packing.bins]


@settings(max_examples=300, deadline=None)
@given(grouped(), st.integers(1, 5), st.sampled_from([None, Cost(1, 0.01)]))
def test_groups_stay_whole_unless_over_the_cap(
    problem: tuple[list[int], list[int], list[int], int], ranks: int, cost: Cost | None
) -> None:
    lengths, prompts, groups, cap = problem
    packing = pack(lengths, cap, ranks=ranks, groups=groups, prompt_lengths=prompts, cost=cost)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert len(packing) % ranks == 0
    bins = parts(packing, groups)
    pieces: dict[int, int] = {}
    sizes = []
    for runs in bins:
        assert len({groups[run[0]] for run in runs}) == len(runs), "a group is in two places of one bin"
        tokens = [prompts[run[0]] + sum(lengths[i] - prompts[i] for i in run) for run in runs]
        assert sum(tokens) <= cap
        assert tokens == sorted(tokens, reverse=True)
        sizes += tokens
        for run in runs:
            pieces[groups[run[0]]] = pieces.get(groups[run[0]], 0) + 1
            assert [(-lengths[i], i) for i in run] == sorted((-lengths[i], i) for i in run)
    for group, count in pieces.items():
        members = [i for i in range(len(lengths)) if groups[i] == group]
        prompt, responses = prompts[members[0]], [lengths[i] - prompts[i] for i in members]
        whole = prompt + sum(responses) <= cap
        assert count == (1 if whole else textbook(responses, cap - prompt))
    assert len(packing) < textbook(sizes, cap) + ranks
    again = pack(np.array(lengths), cap, ranks=ranks, groups=groups, prompt_lengths=prompts, cost=cost)
    assert np.array_equal(packing.order, again.order) and np.array_equal(packing.offsets, again.offsets)


@settings(max_examples=100, deadline=None)
@given(grouped(), st.integers(1, 4))
def test_groups_of_one_are_plain_sequences(problem: tuple[list[int], list[int], list[int], int], ranks: int) -> None:
    lengths, prompts, _, cap = problem
    alone = pack(lengths, cap, ranks=ranks, groups=range(len(lengths)), prompt_lengths=prompts)
    plain = pack(lengths, cap, ranks=ranks)
    assert np.array_equal(alone.order, plain.order) and np.array_equal(alone.offsets, plain.offsets)


def test_a_long_group_is_split_by_best_fit() -> None:
    # prompt 10 and responses 50, 40, 30, 20 under a cap of 90: 80 a part, so {50, 30} and {40, 20}, then others fill up
    lengths, prompts, groups = [60, 50, 40, 30, 10, 20], [10, 10, 10, 10, 5, 5], [0, 0, 0, 0, 1, 2]
    packing = pack(lengths, 90, groups=groups, prompt_lengths=prompts)
    assert [members.tolist() for members in packing.bins] == [[0, 2], [1, 3, 5], [4]]


def test_shared_prompts_count_once_in_the_balance() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 8)
    prompts = np.repeat(random.integers(50, 1500, 400), 8)
    lengths = prompts + np.clip(random.lognormal(5, 0.8, 3200), 1, 1000).astype(np.int64)
    cost = Cost(1, 1 / 4000)
    packing = pack(lengths, 16_384, ranks=8, groups=groups, prompt_lengths=prompts, cost=cost)
    assert len(packing) >= 64
    totals = np.zeros(8)
    for b, runs in enumerate(parts(packing, groups.tolist())):
        for run in runs:
            prompt = float(cost(prompts[run[0]]))
            totals[b % 8] += prompt + sum(float(cost(lengths[i])) - prompt for i in run)
    assert totals.max() <= 1.005 * totals.mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap": 8}, "sequence 1 has 9 tokens, more than the cap of 8"),
        ({"prompt_lengths": [2, 0, 3]}, r"sequence 1 has a prompt of 0 tokens; it must lie in 1\.\.9"),
        ({"prompt_lengths": [2, 2, 8]}, r"sequence 2 has a prompt of 8 tokens; it must lie in 1\.\.7"),
        ({"prompt_lengths": [2, 3, 3]}, r"sequence 1 has a prompt of 3 tokens, but sequence 0 .* \(4\) one of 2"),
        ({"prompt_lengths": None}, "groups and prompt_lengths together"),
        ({"groups": None}, "groups and prompt_lengths together"),
        ({"groups": [4, 4]}, "3 lengths, but 2 groups and 3 prompt_lengths"),
        ({"groups": [0.5, 1.0, 2.0]}, "groups must be integers"),
    ],
)
def test_errors_name_the_sequence_and_the_fix(change: dict[str, Any], message: str) -> None:
    arguments = {"lengths": [5, 9, 7], "cap": 20, "groups": [4, 4, -1], "prompt_lengths": [2, 2, 3], **change}
    with pytest.raises(ValueError, match=message):
        pack(**arguments)


Batch = tuple[list[tuple[int, list[int], list[int], float]], list[int]]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Sequences as (group, prompt, response, coefficient), and a bin of them in any order."""
    ids = st.lists(st.integers(0, 99), max_size=6)
    prompts = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=3))
    row = st.tuples(st.integers(0, len(prompts) - 1), ids, st.floats(-2, 2, width=32))
    rows = [(g - 1, prompts[g], response, c) for g, response, c in draw(st.lists(row, max_size=8))]
    members = draw(st.permutations(range(len(rows))))
    return rows, members[: draw(st.integers(0, len(members)))]


def flat(rows: list[tuple[int, list[int], list[int], float]]) -> dict[str, Any]:
    return {
        "tokens": [token for _, prompt, response, _ in rows for token in prompt + response],
        "offsets": np.cumsum([0] + [len(prompt) + len(response) for _, prompt, response, _ in rows]),
        "prompt_lengths": [len(prompt) for _, prompt, _, _ in rows],
        "coefficients": [c for *_, c in rows],
    }


def plainly(rows: list[tuple[int, list[int], list[int], float]], members: list[int]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {name: [] for name in PackedArrays.__dataclass_fields__}
    out["cu_seqlens"], out["cu_responses"] = [0], [0]
    runs = [list(run) for _, run in groupby(members, key=lambda m: rows[m][0])]
    for run in runs:
        out["input_ids"] += rows[run[0]][1]
        out["position_ids"] += range(len(rows[run[0]][1]))
        out["cu_seqlens"].append(len(out["input_ids"]))
    for p, run in enumerate(runs):
        for member in run:
            _, prompt, response, coefficient = rows[member]
            for j, token in enumerate(response):
                out["response_index"].append(len(out["input_ids"]) - 1 if j else out["cu_seqlens"][p + 1] - 1)
                out["position_ids"].append(len(prompt) + j)
                out["input_ids"].append(token)
                out["targets"].append(token)
                out["sequence_ids"].append(member)
                out["coefficients"].append(coefficient)
            out["cu_seqlens"].append(len(out["input_ids"]))
        out["cu_responses"].append(len(out["targets"]))
    return out


@settings(max_examples=200, deadline=None)
@given(batches())
def test_shared_layout_is_its_plain_definition(batch: Batch) -> None:
    rows, members = batch
    arrays = lay_out(**flat(rows), groups=[g for g, *_ in rows], members=members)
    assert {name: array.tolist() for name, array in vars(arrays).items()} == plainly(rows, members)
    dtypes = {name: array.dtype for name, array in vars(arrays).items()}
    assert dtypes.pop("cu_seqlens") == dtypes.pop("cu_responses") == np.int32
    assert dtypes.pop("coefficients") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int64)}
    runs = [list(run) for _, run in groupby(members, key=lambda m: rows[m][0])]
    assert len(arrays.cu_prompts) == len(runs) + 1 and arrays.cu_prompts[-1] + len(arrays.targets) == len(
        arrays.input_ids
    )
    segments = [*(rows[run[0]][1] for run in runs), *(rows[m][2] for m in members)]
    assert arrays.max_length == max(map(len, segments), default=0)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_response_tokens_are_those_of_the_unshared_layout(batch: Batch) -> None:
    """The same targets under the same coefficients, predicted after the same tokens at the same positions."""
    rows, members = batch
    shared = lay_out(**flat(rows), groups=[g for g, *_ in rows], members=members)
    plain = lay_out(**flat(rows), members=members)
    for name in ("targets", "sequence_ids", "coefficients"):
        assert np.array_equal(getattr(shared, name), getattr(plain, name))
    for name in ("input_ids", "position_ids"):
        a, b = (getattr(arrays, name)[arrays.response_index] for arrays in (shared, plain))
        assert np.array_equal(a, b)


def test_packed_groups_keep_every_token_under_the_cap() -> None:
    random = np.random.default_rng(1)
    shapes = [(g, random.integers(0, 99, random.integers(1, 60)).tolist()) for g in range(40)]
    rows = [
        (g, prompt, random.integers(0, 99, random.integers(0, 90)).tolist(), float(i))
        for g, prompt in shapes
        for i in range(8)
    ]
    arrays, groups, cap = flat(rows), [g for g, *_ in rows], 256
    packing = pack(np.diff(arrays["offsets"]), cap, groups=groups, prompt_lengths=arrays["prompt_lengths"])
    seen: dict[int, tuple[list[int], list[int]]] = {}
    for members in packing.bins:
        bin_ = lay_out(**arrays, groups=groups, members=members)
        assert len(bin_.input_ids) <= cap
        segments = [bin_.input_ids[a:b].tolist() for a, b in pairwise(bin_.cu_seqlens.tolist())]
        runs = [list(run) for _, run in groupby(members.tolist(), key=groups.__getitem__)]
        responses = iter(segments[len(runs) :])
        for prompt, run in zip(segments[: len(runs)], runs, strict=True):
            for member in run:
                seen[member] = (prompt, next(responses))
    assert {m: (rows[m][1], rows[m][2]) for m in range(len(rows))} == seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [2]}, "no sequence 2"),
        ({"prompt_lengths": [1, 0]}, "sequence 1 has no prompt token"),
        ({"prompt_lengths": [1, 2]}, "sequences 0 and 1 of group 3 have different prompts"),
        ({"tokens": [1, 2, 3, 9, 5]}, "sequences 0 and 1 of group 3 have different prompts"),
        ({"offsets": [0, 3, 9]}, "sequence 1 lies outside the tokens"),
        ({"groups": [3]}, "as many groups"),
        ({"groups": [0.5, 0.5]}, "groups must be integers"),
        ({"coefficients": [1.0]}, "as many coefficients"),
    ],
)
def test_layout_errors_name_the_sequences(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": [1, 2, 3, 1, 5],
        "offsets": [0, 3, 5],
        "prompt_lengths": [1, 1],
        "coefficients": [0.5, 1.0],
        "groups": [3, 3],
        "members": [0, 1],
    }
    assert lay_out(**arguments).input_ids.tolist() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match=message):
        lay_out(**{**arguments, **change})
