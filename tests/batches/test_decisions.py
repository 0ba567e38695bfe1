"""Where the help phrase could begin in the rows of packed batches: a row's own tokens, a response's own places."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.batches.decisions import Tokens

CPU = torch.device("cpu")
KINDS: list[Tokens] = [(), (7,), (7, 8), (3,)]
LAYOUTS = {
    "packed": {"whole_groups": True},
    "anywhere": {},
    "shared": {"share": True, "whole_groups": True},
    "padded": {"padded": True},
    "every position": {"every_position": True, "whole_groups": True},
    "padded, every position": {"padded": True, "every_position": True},
}
Deciding = list[list[list[Tokens]]]
groups = st.lists(
    st.lists(st.lists(st.sampled_from(KINDS), max_size=6), min_size=1, max_size=4), min_size=1, max_size=5
).filter(lambda found: any(any(response) for response in found))


def examples_of(deciding: Deciding) -> list[Example]:
    """Whose rows say by their log-prob which they are: the number of the token, of all response tokens."""
    starts = iter(accumulate((len(kinds) for group in deciding for kinds in group), initial=0))
    return [
        Example([1, 2], [5] * len(kinds), rollout_logprobs=[at + t for t in range(len(kinds))], group=p, sample=i,
                deciding=kinds)
        for p, group in enumerate(deciding)
        for i, kinds in enumerate(group)
        for at in [next(starts)]
    ]  # fmt: skip


def rows_of_parts(batch: PackedBatch) -> list[tuple[Tokens, list[int]]]:
    assert batch.decisions is not None
    everything = list(range(len(batch.target)))
    return [(tokens, everything if rows is None else rows.tolist()) for tokens, rows in batch.decisions.parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(deciding=groups, cap=st.integers(8, 40))
@settings(max_examples=30)
def test_each_row_and_each_response_has_its_own(layout: str, deciding: Deciding, cap: int) -> None:
    examples = examples_of(deciding)
    wanted = [(e.group, e.sample, kind) for e in examples for kind in e.deciding]
    seen = []
    batches = packed_batches(examples, cap, CPU, **LAYOUTS[layout])
    of_batch = []
    for batch in batches:
        found, parts = batch.decisions, rows_of_parts(batch)
        assert found is not None
        assert sorted(row for _, rows in parts for row in rows) == list(range(len(batch.target)))
        assert len({tokens for tokens, _ in parts}) == len(parts)
        cells = list(zip(found.group.tolist(), found.sample.tolist(), strict=True))
        assert len(set(cells)) == len(cells)
        of_batch.append((found.whole, {(g, s) for g, s in cells}))
        places = [row for tokens, rows in parts if tokens for row in rows]
        assert len(found.response) == len(places)
        for b, cell in enumerate(cells):
            mine = [n for n in found.place[b].tolist() if n < len(places)]
            assert mine == sorted(mine) and mine == [n for n, r in enumerate(found.response.tolist()) if r == b]
            assert {(int(batch.group[places[n]]), int(batch.sample[places[n]])) for n in mine} <= {cell}
        assert ((found.place >= 0) & (found.place <= len(places))).all()
        for tokens, rows in parts:
            for row in rows:
                if batch.target[row] == -100:
                    assert tokens == ()
                    continue
                number = int(batch.rollout_logprob[row])
                assert wanted[number] == (int(batch.group[row]), int(batch.sample[row]), tokens)
                seen.append(number)
    assert sorted(seen) == list(range(len(wanted)))
    for whole, cells in of_batch:
        here = {g for g, _ in cells}
        assert whole == (not any({g for g, _ in others} & here for _, others in of_batch if others is not cells))


def test_without_them_there_is_no_layout() -> None:
    (batch,) = packed_batches([Example([1], [2, 3])], 10, CPU)
    assert batch.decisions is None


@pytest.mark.parametrize("share", [False, True])
def test_groups_that_fit_stay_whole(share: bool) -> None:
    """Ten groups of four, five of which would fit a batch by their tokens."""
    examples = [Example([1], [2, 3], group=p, sample=i, deciding=[(7,), ()]) for p in range(10) for i in range(4)]
    for batch in packed_batches(examples, 30, CPU, share=share, whole_groups=True):
        assert batch.decisions is not None and batch.decisions.whole
    for batch in packed_batches(examples, 7, CPU, share=share, whole_groups=True):
        assert batch.decisions is not None and not batch.decisions.whole
