"""What the extension itself guarantees, whoever calls it: it stays inside every buffer and packs without the GIL."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gapg_packing._csrc as _csrc


def int64s(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("lengths", "cap", "ranks"),
    [((3, 9), 8, 1), ((0,), 8, 1), ((-1,), 8, 1), ((1,), 0, 1), ((1,), 2**31, 1), ((1,), 8, 0), ((1,), 8, -2)],
)
def test_pack_refuses_what_would_leave_its_tables(lengths: tuple[int, ...], cap: int, ranks: int) -> None:
    with pytest.raises(ValueError):
        _csrc.pack(int64s(*lengths), cap, ranks)


@pytest.mark.parametrize(
    ("lengths", "prompts", "groups"),
    [
        ((3, 9), (1, 1), (0, 0)),
        ((3, 4), (1, 5), (0, 1)),
        ((3, 4), (0, 1), (0, 1)),
        ((3, 4), (1, 2), (0, 0)),
        ((3, 4), (2**62, 1), (0, 1)),
        ((3, 4), (1,), (0, 0)),
        ((3, 4), (1, 1), (0,)),
    ],
)
def test_groups_refuse_what_would_leave_their_tables(
    lengths: tuple[int, ...], prompts: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError):
        _csrc.pack_groups(int64s(*lengths), int64s(*prompts), int64s(*groups), 8, 1, 1.0, 0.0)


@pytest.mark.parametrize("cap", [2**64, -(2**64)])
def test_integers_of_any_size_are_compared_with_the_range(cap: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.2\^31-1"):
        _csrc.pack(int64s(1), cap)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.2\^20"):
        _csrc.pack(int64s(1), 8, cap)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_costs_that_are_no_numbers_are_refused(bad: float, ranks: int) -> None:
    lengths, prompts = int64s(*range(1, 100)), np.ones(99, np.int64)
    for weights in ((bad, 1.0), (1.0, bad), (0.0, 0.0)):
        with pytest.raises(ValueError, match="linear and quadratic must be finite and at least 0"):
            _csrc.pack(lengths, 100, ranks, *weights)
        with pytest.raises(ValueError, match="linear and quadratic must be finite and at least 0"):
            _csrc.pack_groups(lengths, prompts, lengths, 100, ranks, *weights)


def test_the_largest_costs_do_not_overflow() -> None:
    lengths = np.random.default_rng(0).integers(1, 10_000, 500)
    for ranks in (1, 8):
        expected = _csrc.pack(lengths, 20_000, ranks, 1.0, 0.5)
        for scale in (1.7e308, 1e-300):
            found = _csrc.pack(lengths, 20_000, ranks, scale, scale / 2)
            assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 2],
        None,
        np.array([1, 2], np.int32),
        np.array([1.0]),
        np.array([1, 2], ">i8"),
        np.array(1),
        np.array([[1, 2]]),
        np.arange(1, 9)[::2],
        np.broadcast_to(int64s(1), 4),
        np.frombuffer(bytes(17), np.int64, offset=1),
    ],
    ids=["list", "None", "int32", "float64", "swapped", "0-d", "2-d", "strided", "broadcast", "unaligned"],
)
def test_arguments_are_never_copied_silently(lengths: object) -> None:
    with pytest.raises(
        ValueError, match=r"^lengths must have one dimension .*: numpy\.require\(lengths, 'int64', 'CA'"
    ):
        _csrc.pack(lengths, 8, 1)


def test_the_message_says_how_to_make_it_right() -> None:
    order, _ = _csrc.pack(np.require(np.array([1, 2, 3], ">i8")[::-1], "int64", "CA"), 8)
    assert order.tolist() == [0, 1, 2]


# sequences (10, 11, 12) and (13, 14), prompts of 1 and 2
BATCH = (int64s(10, 11, 12, 13, 14), int64s(0, 3, 5), int64s(1, 2), np.array([0.5, 1.0], np.float32))


@pytest.mark.parametrize("member", [-1, 2, 2**40, -(2**63)])
def test_unknown_members_are_refused(member: int) -> None:
    with pytest.raises(ValueError, match=f"no sequence {member}"):
        _csrc.lay_out(*BATCH, int64s(member))


@pytest.mark.parametrize("starts", [(0, 3, 6), (0, -1, 5), (4, 3, 5), (0, 3, 2**62), (0, 3), (0, 3, 5, 5)])
def test_starts_that_leave_the_tokens_are_refused(starts: tuple[int, ...]) -> None:
    tokens, _, prompts, coefficients = BATCH
    with pytest.raises(ValueError):
        _csrc.lay_out(tokens, int64s(*starts), prompts, coefficients, int64s(0, 1))


def test_a_layout_is_memory_of_its_own_in_the_order_of_the_stub() -> None:
    made = _csrc.lay_out(*BATCH, int64s(1, 0))
    expected = [[13, 14, 10, 11, 12], [0, 1, 0, 1, 2], [0, 2, 5], [2, 3], [11, 12], [0, 0], [0.5, 0.5]]
    assert [array.tolist() for array in made] == expected
    assert all(array.flags.owndata and array.flags.writeable for array in made)
    batch = (int64s(10, 11, 12, 10, 14), int64s(0, 3, 5), int64s(1, 1), np.array([0.5, 1.0], np.float32))
    made = _csrc.lay_out(*batch, int64s(1, 0), int64s(7, 7))
    expected = [[10, 14, 11, 12], [0, 1, 1, 2], [0, 1, 2, 4], [0, 0, 2], [14, 11, 12], [1, 0, 0], [1, 0.5, 0.5], [0, 3]]
    assert [array.tolist() for array in made] == expected
    assert [str(array.dtype) for array in made] == [*["int64"] * 2, "int32", *["int64"] * 3, "float32", "int32"]


def test_packing_lets_other_threads_run() -> None:
    lengths = np.random.default_rng(0).integers(1, 5_000, size=3_000_000)
    finished = threading.Event()

    def work() -> None:
        _csrc.pack(lengths, 16_384, 1)
        finished.set()

    worker = threading.Thread(target=work)
    ticks = 0
    worker.start()
    while not finished.is_set():  # holding the GIL, the packer would let this loop turn a handful of times
        ticks += 1
        time.sleep(0.001)
    worker.join()
    assert ticks > 20


@pytest.mark.parametrize("arguments", [("arguments", "60"), ("threads", "1")], ids=["arguments", "threads"])
def test_nothing_ends_the_process(arguments: tuple[str, str]) -> None:
    """Arrays of every wrong kind, and arrays that other threads write to during the calls."""
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
