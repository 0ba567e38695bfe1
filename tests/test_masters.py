"""bfloat16 parameters with float32 masters: no small update is lost, and the policy is the one of float32 weights."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.build import check_run
from gapg.config import RunConfig, load_config
from gapg.config_sections import LoraConfig, ModelConfig, OptimConfig
from gapg.errors import ConfigError
from gapg.model.load import load_model
from gapg.model.lora import add_adapters, frozen_twin
from gapg.model.memory import check_offload
from gapg.model.precision import round_parameters
from gapg.optim import MasterAdamW, clip_and_step, make_optimizer
from gapg.runs import checkpoint
from gapg.runs.run import Run
from gapg.tasks.countdown import Countdown
from gapg.update import policy_update
from gapg_rollout.engines.transformers import TransformersEngine
from tests.test_update import VOCAB, responses

MakeModel = Callable[..., PreTrainedModel]
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, weight_decay=0.1)
MASTERS = {"model__dtype": "bfloat16", "model__parameters": "bfloat16"}


def settings(dtype: str, parameters: str) -> RunConfig:
    given = {"model.dtype": dtype, "model.parameters": parameters, "optim.lr": "3e-3", "optim.warmup_steps": "0"}
    return load_config("quickstart", given | {"token_cap": "90", "steps": "100"})


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().float().flatten() for x in tensors])


def masters(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[p]["master"] for p in model.parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, loss: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return clip_and_step(optimizer, 1e-3, 1.0, torch.tensor(loss))


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_updates_below_a_bfloat16_weights_last_bit_add_up() -> None:
    """400 steps of 1e-5 from 1, whose neighbour is 1 - 2^-8: a bfloat16 weight would stay where it is."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    lost = layer.weight.detach().bfloat16() - torch.tensor(1e-5, dtype=torch.bfloat16)
    assert (lost == 1).all()
    optimizer = make_optimizer(layer, OptimConfig(lr=1e-5), "bfloat16")
    for i in range(400):
        layer.weight.grad = torch.ones(4, 4)
        clip_and_step(optimizer, 1e-5, 1e9)
        if i == 0:
            assert (layer.weight == 1).all()
    torch.testing.assert_close(optimizer.state[layer.weight]["master"], torch.full((4, 4), 1 - 4e-3), atol=1e-5, rtol=0)
    assert layer.weight.dtype == torch.bfloat16 and (layer.weight == 1 - 2**-8).all()


@pytest.mark.parametrize("offload", [False, True])
def test_masters_take_the_steps_of_float32_weights(make_model: MakeModel, offload: bool) -> None:
    """The same bits, also of what a step that is not finite leaves alone."""
    plain = make_model(seed=3)
    model = copy.deepcopy(plain)
    ours = MasterAdamW(model.parameters(), 1e-3, OPTIM.betas, OPTIM.weight_decay, offload=offload)
    round_parameters(model)
    theirs = make_optimizer(plain, OPTIM)
    assert type(theirs) is torch.optim.AdamW
    for i, loss in enumerate((0.0, 1.0, float("nan"), 2.0)):
        assert torch.equal(step(model, ours, i, loss), step(plain, theirs, i, loss)) or loss != loss
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.state[p]["master"], q) and torch.equal(p, q.bfloat16())
            assert all(torch.equal(ours.state[p][k], theirs.state[q][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
            assert p.grad is None


def test_gradients_are_summed_unrounded() -> None:
    """1 + 2^-12 is no bfloat16 number."""
    layer = nn.Linear(2, 2, bias=False)
    make_optimizer(layer, OPTIM, "bfloat16")
    for size in (1.0, 2**-12):
        layer(torch.full((1, 2), size, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad == 1 + 2**-12).all()


@pytest.mark.parametrize("key", ["optim.offload", "warm_start.optim.offload"])
def test_offloading_without_a_gpu_is_refused_before_the_warm_start(
    key: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = load_config("quickstart", {key: "true", "warm_start.steps": "1"})
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}=true: the model is on the CPU.*set {key}=false$"):
        check_run(config, Countdown(), tokenizer)
    check_offload(config, torch.device("cuda"))


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_settings", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_an_update_is_as_close_to_float32_as_autocasts(make_model: MakeModel, model_settings: dict[str, bool]) -> None:
    """Losses of eight updates to 2% of what they move, and weights that end within 5% of the way that they went."""
    examples, table = responses()
    losses, ends = dict[str, list[float]](), dict[str, torch.Tensor]()
    start = make_model(seed=5, vocab_size=VOCAB, **model_settings)
    for dtype, parameters in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        config, model = settings(dtype, parameters), copy.deepcopy(start)
        optimizer = make_optimizer(model, config.optim, config.model.parameters)
        rows = [policy_update(model, optimizer, config, i, examples, table) for i in range(8)]
        name = f"{dtype} {parameters}"
        losses[name] = [row["policy/loss"] for row in rows]
        rounded = parameters == "bfloat16"
        assert {p.dtype for p in model.parameters()} == {getattr(torch, parameters)}
        ends[name] = flat(masters(model, optimizer) if rounded else list(model.parameters()))
    exact = losses.pop("float32 float32")
    assert exact[0] - exact[-1] > 2
    for found in losses.values():
        assert found == pytest.approx(exact, abs=0.02 * (exact[0] - exact[-1]))
    end = ends.pop("float32 float32")
    way = float((end - flat(list(start.parameters()))).norm())
    for name, found in ends.items():
        assert 0 < float((found - end).norm()) < 0.05 * way, name


def test_the_residual_stream_is_bfloat16(make_model: MakeModel) -> None:
    """Under autocast alone it is float32; adapters and what transformers marks stay float32."""
    seen: dict[bool, set[torch.dtype]] = {}
    for rounded in (False, True):
        model = make_model(seed=5, vocab_size=VOCAB)
        if rounded:
            model._keep_in_fp32_modules_strict = {"input_layernorm"}
            round_parameters(model)
        kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
        assert not rounded or kept == {f"model.layers.{i}.input_layernorm.weight" for i in range(2)}
        dtypes = seen.setdefault(rounded, set())
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    assert seen == {False: {torch.float32}, True: {torch.bfloat16}}


def test_adapters_are_their_own_masters(make_model: MakeModel) -> None:
    """The reference shares the rounded weights, and merged weights are float32."""
    model = make_model(seed=5, vocab_size=VOCAB)
    twin = frozen_twin(model)
    add_adapters(model, LoraConfig(rank=2), seed=0)
    optimizer = make_optimizer(model, OPTIM, "bfloat16")
    assert type(optimizer) is torch.optim.AdamW
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(p.dtype == torch.bfloat16 for p in twin.parameters())
    assert model.state_dict()["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    examples, table = responses()
    before = flat([p for p in model.parameters() if p.requires_grad])
    policy_update(model, optimizer, settings("bfloat16", "bfloat16"), 0, examples, table)
    assert not torch.equal(before, flat([p for p in model.parameters() if p.requires_grad]))


def test_the_engine_shares_the_parameters(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(seed=5)
    make_optimizer(model, OPTIM, "bfloat16")
    engine = TransformersEngine(model, tokenizer, dtype=torch.bfloat16)
    for name, p in engine.model.named_parameters():
        assert p.data_ptr() == model.get_parameter(name).data_ptr(), name


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", ["bfloat16", "float32", "float32 offloaded"])
def test_a_checkpoint_keeps_the_masters(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, now: str
) -> None:
    """Training goes on with the same bits; with float32 parameters from the masters. The folder has the policy."""
    model = make_model(seed=1)
    optimizer = make_optimizer(model, OPTIM, "bfloat16")
    for i in range(3):
        step(model, optimizer, i)
    path = checkpoint.save(tmp_path, 3, model, tokenizer, optimizer, {"step": 3})
    again = load_model(ModelConfig(path=str(path / "model")), tokenizer, seed=0)
    assert all(torch.equal(p.float(), q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    parameters, _, offload = now.partition(" ")
    resumed = make_optimizer(again, OPTIM.model_copy(update={"offload": bool(offload)}), parameters)  # type: ignore[arg-type]
    checkpoint.restore_optimizer(path, again, resumed)
    if parameters == "float32":  # what samples before the next step, too
        assert torch.equal(flat(list(again.parameters())), flat(masters(model, optimizer)))
    for i in range(3, 6):
        step(model, optimizer, i)
        step(again, resumed, i)
    found = masters(again, resumed) if now == "bfloat16" else list(again.parameters())
    assert torch.equal(flat(found), flat(masters(model, optimizer)))
    assert {p.dtype for p in again.parameters()} == {getattr(torch, parameters)}


def test_masters_begin_where_float32_weights_were(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A run with float32 parameters goes on with bfloat16 ones: what it had is the masters."""
    model = make_model(seed=1)
    optimizer = make_optimizer(model, OPTIM)
    step(model, optimizer, 0)
    path = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"step": 1})
    again = load_model(ModelConfig(path=str(path / "model")), tokenizer, seed=0)
    resumed = make_optimizer(again, OPTIM, "bfloat16")
    checkpoint.restore_optimizer(path, again, resumed)
    step(model, optimizer, 1)
    step(again, resumed, 1)
    assert torch.equal(flat(masters(again, resumed)), flat(list(model.parameters())))


def test_a_run_goes_on_with_the_same_bits(start: Callable[..., Run]) -> None:
    """Through rollouts, sync, a penalty to the reference, and a checkpoint; the reference rounds as the policy does."""
    from gapg.train import train_step

    run = start(**MASTERS, loss__kl_coef="0.1")
    assert run.reference is not None and {p.dtype for p in run.reference.parameters()} == {torch.bfloat16}
    row = train_step(run)
    assert row["policy/kl"] == 0 and not row["skipped"]
    run.state.step += 1
    run.save()
    again = start(**MASTERS, loss__kl_coef="0.1")
    for r in (run, again):
        train_step(r)
    assert torch.equal(flat(masters(run.model, run.optimizer)), flat(masters(again.model, again.optimizer)))
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True))


def test_masters_of_adapters_begin_where_the_checkpoint_is(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `optim.offload`, which a CPU refuses, adapters have masters, and checkpoints hold what both are."""
    from gapg.train import train_step

    def offloaded(model: nn.Module, config: OptimConfig, _: str) -> MasterAdamW:
        trained = (p for p in model.parameters() if p.requires_grad)
        return MasterAdamW(trained, config.lr, config.betas, config.weight_decay, offload=True)

    monkeypatch.setattr("gapg.runs.run.make_optimizer", offloaded)
    run = start(model__lora__rank="2")
    train_step(run)
    run.state.step += 1
    run.save()
    again = start(model__lora__rank="2")
    for ours, theirs in zip(again.optimizer.state.items(), run.optimizer.state.items(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1]["master"], theirs[1]["master"])


def test_float32_compute_with_bfloat16_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.parameters=bfloat16: .* set model\.dtype=bfloat16 too$"):
        load_config("quickstart", {"model.parameters": "bfloat16"})
