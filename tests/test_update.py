"""The exact savings of an update: each switched off changes the work and not the gradient."""

import copy
import math
import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from gapg.batches.batching import Example
from gapg.config import RunConfig, load_config
from gapg.errors import ConfigError
from gapg.optim import make_optimizer
from gapg.update import policy_update

VOCAB = 60


def config(**overrides: str) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("quickstart", {"token_cap": "90", "optim.grad_clip": "1e9", **changed})


def responses(seed: int = 0) -> tuple[list[Example], torch.Tensor]:
    """Five groups of four, two of them without a gradient; prompts from one token, responses from one token."""
    rng = random.Random(seed)
    table = torch.tensor([[1.0, 0, 0.3, 0], [0.3] * 4, [0.0, 1, 1, 0], [0.0] * 4, [1.0, 0, 0.5, 0.5]])
    examples = []
    for p, prompt in enumerate([1, 9, 20, 4, 13]):
        ids = [rng.randrange(3, VOCAB) for _ in range(prompt)]
        for i in range(4):
            length = 1 if i == 3 else rng.randint(2, 14)
            response = [rng.randrange(3, VOCAB) for _ in range(length)]
            logprobs = [-rng.random() for _ in response]
            examples.append(Example(ids, response, rollout_logprobs=logprobs, group=p, sample=i))
    return examples, table


def run(model: PreTrainedModel, settings: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients of one update (taken at the step, before the optimizer clears them) and its metrics."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, settings.optim)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    examples, table = responses()
    return found, policy_update(model, optimizer, settings, 0, examples, table)


SWITCHES = {
    "skip_zero_advantage": ("true", "false"),
    "response_positions": ("true", "false"),
    "pack": ("true", "false"),
    "share_prompts": ("always", "never"),
}


def test_no_saving_changes_the_gradient(make_model: Callable[..., PreTrainedModel]) -> None:
    """All combinations against the one that computes everything; padded rows share no prompts."""
    model = make_model(seed=5, vocab_size=VOCAB, max_position_embeddings=128)
    everything = {f"update__{name}": off for name, (_, off) in SWITCHES.items()}
    want, _ = run(model, config(**everything))
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 1e-2
    for values in product(*SWITCHES.values()):
        settings = {f"update__{name}": value for name, value in zip(SWITCHES, values, strict=True)}
        if values[2:] == ("false", "always"):
            continue
        got, _ = run(model, config(**settings))
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, atol=2e-6 * scale, rtol=0, msg=f"{name} {settings}")


@pytest.mark.parametrize(
    "loss", [{"loss__kl_coef": "0.1"}, {"loss__advantage": "grpo", "loss__aggregation": "token_mean"}]
)
def test_nor_under_other_losses(make_model: Callable[..., PreTrainedModel], loss: dict[str, str]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB, max_position_embeddings=128)
    reference = make_model(seed=6, vocab_size=VOCAB, max_position_embeddings=128) if "loss__kl_coef" in loss else None
    grads = []
    for share in ("always", "never"):
        twin, settings = copy.deepcopy(model), config(update__share_prompts=share, **loss)
        optimizer, found = make_optimizer(twin, settings.optim), dict[str, torch.Tensor]()
        optimizer.register_step_pre_hook(
            lambda *_, m=twin, f=found: f.update({n: p.grad.clone() for n, p in m.named_parameters()})
        )
        examples, table = responses()
        policy_update(twin, optimizer, settings, 0, examples, table, reference)
        grads.append(found)
    scale = max(float(g.abs().max()) for g in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=2e-6 * scale, rtol=0, msg=name)


def test_tokens_are_accounted_for(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB, max_position_embeddings=128)
    examples, _ = responses()
    given = sum(map(len, examples))
    dropped = [e for e in examples if e.group in (1, 3) or (e.group == 4 and e.sample >= 2)]
    trained = [e for e in examples if e not in dropped]
    response_tokens = sum(len(e.response_ids) for e in trained)
    _, row = run(model, config(update__share_prompts="always", token_cap="1000"))
    prompts = {e.group: len(e.prompt_ids) for e in trained}
    assert row["tokens/given"] == given
    assert row["tokens/saved_zero_advantage"] == sum(map(len, dropped))
    assert row["tokens/computed"] == sum(prompts.values()) + response_tokens
    assert row["tokens/saved_shared_prompts"] == sum(map(len, trained)) - row["tokens/computed"]
    assert row["tokens/saved_padding"] == max(map(len, trained)) * len(trained) - sum(map(len, trained))
    assert row["tokens/head"] == response_tokens
    off = {f"update__{name}": values[1] for name, values in SWITCHES.items()}
    _, row = run(model, config(**off, token_cap="1000"))
    assert row["tokens/computed"] == row["tokens/head"] == max(map(len, examples)) * len(examples)
    assert not any(value for name, value in row.items() if name.startswith("tokens/saved"))


def test_auto_shares_long_prompts_and_leaves_short_ones(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB, max_position_embeddings=2048)
    rng = random.Random(0)
    table = torch.tensor([[1.0, 0, 0, 1, 0, 1, 0, 0]])
    for prompt, shared in ((2, False), (1000, True)):
        ids = [rng.randrange(3, VOCAB) for _ in range(prompt)]
        examples = [Example(ids, [5, 6, 7], group=0, sample=i) for i in range(8)]
        settings = config(token_cap="20000")
        row = policy_update(model, make_optimizer(model, settings.optim), settings, 0, examples, table)
        assert (row["tokens/saved_shared_prompts"] > 0) == bool(row["sharing/on"]) == shared
        assert (row["sharing/predicted_speedup"] > 1) == shared


def test_truncated_weights_need_the_engines_log_probs(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB)
    settings = config(loss__tis_cap="2")
    examples = [Example([5], [6, 7], group=0, sample=i) for i in range(2)]
    with pytest.raises(ConfigError, match=r"loss\.tis_cap needs the log-probs"):
        policy_update(model, make_optimizer(model, settings.optim), settings, 0, examples, torch.tensor([[1.0, 0.0]]))


def test_an_update_without_prompts_does_nothing(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB)
    before = copy.deepcopy(model.state_dict())
    settings = config()
    row = policy_update(model, make_optimizer(model, settings.optim), settings, 0, [], torch.tensor([]))
    assert row["tokens/given"] == row["grad_norm"] == 0 and math.isfinite(row["policy/loss"])
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
