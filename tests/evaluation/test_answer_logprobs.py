"""The log-prob of an answer given that it does not call, against a softmax without the help token."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.evaluation.evaluate import answer_logprobs
from gapg.help_phrase import help_control, masked
from gapg.tasks.base import STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, Sampling


def test_it_is_the_softmax_without_the_help_token(
    countdown: Countdown, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, control = make_model(seed=5), masked(help_control(tokenizer))
    (spelling,) = control.spellings
    prompts = [countdown.render(p, tokenizer) for p in countdown.prompts("heldout")[:6]]
    engine = TransformersEngine(model, tokenizer)
    for i, (completion,) in engine.generate(prompts, 1, Sampling(8, 1.0, STOP, seed=1, help=control)):
        ids = torch.tensor([[*prompts[i], *completion.token_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompts[i]) - 1 : -1].double()
        logits[:, spelling.token_id] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompts[i]) :, None])[:, 0]
        found = answer_logprobs(completion)
        assert found is not None
        assert found[0] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert found[1] == pytest.approx(expected.min().item(), abs=1e-4)
        assert found[0] > sum(completion.logprobs) / len(completion.logprobs)


def test_by_hand() -> None:
    """Even odds of calling at both of two tokens: each is twice as likely once calling is out."""
    completion = Completion((1, 2), (math.log(0.4), math.log(0.25)), "", "stop", 0.0, (0.0, 0.0))
    assert answer_logprobs(completion) == pytest.approx(((math.log(0.8) + math.log(0.5)) / 2, math.log(0.5)))
    one = Completion((1, 2), (math.log(0.4), math.log(0.5)), "", "stop", 0.0, (1000.0,))
    assert answer_logprobs(one) == pytest.approx(((math.log(0.2) + 1000.0) / 2, math.log(0.4)))
    assert answer_logprobs(Completion((1,), (0.0,), "", "stop")) is None
