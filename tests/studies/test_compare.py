"""The quickstart's comparison, where a part of it cannot be had."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from gapg.jsonl import read_jsonl
from gapg.rollout.records import Completion, Sampling
from gapg.run import Run
from gapg.studies.compare import assess_gapg


def test_a_policy_that_never_comes_near_the_phrase_is_compared_without_a_bias(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its training is done, and no row but one needs the bias."""
    run = start(eval__problems="4", eval__heldout="4")
    generate = run.engine.generate

    def far(ids: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for i, completions in generate(ids, n, sampling):
            yield i, [replace(c, help_margin=None) for c in completions]

    run.engine.generate = far  # type: ignore[method-assign]
    assert assess_gapg(run) == 0.0
    assert "no response came near the help phrase" in capsys.readouterr().err
    greedy, calibrated = (
        [row["response"] for row in read_jsonl(run.folder / "predictions" / f"heldout-{name}-step-0.jsonl")]
        for name in ("greedy", "calibrated")
    )
    assert greedy == calibrated and len(greedy) == 4
