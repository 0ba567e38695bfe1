"""Adapters train and nothing else does; everyone but the optimizer sees the plain model with merged weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Mamba2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.build import make_task
from gapg.config import RunConfig, load_config
from gapg.config_sections import LoraConfig, ModelConfig, OptimConfig
from gapg.errors import ConfigError
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.model import attention
from gapg.model.load import check_model, load_tokenizer
from gapg.model.lora import add_adapters, frozen_twin, target_layers
from gapg.model.policy import response_logprobs, response_loss
from gapg.model.precision import adapter_tensors
from gapg.optim import make_optimizer
from gapg.runs import checkpoint
from gapg.runs.run import Run
from gapg.train import train
from gapg.warm_start import warm_start
from gapg_kernels.policy_loss import PolicyLossOptions
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.engines.vllm import _weight_names
from gapg_rollout.records import Sampling

MakeModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=6)
REWARDS = torch.tensor([[1.0, 0.0, 0.3, 0.0]])
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def moved(model: PreTrainedModel, config: LoraConfig = LORA) -> PreTrainedModel:
    """The model with adapters that have left their start, where B is zero."""
    add_adapters(model, config, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in adapter_tensors(model).items():
        if "lora_B" in name:
            tensor.normal_(std=0.1, generator=generator)
    return model


def qwen(**settings: Any) -> PreTrainedModel:
    """Biases in its attention, unlike Llama."""
    attention.register()
    torch.manual_seed(0)
    size = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(**{**size, "num_key_value_heads": 2, "initializer_range": 0.2, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gpt2() -> PreTrainedModel:
    """Its linear layers are Conv1D, with transposed weights, and its head is its embedding."""
    attention.register()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_embd=32, n_head=2, n_layer=2, n_positions=64, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


MODELS = [
    pytest.param(qwen, id="biases"),
    pytest.param(lambda: qwen(tie_word_embeddings=True), id="tied"),
    pytest.param(gpt2, id="gpt2"),
]


def batch() -> PackedBatch:
    rows = [Example([3, 4, 5], [7 + i, 11, 13 + 2 * i, 9][: 2 + i % 3], group=0, sample=i) for i in range(4)]
    (packed,) = packed_batches(rows, 100, CPU)
    return packed


class Logprobs(nn.Module):
    """`response_logprobs` of a model whose weights can be given by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, packed: PackedBatch) -> torch.Tensor:
        return response_logprobs(self.model, packed)


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_that_of_the_formula(targets: tuple[str, ...] | None, tied: bool) -> None:
    """Autograd through W + (alpha / rank) B A, written out, of the loss that `response_loss` stands for."""
    plain = qwen(tie_word_embeddings=tied)
    model = moved(copy.deepcopy(plain), LoraConfig(rank=4, alpha=6, targets=targets))
    packed = batch()
    response_loss(model, packed, REWARDS, 4, PolicyLossOptions()).loss.backward()

    factors = {name: tensor.clone().requires_grad_() for name, tensor in adapter_tensors(model).items()}
    weights = {}
    for name, weight in plain.named_parameters():
        key = f"{name.removesuffix('.weight')}.lora_%s.default.weight"
        if key % "A" in factors:
            weights[f"model.{name}"] = weight.detach() + 6 / 4 * factors[key % "B"] @ factors[key % "A"]
    assert len(weights) * 2 == len(factors) == 2 * 2 * (len(LLAMA) if targets is None else 2)
    advantage = (REWARDS - REWARDS.mean()) * 4 / 3
    logprob = functional_call(Logprobs(plain), weights, (packed,))
    (-(advantage[0, packed.sample] * logprob).sum() / 4).backward()

    scale = max(float(f.grad.abs().max()) for f in factors.values() if f.grad is not None)
    assert scale > 1e-2
    for name, parameter in model.named_parameters():
        if name in factors:
            torch.testing.assert_close(parameter.grad, factors[name].grad, atol=1e-5 * scale, rtol=0)
        else:
            assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize("make", MODELS)
def test_it_starts_as_the_model_it_was(make: Callable[[], PreTrainedModel]) -> None:
    plain, ids = make(), torch.arange(3, 20)[None]
    before, names = plain(ids).logits, list(plain.state_dict())
    model = copy.deepcopy(plain)
    add_adapters(model, LORA, seed=0)
    assert type(model) is type(plain) and torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    other = copy.deepcopy(plain)
    add_adapters(other, LORA, seed=1)
    a, b = (next(t for n, t in adapter_tensors(m).items() if "lora_A" in n) for m in (model, other))
    assert not torch.equal(a, b), "A follows the seed"


@pytest.mark.parametrize("make", MODELS)
def test_merged_weights_under_plain_names(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """What an engine is synced with and what a checkpoint's folder holds computes what the live model does."""
    plain, ids = make(), torch.arange(3, 20)[None]
    plain.save_pretrained(tmp_path / "plain")
    model = moved(copy.deepcopy(plain))
    merged = model.state_dict()
    assert list(merged) == list(plain.state_dict())
    assert _weight_names(tmp_path / "plain") <= merged.keys(), "vLLM is sent what it asks for"
    assert not any(tensor.requires_grad for tensor in merged.values())
    twin = copy.deepcopy(plain)
    twin.load_state_dict(merged)
    with torch.no_grad():
        live = model(ids).logits
        torch.testing.assert_close(twin(ids).logits, live, atol=2e-5, rtol=1e-5)
        assert (plain(ids).logits - live).abs().max() > 0.1

        path = checkpoint.save(tmp_path, 1, model, tokenizer, make_optimizer(model, OptimConfig(lr=1e-3)), {})
        assert _weight_names(path / "model") == _weight_names(tmp_path / "plain")
        loaded = AutoModelForCausalLM.from_pretrained(path / "model")
        torch.testing.assert_close(loaded(ids).logits, live, atol=2e-5, rtol=1e-5)


def test_the_transformers_engine_samples_the_live_policy(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = moved(make_model(seed=1))
    engine = TransformersEngine(model, tokenizer)
    for _ in range(2):
        ((_, completions),) = engine.generate([[3, 4, 5]], 4, Sampling(8, temperature=1.0, seed=2))
        rows = [
            Example([3, 4, 5], c.token_ids, rollout_logprobs=c.logprobs, sample=i) for i, c in enumerate(completions)
        ]
        (packed,) = packed_batches(rows, 100, CPU)
        ours = response_logprobs(model, packed).detach()
        torch.testing.assert_close(ours, packed.rollout_logprob, atol=1e-5, rtol=1e-5)
        for tensor in adapter_tensors(model).values():
            tensor.mul_(1.5)
        engine.sync(model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_the_frozen_head_skips_a_product(tied: bool) -> None:
    """4THV for the head: its forward and d(hidden), counted apart from the layers below it."""
    plain = qwen(tie_word_embeddings=tied)
    model = moved(copy.deepcopy(plain))
    packed = batch()
    rows, size = len(packed.target), 32 * 60

    def flops(policy: PreTrainedModel) -> int:
        with FlopCounterMode(display=False) as whole:
            response_loss(policy, packed, REWARDS, 4, PolicyLossOptions()).loss.backward()
        with FlopCounterMode(display=False) as body:
            states = policy.base_model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                use_cache=False,
                **attention.packed_arguments(packed.cu_seqlens, packed.max_length),
            ).last_hidden_state
            states.sum().backward()
        return int(whole.get_total_flops() - body.get_total_flops())

    assert flops(model) == 4 * rows * size
    assert flops(plain) == 6 * rows * size
    assert model.get_output_embeddings().weight.grad is None


def test_checkpointed_activations_and_bfloat16(make_model: MakeModel) -> None:
    model, packed = moved(make_model(seed=2)), batch()
    grads = []
    for compute, recompute in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        response_loss(model, packed, REWARDS, 4, PolicyLossOptions(), compute=compute).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
        model.zero_grad()
    exact, again, rough = grads
    assert torch.equal(exact, again)
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


def test_a_twin_shares_its_tensors_and_stays_behind() -> None:
    model, ids = qwen(tie_word_embeddings=True), torch.arange(3, 20)[None]
    before = model(ids).logits
    twin = frozen_twin(model)
    moved(model)
    assert torch.equal(twin(ids).logits, before) and not torch.equal(model(ids).logits, before)
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours and not p.requires_grad for p in twin.parameters())
    assert not adapter_tensors(twin)


# --- settings --------------------------------------------------------------------------------------------------------


def test_targets_are_linear_layers_by_name(make_model: MakeModel) -> None:
    model = make_model()
    every = target_layers(model, LoraConfig(rank=1))
    assert {name.rpartition(".")[2] for name in every} == set(LLAMA) and len(every) == 2 * len(LLAMA)
    some = target_layers(model, LoraConfig(rank=1, targets=("q_proj", "layers.1.mlp.up_proj")))
    assert [name.split(".", 2)[2] for name in some] == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]


def test_the_last_layer_of_mamba_is_no_target(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its kernels read that layer's weight without calling it; peft refuses it too, with an error of its own."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "expand": 2, "n_groups": 1}
    config = Mamba2Config(**size, num_heads=4, head_dim=16, state_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, LoraConfig(rank=2), seed=0)
    assert {name.split(".")[4] for name in adapter_tensors(model)} == {"in_proj"}
    config.save_pretrained(tmp_path)
    lora = LoraConfig(rank=2, targets=("in_proj", "out_proj"))
    with pytest.raises(ConfigError, match=r"no linear layer .* is called 'out_proj'; choose from in_proj$"):
        check_model(ModelConfig(path=str(tmp_path), lora=lora), tokenizer)


@pytest.mark.parametrize("target", ["qq_proj", "lm_head", "embed_tokens", "proj", "norm"])
def test_a_wrong_target_is_told_before_weights_are_loaded(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, target: str
) -> None:
    make_model().config.save_pretrained(tmp_path)
    lora = LoraConfig(rank=2, targets=("q_proj", target))
    for path in (None, str(tmp_path)):
        said = rf"model\.lora\.targets: .*'{target}'.*q_proj, k_proj.*down_proj$"
        with pytest.raises(ConfigError, match=said) as error:
            check_model(ModelConfig(path=path, lora=lora), tokenizer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.lora.rank", "0", r"model\.lora\.rank=.?0.*greater than or equal to 1"),
        ("model.lora", "{alpha: 8}", r"model\.lora\.rank: required"),
        ("model.lora.dropout", "0.1", r"model\.lora\.dropout: unknown key"),
        ("model.lora", "{rank: 2, targets: []}", r"model\.lora\.targets"),
    ],
)
def test_wrong_settings_name_their_key(key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("quickstart", {"model.lora.rank": "4", key: value} if key.count(".") > 1 else {key: value})


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gapg.config_sections.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"model\.lora: peft is not installed; pip install 'gapg\[lora\]'"):
        load_config("quickstart", {"model.lora.rank": "4"})
    load_config("quickstart")


# --- a run -----------------------------------------------------------------------------------------------------------

ADAPTED = {"model__lora": "{rank: 4}", "optim__lr": "4e-3", "eval__every": "0"}


def test_the_warm_start_of_such_a_run_trains_all_weights(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    found = []
    for lora in ("null", "{rank: 4}"):
        config = small_config(tmp_path, model__lora=lora, warm_start__steps="2")
        task = make_task(config)
        path = warm_start(config, tmp_path / lora, task, load_tokenizer(config.model, task))
        found.append(AutoModelForCausalLM.from_pretrained(path).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_trains_the_adapters_only(start: Callable[..., Run], warm_model: Path) -> None:
    run = start(**ADAPTED, loss__kl_coef="0.05")
    adapters = {name: tensor.clone() for name, tensor in adapter_tensors(run.model).items()}
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {
        id(p) for name, p in run.model.named_parameters() if name in adapters
    }
    assert run.reference is not None
    base = {p.data_ptr() for p in run.model.parameters()}
    assert all(p.data_ptr() in base for p in run.reference.parameters()), "the reference costs no second copy"
    train(run, validate)

    before = AutoModelForCausalLM.from_pretrained(warm_model).state_dict()
    left = {name.replace(".base_layer", ""): p for name, p in run.model.named_parameters() if name not in adapters}
    assert left.keys() == before.keys()
    assert all(torch.equal(before[name], p) for name, p in left.items())
    assert all(not torch.equal(adapters[name], t) for name, t in adapter_tensors(run.model).items())
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert len(rows) == 3 and all(r["logprob_gap"] < 1e-4 for r in rows), "the engine has the merged weights"
    assert rows[0]["policy/kl"] == 0 < rows[-1]["policy/kl"], "and the reference the base alone"
    last = checkpoint.latest(run.folder / "checkpoints")
    assert last
    files = {"model", "optimizer.safetensors", "adapters.safetensors", "state.json", "manifest.json"}
    assert {p.name for p in last.iterdir()} == files
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(last / "model")(ids).logits
        torch.testing.assert_close(merged, run.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_killed_run_ends_with_the_same_bits(start: Callable[..., Run]) -> None:
    settings = {**ADAPTED, "steps": "5", "eval__every": "1", "loss__kl_coef": "0.05"}

    def scored(run: Run) -> dict[str, float]:
        return {"eval/accuracy": 0.0, "eval/local_accuracy": 0.0, "eval/call_fraction": 0.0}

    def deadly(run: Run) -> dict[str, float]:
        if run.state.step == 3:
            raise KeyboardInterrupt
        return scored(run)

    train(start("whole", **settings), scored)
    killed = start("killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(killed, deadly)
    killed.close()
    resumed = start("killed", **settings)
    assert resumed.state.step == 2
    train(resumed, scored)

    found = []
    for run in ("whole", "killed"):
        folder = resumed.folder.parent / run
        rows = [{k: v for k, v in r.items() if "seconds/" not in k} for r in read_jsonl(folder / "metrics.jsonl")]
        last = checkpoint.latest(folder / "checkpoints")
        assert last and last.name == "step-5"
        names = ("adapters.safetensors", "optimizer.safetensors", "state.json", "model/model.safetensors")
        found.append((rows, [(last / name).read_bytes() for name in names]))
    assert [r["step"] for r in found[0][0]] == list(range(6))
    assert any(r["grad_norm"] > 0 for r in found[0][0][1:])
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


def test_adapters_of_other_layers_are_refused(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    saved, other = moved(make_model()), moved(make_model(), LoraConfig(rank=4, targets=("q_proj",)))
    path = checkpoint.save(tmp_path, 1, saved, tokenizer, make_optimizer(saved, OptimConfig(lr=1e-3)), {})
    with pytest.raises(ValueError, match=r"adapters\.safetensors: made for other layers"):
        checkpoint.restore_adapters(path, other)
