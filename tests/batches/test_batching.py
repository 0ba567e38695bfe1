"""Examples into packed micro-batches: nothing lost, nothing over the cap, each token under its own weight."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg.batches.batching import Example, packed_batches

CPU = torch.device("cpu")
tokens = st.lists(st.integers(0, 999), min_size=1, max_size=20)
examples = st.lists(st.builds(Example, tokens, tokens, st.floats(-1, 1, width=32)), min_size=1, max_size=30)


@given(examples, st.integers(40, 120))
@settings(max_examples=50)
def test_every_example_whole_in_one_batch_under_the_cap(batch: list[Example], cap: int) -> None:
    found = []
    for packed in packed_batches(batch, cap, CPU):
        cu = packed.cu_seqlens.tolist()
        assert packed.input_ids.shape == packed.position_ids.shape == (cu[-1],)
        assert cu[-1] <= cap
        assert packed.max_length == max(b - a for a, b in pairwise(cu))
        at = 0
        for a, b in pairwise(cu):
            sequence = packed.input_ids[a:b].tolist()
            assert packed.position_ids[a:b].tolist() == list(range(b - a))
            mine = [r for r in range(at, len(packed.target)) if packed.response_index[r] < b - 1]
            response = packed.target[mine].tolist()
            at += len(mine)
            assert packed.response_index[mine].tolist() == list(range(b - 1 - len(mine), b - 1))
            assert sequence[len(sequence) - len(response) :] == response
            weights = set(packed.weight[mine].tolist())
            assert len(weights) == 1
            found.append((tuple(sequence), tuple(response), weights.pop()))
        assert at == len(packed.target) == len(packed.weight) == len(packed.rollout_logprob)
    expected = [((*e.prompt_ids, *e.response_ids), tuple(e.response_ids), e.weight) for e in batch]
    assert sorted(found) == sorted(expected)


@given(examples, st.integers(40, 120))
@settings(max_examples=25)
def test_no_more_batches_than_twice_what_the_tokens_need(batch: list[Example], cap: int) -> None:
    """Best-fit decreasing leaves at most one bin less than half full."""
    total = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch)
    assert len(packed_batches(batch, cap, CPU)) <= max(1, math.ceil(2 * total / cap))


def test_rollout_logprobs_follow_their_tokens() -> None:
    batch = [Example([1], [10 * i + 1, 10 * i + 2], 1.0, [-i - 0.25, -i - 0.5]) for i in range(1, 9)]
    batch.append(Example([1], [3], 1.0))  # an engine that gave none
    for packed in packed_batches(batch, 7, CPU):
        for target, logprob in zip(packed.target.tolist(), packed.rollout_logprob.tolist(), strict=True):
            if target == 3:
                assert math.isnan(logprob)
            else:
                assert logprob == -(target // 10) - (0.25 if target % 10 == 1 else 0.5)


def test_nothing_to_train_makes_no_batch() -> None:
    assert packed_batches([], 100, CPU) == []


def test_an_example_over_the_cap_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 12 tokens.*cap of 11"):
        packed_batches([Example([1], [2], 1.0), Example([1] * 6, [2] * 6, 1.0)], 11, CPU)


def test_that_error_names_the_key_of_the_config() -> None:
    from gapg.config import RunConfig

    with pytest.raises(ValueError) as error:
        packed_batches([Example([1] * 6, [2] * 6, 1.0)], 11, CPU)
    keys = [word for word in str(error.value).split() if word.endswith("token_cap")]
    assert keys == ["token_cap"]
    assert "token_cap" in RunConfig.model_fields
