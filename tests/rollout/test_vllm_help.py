"""The help processors of both model runners, side by side on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gapg_rollout.records import HelpControl, HelpSpelling, Sampling

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [[7, 7, 3], [3], [9, 9, 9, 9, 3, 4]]
GENERATED: list[list[int]] = [[1, 3], [3, 4, 5], []]
"""What three requests have generated so far; the prompts' own tokens must not count as a prefix."""

CONFIG: Any = None
"""The processors need none."""

CONTROLS = [
    HelpControl((HelpSpelling(4, (3,), (5, 6)),), 2.0),
    HelpControl((HelpSpelling(4, (), (5, 6)),), 2.0),
    HelpControl((HelpSpelling(4, (3,)),), -math.inf),
    HelpControl((HelpSpelling(4, (), (5,)),), math.inf),
    HelpControl((HelpSpelling(4, (3,), (5, 6)), HelpSpelling(2, (), (7,)), HelpSpelling(4, (1, 3), (8,))), 2.0),
    HelpControl((HelpSpelling(2),), 2.0, blocks=((3, 5),)),
]


@pytest.fixture
def trace() -> Iterator[Any]:
    from gapg_rollout.engines.vllm_help import HelpTrace

    yield HelpTrace
    HelpTrace.current = None


def params(row: int | None) -> Any:
    from vllm import SamplingParams

    from gapg_rollout.engines.vllm_help import ARGUMENT

    return SamplingParams(extra_args=None if row is None else {ARGUMENT: row})


def run_first(logits: torch.Tensor) -> torch.Tensor:
    """Batch indices 0, 1, 2 are the requests, and 3 is one without help."""
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from gapg_rollout.engines.vllm_help import HelpProcessor

    processor = HelpProcessor(CONFIG, torch.device("cpu"), False)
    added = [(i, params(i), PROMPTS[i], GENERATED[i]) for i in range(3)] + [(3, params(None), [1], [3])]
    processor.update_state(BatchUpdate(4, removed=[], added=added, moved=[]))
    return processor.apply(logits)


def run_second(logits: torch.Tensor) -> torch.Tensor:
    """Slots are the batch indices reversed, and shifted by one, as they may be."""
    from gapg_rollout.engines.vllm_help import HelpProcessorV2

    sequences = [*(p + g for p, g in zip(PROMPTS, GENERATED, strict=True)), [1, 3]]
    lengths = [*map(len, PROMPTS), 1]
    slots = [4, 3, 2, 1]
    tokens = torch.full((6, 16), 99, dtype=torch.int32)
    prompt_len = torch.zeros(6, dtype=torch.int32)
    for slot, sequence, length in zip(slots, sequences, lengths, strict=True):
        tokens[slot, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
        prompt_len[slot] = length
    states: Any = SimpleNamespace(
        max_num_reqs=6, all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(gpu=prompt_len)
    )
    processor = HelpProcessorV2(CONFIG, states)
    for i, slot in enumerate(slots):
        assert processor.add_request(slot, params(i if i < 3 else None)) == (i < 3)
    mapping = torch.tensor(slots, dtype=torch.int32)
    ends = torch.tensor([len(s) - 1 for s in sequences])
    context: Any = SimpleNamespace(idx_mapping_np=mapping.numpy(), expanded_idx_mapping=mapping, pos=ends)
    return processor.apply(logits, context)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("control", CONTROLS)
def test_both_runners_steer_and_record_alike(trace: Any, control: HelpControl, temperature: float) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    results, traces = [], []
    for run in (run_first, run_second):
        trace.current = trace(Sampling(8, temperature, help=control, thinking=True), PROMPTS, 1, "cpu")
        results.append(run(logits.clone()))
        traces.append(trace.current)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(traces[0].steering.margin_RT, traces[1].steering.margin_RT)
    torch.testing.assert_close(traces[0].shift_RT, traces[1].shift_RT)
    torch.testing.assert_close(traces[0].steering.log_odds_RT, traces[1].steering.log_odds_RT)
    torch.testing.assert_close(results[0][3], logits[3])


def test_the_second_runner_steers_as_the_definition_says(trace: Any) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    current = trace.current = trace(Sampling(8, help=CONTROLS[0]), PROMPTS, 1, "cpu")
    steered = run_second(logits.clone())
    expected = logits.clone()
    expected[0, 4] += 2.0  # its last token is the prefix
    expected[1] = -math.inf  # prefix, help token and 5 stand: 6 must follow
    expected[1, 6] = 0.0
    torch.testing.assert_close(steered, expected)
    others = logits[0].clone()
    others[4] = -math.inf
    assert current.steering.margin_RT[0, 2] == pytest.approx(float(logits[0, 4] - others.max()))
    assert (current.steering.margin_RT > -math.inf).sum() == 1
    after, before = torch.log_softmax(steered[0], -1), torch.log_softmax(logits[0], -1)
    for token in (4, 7):
        (reported,), *_ = current.finish(0, (token,), (float(after[token]),))  # at step 0, where nothing was changed
        assert reported == pytest.approx(float(after[token]))
        logprobs, margin, (odds,) = current.finish(0, (1, 3, token), (0.0, 0.0, float(after[token])))
        assert logprobs[2] == pytest.approx(float(before[token]), abs=1e-6)
        assert margin == current.steering.margin_RT[0, 2]
        assert odds == pytest.approx(float(torch.softmax(logits[0], -1)[4].logit()), abs=1e-5)
    forced, *_ = current.finish(1, (3, 4, 5, 6), (0.0, 0.0, 0.0, 0.0))
    assert forced[3] == pytest.approx(float(torch.log_softmax(logits[1], -1)[6]), abs=1e-6)


def test_rows_that_sample_nothing_are_left_alone(trace: Any) -> None:
    from gapg_rollout.engines.vllm_help import HelpProcessorV2

    trace.current = trace(Sampling(4, help=CONTROLS[1]), PROMPTS[:1], 1, "cpu")
    states: Any = SimpleNamespace(
        max_num_reqs=1,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(1, 16, dtype=torch.int32)),
        prompt_len=SimpleNamespace(gpu=torch.tensor([6])),
    )
    processor = HelpProcessorV2(CONFIG, states)
    processor.add_request(0, params(0))
    mapping = torch.zeros(1, dtype=torch.int32)
    for position in (2, 11):  # inside the prompt, and beyond the last token that may be generated
        context: Any = SimpleNamespace(
            idx_mapping_np=mapping.numpy(), expanded_idx_mapping=mapping, pos=torch.tensor([position])
        )
        logits = torch.randn(1, 12)
        torch.testing.assert_close(processor.apply(logits.clone(), context), logits)
    assert (trace.current.steering.margin_RT == -math.inf).all()
