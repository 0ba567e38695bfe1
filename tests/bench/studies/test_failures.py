"""What a wrong response is wrong by."""

from collections.abc import Callable
from typing import Any

import pytest

from gapg.tasks.countdown import Countdown
from studies import failures
from studies.arms import Arm, Finished
from studies.failures import HIDDEN, OTHER, RIGHT, SHOWN, kind

PROBLEM = "3 8 15 = 39"
RESPONSES = {
    "8 * 3 = 24 ; 24 + 15 = 39 <answer> ( 8 * 3 ) + 15 </answer>": OTHER,  # right, had it been judged so
    "8 + 3 = 11 ; 15 + 11 = 26 <answer> 15 + ( 8 + 3 ) </answer>": SHOWN,
    "8 + 3 = 12 ; 15 + 12 = 27 <answer> 15 + ( 8 + 3 ) </answer>": SHOWN,
    "8 + 3 = 24 ; 24 + 15 = 39 <answer> ( 8 + 3 ) + 15 </answer>": HIDDEN,
    "15 + 8 = 23 ; 23 + 3 = 39 <answer> ( 15 + 8 ) + 3 </answer>": HIDDEN,
    "8 * 3 = 24 ; 24 + 15 = 39 <answer> ( 8 * 3 ) - 15 </answer>": OTHER,
    "8 * 3 = 24 ; 24 + = 39 <answer> ( 8 * 3 ) + 15 </answer>": OTHER,
    "8 * 3 = 24 ; 24 + 15 = 39": OTHER,
    "<answer> 8 </answer>": OTHER,
    "": OTHER,
}


@pytest.mark.parametrize("response", RESPONSES)
def test_kinds(response: str) -> None:
    row = {"id": PROBLEM, "response": response, "outcome": "local_wrong"}
    assert kind(row) == RESPONSES[response]
    assert kind(row | {"outcome": "local_correct"}) == RIGHT


def test_demonstrations_that_are_wrong_show_it() -> None:
    """Countdown's own wrong demonstrations compute honestly and miss the target; the right ones have no wrong step."""
    task = Countdown(problems=200, help_shown=False)
    found = [
        kind({"id": d.prompt.id, "response": d.response, "outcome": "local_wrong"}) for d in task.demonstrations(0)
    ]
    assert set(found) == {SHOWN, OTHER} and 0.1 < found.count(SHOWN) / len(found) < 0.3


def test_parts_and_calls(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> None:
    """Ten problems, three calls: two shown misses first, then a tie of a hidden one and three right ones."""
    wrong = {v: k for k, v in RESPONSES.items()}
    rows = [predicted(i, "local_wrong", 2.0, id=PROBLEM, response=wrong[SHOWN]) for i in range(2)]
    rows += [predicted(2, "local_wrong", 1.0, id=PROBLEM, response=wrong[HIDDEN])]
    rows += [predicted(i, "local_correct", 1.0 if i < 6 else 0.0) for i in range(3, 10)]
    found = failures.by_kind(finish(Arm("x", {}, 0), {"heldout-masked": rows}), 0.3)
    parts = {name: found[name] for name in failures.KINDS}
    assert parts == pytest.approx({SHOWN: 0.2, HIDDEN: 0.1, OTHER: 0.0, RIGHT: 0.7})
    assert found[f"{OTHER}, called"] is None
    calls = [found[f"{name}, called"] for name in (SHOWN, HIDDEN, RIGHT)]
    assert calls == pytest.approx([1.0, 0.25, 0.75 / 7])
