"""Compiled decoder layers compute what the plain ones do, once for all layers and lengths, or end in one line."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from gapg.build import check_run
from gapg.config import load_config
from gapg.config_sections import LoraConfig
from gapg.errors import ConfigError
from gapg.model import compiled
from gapg.model.compiled import compile_layers
from gapg.model.lora import add_adapters
from gapg.optim import make_optimizer
from gapg.tasks.countdown import Countdown
from gapg.update import policy_update
from tests.test_update import VOCAB, responses

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _limits_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # vLLM's engine on a CPU sets it
    config = torch._dynamo.config
    before = config.recompile_limit, config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    yield
    config.recompile_limit, config.fail_on_recompile_limit_hit = before
    torch._dynamo.reset()


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int, share: str) -> dict[str, float]:
    given = {"update.share_prompts": share, "optim.lr": "3e-3", "optim.warmup_steps": "0", "token_cap": "90"}
    examples, table = responses(step)
    return policy_update(model, optimizer, load_config("quickstart", given), step, examples, table)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "adapters"])
def test_updates_are_the_same(make_model: MakeModel, kind: str) -> None:
    """Packed and shared rows of many lengths and numbers of prompts, to rounding; and nothing compiled more than twice.

    A row without shared prompts and one with them are two compilations; a prompt more or fewer is none.
    """
    plain = make_model(seed=5, vocab_size=VOCAB)
    if kind == "checkpointed":
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    model = copy.deepcopy(plain)
    compile_layers(model)
    for one in (plain, model) if kind == "adapters" else ():
        add_adapters(one, LoraConfig(rank=2, targets=("q_proj",)), seed=0)
    config = load_config("quickstart", {}).optim
    optimizers = make_optimizer(model, config), make_optimizer(plain, config)
    compilations = list[int]()
    for step, share in enumerate(("never", "never", "always", "always", "never", "always")):
        ours, theirs = (update(m, o, step, share) for m, o in zip((model, plain), optimizers, strict=True))
        for key in ("policy/loss", "grad_norm", "logprob_gap"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < compilations[0] == compilations[1] < compilations[2] == compilations[-1]


def test_too_many_compilations_end_in_one_line(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in PyTorch's way, which goes on without compiling."""
    monkeypatch.setattr(compiled, "LIMIT", 1)
    model = make_model(seed=5, vocab_size=VOCAB)
    compile_layers(model)
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager")  # the limit is the tracer's
    optimizer = make_optimizer(model, load_config("quickstart", {}).optim)
    update(model, optimizer, 0, "never")
    with pytest.raises(
        ConfigError, match=r"^model\.compile=true: .* again and again \(1 times.*set model\.compile=false$"
    ):
        update(model, optimizer, 0, "always")


def test_a_model_without_marked_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_head=1, n_layer=1, bos_token_id=0, eos_token_id=1))
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(
        ConfigError, match=r"^model\.compile=true: .* layers of 'gpt2' models; set model\.compile=false$"
    ):
        compile_layers(model)


def test_liger_and_compiling_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile=true compiles what model\.liger=true replaces"):
        load_config("quickstart", {"model.compile": "true", "model.liger": "true"})


def test_vllm_on_a_cpu_would_turn_it_off(tokenizer: PreTrainedTokenizerBase) -> None:
    config = load_config("quickstart", {"model.compile": "true", "rollout.engine": "vllm"})
    with pytest.raises(ConfigError, match=r"^model\.compile=true: vLLM's engine on a CPU .* or rollout\.engine="):
        check_run(config, Countdown(), tokenizer)
