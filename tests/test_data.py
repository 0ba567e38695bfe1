"""The stream of prompts: epochs, prompts that come back, and a resume that sees the same stream."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg.data import PromptQueue, split_validation
from gapg.errors import ConfigError
from gapg.tasks.base import Prompt


def make(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"text {i}", "", "toy") for i in range(n)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [p.id for p in prompts]


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**40))
def test_epochs_are_permutations_in_a_new_order(batch: int, batches: int, seed: int) -> None:
    n = batch * batches
    queue = PromptQueue(make(n), seed)
    epochs = [[p for _ in range(batches) for p in ids(queue.next(batch))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(ids(make(n)))
    if n >= 12:  # by chance, 1 in 12! a pair
        assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_is_another_order() -> None:
    assert ids(PromptQueue(make(30), 1).next(30)) != ids(PromptQueue(make(30), 2).next(30))


@given(st.integers(2, 12), st.data(), st.integers(0, 2**40))
def test_no_prompt_twice_in_a_batch(n: int, data: st.DataObject, seed: int) -> None:
    """Over epoch ends and with prompts that come back; and each gets its turn unless whole batches come back."""
    queue = PromptQueue(make(n), seed)
    drawn: Counter[str] = Counter()
    for _ in range(4 * n):
        batch = queue.next(data.draw(st.integers(1, n)))
        assert len({p.id for p in batch}) == len(batch)
        drawn.update(ids(batch))
        queue.give_back(batch[: data.draw(st.integers(0, min(2, len(batch) - 1)))])
    assert set(drawn) == set(ids(make(n)))


def test_a_returned_prompt_that_is_gone_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the data has no training problem 'elsewhere', which is to be asked again"):
        PromptQueue(make(3), 0).restore(0, ["p1", "elsewhere"])


@given(st.integers(2, 30), st.data())
def test_returned_prompts_come_first_and_once(n: int, data: st.DataObject) -> None:
    prompts = make(n)
    queue = PromptQueue(prompts, 0)
    back = data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=n, unique=True))
    queue.give_back(back)
    queue.give_back(back)
    expected = list(dict.fromkeys(ids(back)))
    first = data.draw(st.integers(1, n))
    got = ids(queue.next(first))
    assert got[: len(expected)] == expected[:first]
    assert queue.returned == expected[first:]
    assert queue.cursor >= first - len(expected)


@given(st.integers(2, 15), st.integers(0, 2**40), st.data())
@settings(max_examples=50)
def test_a_resumed_queue_goes_on_as_if_never_stopped(n: int, seed: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, n), min_size=2, max_size=12))
    cut = data.draw(st.integers(1, len(sizes) - 1))
    back = data.draw(st.lists(st.integers(0, n - 1), max_size=4))
    whole = PromptQueue(make(n), seed)
    for i, size in enumerate(sizes):
        batch = whole.next(size)
        if i < len(back):
            whole.give_back([batch[back[i] % size]])
        if i == cut - 1:
            resumed = PromptQueue(make(n), seed, cursor=whole.cursor, returned=list(whole.returned))
        if i >= cut:
            expected = resumed.next(size)
            assert ids(expected) == ids(batch)
            if i < len(back):
                resumed.give_back([expected[back[i] % size]])
    assert (resumed.cursor, resumed.returned) == (whole.cursor, whole.returned)


def test_a_prompt_that_two_groups_give_back_comes_back_once() -> None:
    """A batch larger than the data holds a prompt twice."""
    prompts = make(3)
    queue = PromptQueue(prompts, 0)
    queue.give_back([prompts[0], prompts[1], prompts[0]])
    assert queue.returned == ["p0", "p1"]


def test_more_prompts_than_there_are() -> None:
    """A batch larger than the data repeats prompts instead of waiting forever."""
    assert Counter(ids(PromptQueue(make(3), 0).next(7))).most_common()[-1][1] >= 2


@given(st.integers(2, 60), st.integers(0, 80), st.integers(0, 2**40))
def test_validation_problems_are_never_trained_on(n: int, wanted: int, seed: int) -> None:
    prompts = make(n)
    train, validation = split_validation(prompts, wanted, seed)
    assert len(validation) == min(wanted, n // 5)
    assert sorted(ids(train) + ids(validation)) == sorted(ids(prompts))
    assert split_validation(prompts, wanted, seed) == (train, validation)
    assert ids(train) == [p.id for p in prompts if p in train], "in the order of the data"
