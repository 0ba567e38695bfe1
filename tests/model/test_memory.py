"""The memory plan against PyTorch's own accounting, and that what it suggests fits by its own plan."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Lfm2Config,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from gapg.batches.batching import PackedBatch
from gapg.build import make_task
from gapg.commands.cli import main
from gapg.config import RunConfig, load_config
from gapg.console import console
from gapg.errors import ConfigError
from gapg.model import attention, lora, memory_plan
from gapg.model.load import load_tokenizer
from gapg.model.memory import ROOM, announce, check, fitting_token_cap, suggestions
from gapg.model.memory_plan import plan_memory
from gapg.model.memory_trace import _grouped_mm, largest_batch, trace_layers, trace_update
from gapg.model.policy import response_loss
from gapg.optim import clip_and_step, make_optimizer
from gapg.warm_start import warm_start
from gapg_kernels import flash
from gapg_kernels.policy_loss import PolicyLossOptions

attention.register()

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
BF16 = {"model.dtype": "bfloat16"}
MASTERS = BF16 | {"model.parameters": "bfloat16"}
CHECKPOINTED = {"model.gradient_checkpointing": "true"}
VLLM = {"rollout.engine": "vllm", "rollout.vllm_args": "{gpu_memory_utilization: 0.35}"}


def settings(**overrides: str) -> RunConfig:
    given = {"rollout.max_prompt_tokens": "16", "rollout.max_new_tokens": "112"}
    return load_config("quickstart", given | {"rollout.prompts_per_step": "512", "token_cap": "1024"} | overrides)


def qwen(layers: int, *, hidden: int, vocab: int, inner: int, heads: tuple[int, int]) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=True,
    )  # fmt: skip


SMALL = qwen(5, hidden=128, vocab=2048, inner=384, heads=(4, 2))


def half_b(layers: int) -> Qwen2Config:
    """Qwen2.5-0.5B."""
    return qwen(layers, hidden=896, vocab=151_936, inner=4864, heads=(14, 2))


def policy(shape: Qwen2Config, config: RunConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention.NAME, dtype=torch.float32).train()
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.model.lora:
        lora.add_adapters(model, config.model.lora, 0)
    return model


def on_meta(shape: Qwen2Config, config: RunConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return policy(shape, config)


def learn(model: PreTrainedModel, batch: PackedBatch, config: RunConfig) -> None:
    compute = getattr(torch, config.model.dtype)
    out = response_loss(
        model, batch, torch.tensor([[1.0, 0.0]]), 1.0, PolicyLossOptions(), compute=compute,
        with_entropy=config.loss.entropy,
    )  # fmt: skip
    out.loss.backward()


# --- against PyTorch's accounting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [{}, CHECKPOINTED, BF16, BF16 | CHECKPOINTED, MASTERS, {"model.lora.rank": "8"}, {"loss.entropy": "true"}],
    ids=lambda given: " ".join(given) or "plain",
)
def test_it_is_what_the_allocator_saw_of_a_real_update(overrides: dict[str, str]) -> None:
    """The CPU allocator's peak in the profiler: the plan is at most 2% below and 5% above."""
    config = settings(**overrides)
    model, batch = policy(SMALL, config), largest_batch(config)
    plan = plan_memory(model, config, CPU)
    optimizer = make_optimizer(model, config.optim, config.model.parameters)
    learn(model, batch, config)
    clip_and_step(optimizer, 1e-3, 1.0)
    learn(model, batch, config)  # so that the next micro-batch adds to its gradients
    standing = sum(p.nbytes for p in model.parameters())
    standing += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    standing += sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        learn(model, batch, config)
        clip_and_step(optimizer, 1e-3, 1.0)
    peak = standing + allocated(recorded)
    ours = plan.total - plan.engine
    assert plan.gradients + plan.optimizer + plan.weights == pytest.approx(standing, rel=1e-3)
    assert 0.98 * peak < ours < 1.05 * peak


def allocated(recorded: Any) -> int:
    """The most bytes that were alive at once of what was allocated while recording."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [BF16, BF16 | CHECKPOINTED], ids=["kept", "checkpointed"])
def test_it_is_what_pytorchs_tracker_saw_of_cudas_update(
    overrides: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole update of four layers of Qwen2.5-0.5B on fake tensors, on CUDA's route, to 1%.

    The tracker sees nothing inside the fused loss, whose workspace has a test of its own, so that is left out.
    """
    monkeypatch.setattr(flash, "has_flash", lambda device: True)
    config = settings(**overrides, **{"token_cap": "8192", "rollout.max_new_tokens": "1008"})
    batch, tracker = largest_batch(config), MemTracker()
    with FakeTensorMode() as fakes:
        model = policy(half_b(4), config)
        optimizer = make_optimizer(model, config.optim)
        fake: Any = {
            f.name: fakes.from_tensor(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), torch.Tensor)
        }
        tracker.track_external(model, optimizer)
        with tracker:
            for first in (True, False, False):
                tracker.reset_mod_stats()
                learn(model, replace(batch, **fake), config)
                if first:
                    optimizer.step()
                    optimizer.zero_grad()
    seen = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    trace = trace_update(model, config, CUDA, batch)
    plan = plan_memory(model, config, CUDA, 80 * GIB)
    outside = max(trace.copies + trace.activations, *trace[3:])
    assert plan.weights + plan.gradients + plan.optimizer + outside == pytest.approx(seen, rel=0.01)


@pytest.mark.parametrize("lora_rank", [None, "8"])
@pytest.mark.parametrize("checkpointed", [{}, CHECKPOINTED], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_extrapolate_exactly(dtype: str, checkpointed: dict[str, str], lora_rank: str | None) -> None:
    adapters = {} if lora_rank is None else {"model.lora.rank": lora_rank}
    config = settings(**{"model.dtype": dtype}, **checkpointed, **adapters)
    model, batch = on_meta(SMALL, config), largest_batch(config)
    assert trace_update(model, config, CUDA, batch) == trace_layers(5, model, config, CUDA, batch)


def test_a_model_of_unlike_layers_is_traced_whole() -> None:
    config = settings()
    model, batch = on_meta(SMALL, config), largest_batch(config)
    model.model.layers[3].mlp = torch.nn.Identity()
    assert trace_update(model, config, CPU, batch) == trace_layers(5, model, config, CPU, batch)


# --- what follows from the settings ----------------------------------------------------------------------------------


def plan_of_half_b(**overrides: str) -> Any:
    config = settings(**{"token_cap": "8192", "rollout.max_new_tokens": "1008"} | BF16 | overrides)
    return plan_memory(on_meta(half_b(24), config), config, CUDA, 80 * GIB)


def test_each_setting_moves_its_part() -> None:
    plain = plan_of_half_b()
    parameters = plain.weights // 4
    assert 494e6 < parameters < 495e6
    assert plain.gradients == plain.weights and plain.optimizer == 2 * plain.weights
    head = 151_936 * 896
    assert plain.copies == pytest.approx(2 * (parameters - head), rel=0.01)
    assert plain.engine == 2 * parameters and plain.reference == 0  # transformers decodes in the model's dtype
    assert 2 * head < plain.head <= 2 * GIB + 8192 * 896 * 14 + 2 * head

    checkpointed = plan_of_half_b(**CHECKPOINTED)
    assert checkpointed.activations < plain.activations / 10 and checkpointed.total < plain.total
    wide = plan_of_half_b(**{"model.dtype": "float32"})
    assert wide.copies == 0 and wide.engine == 0 and wide.activations > 1.7 * plain.activations
    assert plan_of_half_b(**{"loss.kl_coef": "0.1"}).reference == plain.weights
    assert plan_of_half_b(**VLLM).engine == int(0.35 * 80 * GIB)
    assert plan_of_half_b(token_cap="4096").activations == pytest.approx(plain.activations / 2, rel=0.01)
    adapters = plan_of_half_b(**{"model.lora.rank": "16", "loss.kl_coef": "0.1"})
    assert adapters.gradients < plain.gradients / 50 and adapters.optimizer == 2 * adapters.gradients
    assert adapters.reference == 0  # the frozen weights are the reference's too


def test_bfloat16_parameters_and_offloading_move_theirs() -> None:
    """Masters are in the optimizer's part, autocast copies nothing, the engine shares; adapters are no masters."""
    plain, masters = plan_of_half_b(), plan_of_half_b(**MASTERS)
    assert masters.weights == plain.weights // 2 and masters.gradients == plain.gradients == plain.weights
    assert masters.optimizer == 3 * plain.weights and masters.copies == masters.engine == 0
    assert masters.activations < 0.9 * plain.activations and plain.head - masters.head == 2 * 151_936 * 896
    adapters = plan_of_half_b(**MASTERS | {"model.lora.rank": "16"})
    assert adapters.weights == pytest.approx(masters.weights, rel=0.1) and adapters.engine > 0
    assert adapters.optimizer == 2 * adapters.gradients
    away = plan_of_half_b(**MASTERS | {"optim.offload": "true"})
    assert away.optimizer == 0 and away.offloaded == masters.optimizer
    assert away.total == masters.total - masters.optimizer
    assert (
        plan_of_half_b(**{"optim.offload": "true"}).offloaded == 3 * plain.weights
    )  # the CPU steps weights of its own


def test_offloading_is_suggested_last_and_needs_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = BF16 | CHECKPOINTED
    away = settings(**given | {"optim.offload": "true"})
    model = on_meta(half_b(6), away)
    least = plan_memory(model, away, CUDA, 80 * GIB).total
    config = settings(**given)
    plan = plan_memory(model, config, CUDA, int(least / ROOM) + 1)
    ((found, promised),) = suggestions(plan, model, config, CUDA)
    assert found == {"optim.offload": True, "warm_start.optim.offload": True} and promised.total == least
    plan = plan_memory(model, away, CUDA, 80 * GIB)
    monkeypatch.setattr("gapg.model.memory.capacity", lambda device: 2**30)
    with pytest.raises(
        ConfigError, match=r"^optim\.offload=true puts 2\..* GiB into the machine's memory, which has 1\.0"
    ):
        check(plan, model, away, CUDA)


def test_responses_of_32k_tokens_are_planned() -> None:
    """Qwen2.5-1.5B, one sequence a micro-batch: four times as long, four times the activations; 80 GB hold it."""
    shape = qwen(28, hidden=1536, vocab=151_936, inner=8960, heads=(12, 2))
    plans = []
    for response in (8192, 32_768):
        sizes = {"rollout.max_prompt_tokens": "1024", "rollout.max_new_tokens": str(response)}
        config = settings(**BF16 | CHECKPOINTED | sizes, token_cap=str(1024 + response))
        plans.append(plan_memory(on_meta(shape, config), config, CUDA, 80 * 10**9))
        assert plans[-1].tokens == 1024 + response
    short, long = plans
    assert long.activations == pytest.approx(short.activations * 33 / 9, rel=0.02) and long.head == short.head
    assert long.total < ROOM * long.capacity


def test_the_plan_leaves_the_random_state_alone() -> None:
    config = settings(**{"model.lora.rank": "4"})
    model = on_meta(SMALL, config)
    before = torch.get_rng_state()
    plan_memory(model, config, CPU)
    assert torch.equal(torch.get_rng_state(), before)


LONG = {"token_cap": "4096", "rollout.max_new_tokens": "1008"}


@pytest.mark.parametrize(
    ("given", "gib", "keys"),
    [
        ({}, 7.5, [{"token_cap"}, {"model.gradient_checkpointing"}, {"model.dtype"}]),
        (BF16, 4.9, [{"model.gradient_checkpointing", "token_cap"}]),
    ],
)
def test_what_is_suggested_fits(given: dict[str, str], gib: float, keys: list[set[str]]) -> None:
    config = settings(**LONG | given)
    model = on_meta(half_b(6), config)
    plan = plan_memory(model, config, CUDA, int(gib * GIB))
    assert plan.total > plan.capacity
    found = suggestions(plan, model, config, CUDA)
    assert [set(changes) for changes, _ in found] == keys
    for changes, promised in found:
        again = settings(**LONG | given | {key: str(value).lower() for key, value in changes.items()})
        assert plan_memory(model, again, CUDA, plan.capacity) == promised
        assert promised.total <= ROOM * plan.capacity


def test_the_largest_cap_that_fits() -> None:
    """It fits and 1024 more does not, whatever the config's own; it holds what a sequence or a whole step needs."""
    config = settings(**LONG | BF16)
    model = on_meta(half_b(6), config)

    def total(cap: int) -> int:
        return plan_memory(model, settings(**LONG | BF16 | {"token_cap": str(cap)}), CUDA, 12 * GIB).total

    cap = fitting_token_cap(model, config, CUDA, 12 * GIB)
    assert cap % 1024 == 0 and cap > config.token_cap
    assert total(cap) <= ROOM * 12 * GIB < total(cap + 1024)

    few = settings(**LONG | BF16, **{"rollout.prompts_per_step": "1", "rollout.samples_per_prompt": "3"})
    assert fitting_token_cap(model, few, CUDA, 80 * GIB) == 3072  # three sequences of 1,024 are all there are

    alone = total(1024)
    assert fitting_token_cap(model, config, CUDA, int(alone / ROOM) + 1) == 1024
    with pytest.raises(ConfigError, match=r"^one sequence of 1024 tokens needs .* GiB .*: shorten sequences, or train"):
        fitting_token_cap(model, config, CUDA, int(alone / ROOM) - 1)


def test_a_refusal_is_one_line_that_names_what_fits() -> None:
    config = settings(**LONG | BF16 | CHECKPOINTED | VLLM)
    model = on_meta(half_b(6), config)
    with pytest.raises(ConfigError) as refusal:
        check(plan_memory(model, config, CUDA, int(6.2 * GIB)), model, config, CUDA)
    need, fix = str(refusal.value).split("; ")
    assert need.startswith("an update needs 7.") and need.endswith("the GPU has 6.2 GiB")
    assert fix == "set rollout.vllm_args.gpu_memory_utilization=0.14 (5.8 GiB)"

    plan = plan_memory(model, config, CUDA, 3 * GIB)
    with pytest.raises(ConfigError, match=r"AdamW's state alone take 3\.4 GiB: train adapters \(model\.lora\.rank\)"):
        check(plan, model, config, CUDA)


def test_the_quickstart_says_one_line(make_model: Callable[..., PreTrainedModel]) -> None:
    with console.capture() as said:
        announce(make_model(), load_config("quickstart"), CPU)
    (line,) = said.get().splitlines()
    assert line.startswith("memory: ") and "for an update of 9728 tokens" in line


def test_a_plan_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--config", "quickstart", "--token-cap", "4096"])
    shown = capsys.readouterr().out
    assert "micro-batches of 4066 tokens" in shown and "total" in shown and "optimizer" in shown


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        (Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
        (BloomConfig, {}),  # whose own attention packs nothing
    ],
)
def test_a_plan_of_a_folder_without_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: Any, settings: dict[str, Any]
) -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    kind(**size, num_attention_heads=2, num_key_value_heads=2, head_dim=16, **settings).save_pretrained(tmp_path)
    main(["info", "--config", "quickstart", "--model.path", str(tmp_path), "--token-cap", "1024"])
    shown = capfd.readouterr()
    assert "activations" in shown.out and "total" in shown.out
    assert ("as if this model packs" in shown.err) == (kind is not BloomConfig)
    assert len(shown.err.splitlines()) <= 1  # nothing of torch's own about a trace


def test_a_model_that_cannot_be_traced_has_no_plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    main(["info", "--config", "quickstart", "--model.path", str(tmp_path)])
    assert "memory: no plan for opt: " in capfd.readouterr().err


def test_the_shapes_of_the_products_of_experts() -> None:
    """Those of forward and of both gradients, as torch's own in the type that it has one for."""
    x, w, offsets = torch.ones(6, 8), torch.ones(3, 8, 16), torch.tensor([1, 4, 6], dtype=torch.int32)
    for a, b in ((x, w), (torch.ones(6, 16), w.mT), (x.mT, torch.ones(6, 16))):
        want = torch._grouped_mm(a.bfloat16(), b.bfloat16(), offsets)
        assert _grouped_mm(a, b, offsets).shape == want.shape


def test_the_warm_start_is_refused_before_it_begins(
    small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "capacity", lambda device: 1 << 20)
    config = small_config(tmp_path)
    task = make_task(config)
    with pytest.raises(ConfigError, match=r"an update needs .* and the machine has 1\.0 MiB"):
        warm_start(config, tmp_path / "checkpoints", task, load_tokenizer(config.model, task))
    assert not (tmp_path / "checkpoints").exists()
