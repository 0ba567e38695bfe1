"""Liger's layers compute what transformers' do, or are refused.

Without a GPU its kernels run in Triton's interpreter, in a process of its own (this file as a script): in float32,
which proves the choice of functions and their formulas, and nothing about 16-bit types or speed.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from gapg.batches.batching import Example, packed_batches
from gapg.config import load_config
from gapg.config_sections import LoraConfig, ModelConfig
from gapg.errors import ConfigError
from gapg.model import attention
from gapg.model.load import apply_liger, load_model
from gapg.model.lora import add_adapters
from gapg.model.policy import response_loss
from gapg.model.precision import adapter_tensors
from gapg.tasks.countdown import Countdown
from gapg_kernels.policy_loss import PolicyLossOptions

SIZE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, initializer_range=0.2,
)  # fmt: skip


def tiny(kind: type[PreTrainedConfig], **settings: object) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SIZE, **settings}), attn_implementation=attention.NAME).train()


def step(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """One update of plain gradient descent on the policy loss; returns the log-probs before it."""
    rows = [Example([3, 4, 5, 6][: 2 + i % 3], [7 + i, 11, 13 + 2 * i, 9][: 2 + i % 3], sample=i) for i in range(4)]
    (batch,) = packed_batches(rows, 100, device)
    out = response_loss(model, batch, torch.tensor([[1.0, 0.0, 0.3, 0.0]]), 4, PolicyLossOptions())
    out.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return out.logprob


def check_step(kind: type[PreTrainedConfig], device: torch.device, *, lora: bool = False, **settings: object) -> None:
    """Same log-probs and same weights after one step, with and without Liger."""
    plain = tiny(kind, **settings).to(device)
    if lora:
        add_adapters(plain, LoraConfig(rank=2), seed=0)
        for name, tensor in adapter_tensors(plain).items():
            if "lora_B" in name:  # from zero, A would not move in one step
                tensor.normal_(std=0.1)
    model, layer = copy.deepcopy(plain), plain.base_model.layers[0]
    transformers = sys.modules[type(layer).__module__]
    assert getattr(transformers.apply_rotary_pos_emb, "__name__", "") != "liger_rotary_pos_emb", (
        "one check a family: Liger stays"
    )
    expected = step(plain, device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_liger(model, True)
    layer = model.base_model.layers[0]
    patched = {m._get_name() for m in (model.base_model.norm, layer.input_layernorm, layer.mlp)}
    assert patched == {"LigerRMSNorm", "LigerSwiGLUMLP"}
    assert transformers.apply_rotary_pos_emb.__name__ == "liger_rotary_pos_emb"
    assert "forward" not in model.__dict__ and "liger" not in type(model).forward.__module__, "its losses are off"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(tiny(kind).base_model.norm) is type(plain.base_model.norm), "a model made later is a plain one"
    torch.testing.assert_close(step(model, device), expected, atol=1e-5, rtol=1e-5)
    changed = 0
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        changed += not torch.equal(p, before[name])
    assert changed > 5


def check_refusal(device: torch.device) -> None:
    """Liger would compute SiLU whatever the config says. `auto` leaves model and module as they were."""
    model = tiny(MistralConfig, hidden_act="gelu").to(device)
    ids = torch.arange(3, 9, device=device)[None]
    module, before = sys.modules[type(model).__module__], model(input_ids=ids).logits
    functions, layers = dict(vars(module)), [dict(vars(m)) for m in model.modules()]
    apply_liger(model, "auto")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(vars(module)[key] is value for key, value in functions.items())
    assert [set(vars(m)) for m in model.modules()] == [set(x) for x in layers]
    try:
        apply_liger(model, True)
    except ConfigError as refusal:
        assert "model.liger=true: liger-kernel changes what this 'mistral' model computes" in str(refusal), refusal
    else:
        raise AssertionError("a model with another activation was not refused")


def interpret_liger() -> None:
    """Two things that the interpreter lacks: float arguments as tensors, and libdevice's rsqrt."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(arg: object) -> object:
        if not isinstance(arg, float):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)


def run_as_script(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all equal\n")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_one_step_is_the_same_in_the_interpreter() -> None:
    run_as_script("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_step_is_the_same_on_a_gpu() -> None:
    run_as_script("cuda")


def test_an_architecture_that_liger_does_not_know_is_refused() -> None:
    model = tiny(GPT2Config, n_embd=32, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=1)
    with pytest.raises(ConfigError, match=r"model\.liger=true: liger-kernel has nothing for 'gpt2'.*liger=false"):
        apply_liger(model, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_is_refused(countdown: Countdown) -> None:
    with pytest.raises(ConfigError, match=r"^model\.liger=true: liger-kernel needs a CUDA device.*liger=false$"):
        load_model(ModelConfig(liger=True), countdown.tokenizer(), seed=0)


def test_without_liger_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gapg.config_sections.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed; pip install 'gapg\[liger\]'"):
        load_config("quickstart", {"model.liger": "true"})
    assert load_config("quickstart", {"model.liger": "auto"}).model.liger == "auto"


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    torch.set_num_threads(1)
    if where.type == "cpu":
        interpret_liger()
    check_refusal(where)
    check_step(LlamaConfig, where, mlp_bias=True)
    check_step(Qwen2Config, where, lora=True)
    check_step(Qwen3Config, where)
    print("all equal")
