"""Calls the extension as nothing in the package does. Run as a script, since what it looks for ends the process.

    python tests/csrc/hostile.py arguments 500     # so many examples
    python tests/csrc/hostile.py threads 10        # so many seconds

With the extension built by -fsanitize=address and libasan preloaded it also finds what does not end the process.
"""

import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gapg_packing._csrc as _csrc

EDGES = [-(2**63), -(2**31), -1, 0, 1, 2, 5, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
NUMBERS = st.one_of(st.integers(0, 9), st.integers(0, 9), st.sampled_from(EDGES))
WEIGHTS = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, -0.0, -1.0, 5e-324, 1e308, float("inf"), -float("inf"), float("nan")]),
)


def misshapen(array: np.ndarray, kind: str) -> Any:
    """The same values in a form that the extension must refuse, or read right."""
    shifted = np.zeros(array.nbytes + 1, np.uint8)
    shifted[1:] = array.view(np.uint8)
    frozen = array.copy()
    frozen.flags.writeable = False
    return {
        "list": array.tolist(),
        "None": None,
        "int32": array.astype(np.int32),
        "float64": array.astype(np.float64),
        "uint64": array.astype(np.uint64),
        "swapped": array.astype(array.dtype.newbyteorder()),
        "object": array.astype(object),
        "strided": array.repeat(2)[::2],
        "reversed": array[::-1],
        "broadcast": np.broadcast_to(array[:1], array.shape) if array.size else array,
        "two dimensions": array.reshape(1, -1),
        "none": np.array(7, array.dtype),
        "unaligned": shifted[1:].view(array.dtype),
        "frozen": frozen,
    }[kind]


FORMS = [*(["as it is"] * 30), "list", "None", "int32", "float64", "uint64", "swapped", "object", "strided", "reversed"]
FORMS += ["broadcast", "two dimensions", "none", "unaligned", "frozen"]


@st.composite
def arrays(draw: st.DrawFn, size: int | None = None, dtype: type = np.int64) -> Any:
    """One-dimensional; mostly of `size`, of small numbers and in order."""
    if size is None or draw(st.integers(0, 15)) == 0:
        size = draw(st.integers(0, 12))
    if dtype is not np.int64:
        array = np.array(draw(st.lists(WEIGHTS, min_size=size, max_size=size)), np.float32)
    else:
        array = np.array(draw(st.lists(NUMBERS, min_size=size, max_size=size)), np.int64)
    form = draw(st.sampled_from(FORMS))
    return array if form == "as it is" else misshapen(array, form)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; None where it refuses."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, MemoryError):
        return None


def check_packing(lengths: np.ndarray, cap: int, ranks: int, packing: Any) -> None:
    order, offsets = packing
    assert sorted(order.tolist()) == list(range(len(lengths))), (lengths, cap)
    assert (len(offsets) - 1) % ranks == 0 and offsets[0] == 0 and offsets[-1] == len(lengths)
    assert (np.diff(offsets) >= 0).all()


@given(st.data())
def packs(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 12))
    lengths, prompts, groups = (data.draw(arrays(n)) for _ in range(3))
    cap = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([*EDGES, 2**70, -(2**70)])))
    ranks = data.draw(st.one_of(st.integers(1, 5), st.sampled_from([0, -1, 2**20 + 1, 2**63, 2**70])))
    weights = data.draw(WEIGHTS), data.draw(WEIGHTS)
    if (packing := call(_csrc.pack, lengths, cap, ranks, *weights)) is not None:
        check_packing(lengths, cap, ranks, packing)
        order, offsets = packing
        assert all(lengths[order[a:b]].sum() <= cap for a, b in pairwise(offsets))
        assert all(np.isfinite(weights)) and min(weights) >= 0 < max(weights)
    if (packing := call(_csrc.pack_groups, lengths, prompts, groups, cap, ranks, *weights)) is not None:
        check_packing(lengths, cap, ranks, packing)


@given(st.data())
def layouts(data: st.DataObject) -> None:
    n, total = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 40))
    tokens, prompts, groups = data.draw(arrays(total)), data.draw(arrays(n)), data.draw(arrays(n))
    starts = data.draw(arrays(n + 1))
    if data.draw(st.booleans()):
        starts = np.sort(np.array(data.draw(st.lists(st.integers(0, total), min_size=n + 1, max_size=n + 1)), np.int64))
    batch = (tokens, starts, prompts, data.draw(arrays(n, np.float32)))
    members = data.draw(arrays())

    for shared in ((), (groups,)):
        if (made := call(_csrc.lay_out, *batch, members, *shared)) is not None:
            t, r = len(made[0]), len(made[3])
            assert [len(x) for x in made[:7]] == [t, t, len(made[2]), r, r, r, r]
            assert made[2][0] == 0 and made[2][-1] == t and (np.diff(made[2]) >= 0).all()


def threads(seconds: float) -> None:
    """Two threads write to every array while calls read them; what the calls return is nobody's."""
    rng, n = np.random.default_rng(0), 20_000
    good = {
        "lengths": np.full(n, 8),
        "prompts": np.full(n, 2),
        "groups": np.arange(n) // 8,
        "starts": np.arange(0, 8 * n + 1, 8),
        "members": np.arange(0, n, 7),
    }
    arrays = {name: array.copy() for name, array in good.items()}
    tokens, coefficients = np.zeros(8 * n, np.int64), np.zeros(n, np.float32)
    end = time.monotonic() + seconds

    def write() -> None:
        while time.monotonic() < end:
            for name, array in arrays.items():
                array[rng.integers(0, len(array), 50)] = rng.choice(EDGES)
                array[:] = good[name]  # numpy releases the GIL in here

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    batch = (tokens, arrays["starts"], arrays["prompts"], coefficients)
    groups, members = arrays["groups"], arrays["members"]
    packed = 0
    while time.monotonic() < end:
        for ranks in (1, 3):
            packed += call(_csrc.pack, arrays["lengths"], 64, ranks, 1.0, 0.5) is not None
            call(_csrc.pack_groups, arrays["lengths"], arrays["prompts"], groups, 64, ranks, 1.0, 0.5)
        call(_csrc.lay_out, *batch, members)
        call(_csrc.lay_out, *batch, members, groups)
    for writer in writers:
        writer.join()
    assert packed > 0, "the writers left no time in which a call succeeds"


if __name__ == "__main__":
    amount = int(sys.argv[2])
    if sys.argv[1] == "threads":
        threads(amount)
    else:
        for fuzz in (packs, layouts):
            few = settings(max_examples=amount, derandomize=True, database=None, deadline=None)
            settings(few, suppress_health_check=list(HealthCheck))(fuzz)()
