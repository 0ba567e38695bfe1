"""Packed rows against one sequence at a time, and unpacked calls against transformers' own sdpa."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import _registry, current_flash_attention_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from gapg.model import attention
from gapg_kernels import equal_lengths
from tests.kernels.flash_on_cpu import backward, flash_on_cpu, forward
from tests.kernels.test_flash import Activated

attention.register()
attention.register()  # must change nothing

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-mha": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
}
LENGTHS = [5, 1, 9, 5, 2, 1, 9]


def build(config: PretrainedConfig, implementation: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():  # the default 0.02 makes attention nearly uniform, and biases are 0
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).train()


def packed(lengths: list[int], device: str = "cpu") -> dict[str, Any]:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    ids = torch.randint(1, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(device)
    arguments = attention.packed_arguments(cu, max(lengths))
    return {"input_ids": ids, "position_ids": positions[None], "use_cache": False, **arguments}


def gradients(model: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_by_one(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    sequences = batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())
    return torch.cat([model(sequence[None], use_cache=False).logits for sequence in sequences], dim=1)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one_in_outputs_and_every_gradient(name: str, checkpointing: bool) -> None:
    plain, model = build(CONFIGS[name], "sdpa"), build(CONFIGS[name], attention.NAME)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = packed(LENGTHS)
    expected, got = one_by_one(plain, batch), model(**batch).logits
    assert error(got, expected) < 1e-6
    expected_gradients, got_gradients = gradients(plain, expected), gradients(model, got)
    assert expected_gradients.keys() == got_gradients.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in expected_gradients.items():
        assert error(got_gradients[parameter], gradient) < 3e-6, parameter


def test_packed_bfloat16_is_as_close_to_float32_as_one_by_one_is() -> None:
    config, batch = CONFIGS["qwen3"], packed(LENGTHS)
    exact = gradients(model := build(config, "sdpa"), one_by_one(model, batch))
    plain = gradients(model := build(config, "sdpa", torch.bfloat16), one_by_one(model, batch))
    ours = gradients(model := build(config, attention.NAME, torch.bfloat16), model(**batch).logits)
    for name, gradient in exact.items():
        assert error(ours[name].float(), gradient) < 1.5 * error(plain[name].float(), gradient) + 1e-3, name


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=8),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([None, 0.3]),
)
def test_packed_attention_is_its_definition(lengths: list[int], heads: tuple[int, int], scale: float | None) -> None:
    total, (q_heads, k_heads) = sum(lengths), heads
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, h, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (q_heads, k_heads, k_heads)
    )
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    allowed = (sequence[:, None] == sequence).tril()
    keys, values = (x.repeat_interleave(q_heads // k_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * (8**-0.5 if scale is None else scale)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)
    got = attention.packed_attention(q, k, v, cu, scale=scale)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("skip_mask", [True, False])
def test_packing_builds_no_mask(skip_mask: bool) -> None:
    batch = packed([7, 8] * 60)
    if not skip_mask:
        del batch["attention_mask"]
    model, tokens = build(CONFIGS["qwen2"], attention.NAME), 900
    with LargestTensor() as largest:
        model.base_model(**batch)
    assert tokens * 96 <= largest.elements < tokens * tokens


def test_restarting_positions_without_cu_seqlens_are_still_separate_sequences() -> None:
    model, batch = build(CONFIGS["llama"], attention.NAME), packed(LENGTHS)
    only_positions = {name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}
    assert error(model(**only_positions).logits, one_by_one(model, batch)) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_sdpa(side: str) -> None:
    plain, model = build(CONFIGS["qwen2"], "sdpa"), build(CONFIGS["qwen2"], attention.NAME)
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generation_from_padded_prompts_equals_sdpa(implementation: str | None) -> None:
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": implementation}
    texts = [
        build(CONFIGS["llama"], name).eval().generate(ids, attention_mask=mask, disable_compile=True, **options)
        for name in ("sdpa", attention.NAME)
    ]
    assert torch.equal(*texts)


def test_the_cuda_route_runs_on_the_meta_device() -> None:
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    tokens, cu = 16_384, torch.empty(33, dtype=torch.int32, device="meta")
    rows = {name: torch.empty((1, tokens), dtype=torch.int64, device="meta") for name in ("input_ids", "position_ids")}
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(**rows, use_cache=False, **attention.packed_arguments(cu, 1024)).last_hidden_state
        hidden.sum().backward()
    assert hidden.shape == (1, tokens, 896) and hidden.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.base_model.parameters())
    operators = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert operators["aten._flash_attention_forward"] > 0 and operators["aten._flash_attention_backward"] > 0


def test_the_meta_route_refuses_what_the_kernel_lacks() -> None:
    def call(head_dim: int, longest: int | None) -> None:
        x = torch.empty(8, 2, head_dim, device="meta", dtype=torch.bfloat16)
        attention.packed_attention(x, x, x, torch.empty(3, dtype=torch.int32, device="meta"), longest)

    call(256, 8)
    for head_dim in (264, 20):
        with pytest.raises(ValueError, match=f"at most 256, not {head_dim}: compute in float32"):
            call(head_dim, 8)
    with pytest.raises(ValueError, match="needs max_length_q"):
        call(64, None)


def test_the_meta_route_takes_16_bits_only_like_the_kernel() -> None:
    def call(*dtypes: torch.dtype) -> torch.Tensor:
        q, k, v = (torch.empty(8, 2, 64, device="meta", dtype=dtype) for dtype in dtypes)
        return attention.packed_attention(q, k, v, torch.empty(3, dtype=torch.int32, device="meta"), 8)

    half, full = torch.bfloat16, torch.float32
    assert call(half, half, half).dtype == half
    assert call(*[torch.float16] * 3).dtype == torch.float16
    with pytest.raises(ValueError, match=r"or float16, not torch.float32: compute in bfloat16"):
        call(full, full, full)
    with pytest.raises(ValueError, match=r"under torch\.autocast, or load it in one type"):
        call(full, full, half)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_unequal_types_are_refused_packed_or_not(odd: int) -> None:
    inputs = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    inputs[odd] = inputs[odd].bfloat16()
    module, cu = torch.nn.Module(), torch.tensor([0, 3, 8]).int()
    types = ["torch.bfloat16" if at == odd else "torch.float32" for at in range(3)]
    with pytest.raises(ValueError, match="queries are {}, keys {} and values {}: run".format(*types)):
        attention.attention_forward(module, *inputs, None, cu_seq_lens_q=cu, max_length_q=5)
    with pytest.raises(RuntimeError, match="same dtype"):
        attention.attention_forward(module, *inputs, None)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_makes_the_inputs_one_type_as_for_sdpa(kind: torch.dtype) -> None:
    """float32 queries and keys with 16-bit values are what a rotary embedding and a projection give; float64 stays."""
    values = torch.float64 if kind == torch.float64 else torch.bfloat16
    q, k, v = (torch.randn(1, 2, 8, 16, dtype=dtype, requires_grad=True) for dtype in (kind, kind, values))
    module, cu = torch.nn.Module(), torch.tensor([0, 8]).int()
    with torch.autocast("cpu", torch.bfloat16):
        packed_out, _ = attention.attention_forward(module, q, k, v, None, cu_seq_lens_q=cu, max_length_q=8)
        expected, _ = attention.attention_forward(module, q, k, v, None)
    assert packed_out.dtype == expected.dtype == values
    assert torch.equal(packed_out, expected)
    ours, theirs = (torch.autograd.grad(out.double().square().sum(), (q, k, v)) for out in (packed_out, expected))
    assert [g.dtype for g in ours] == [kind, kind, values]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"attention_dropout": 0.1}, {}, "set attention_dropout=0.0"),
        ({}, {"softcap": 30.0}, "cannot do the model's softcap"),
        ({}, {"s_aux": torch.zeros(4)}, "cannot do the model's s_aux"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 5, 32])}, r"int32, not torch.int64: pass cu_seqlens.int\(\)"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 5, 31]).int()}, "rise from 0 to the number of tokens, 32"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 40, 32]).int()}, "rise from 0"),
        ({}, {"cu_seq_lens_q": None}, r"pass all of packed_arguments"),
        ({}, {"cu_seq_lens_k": torch.tensor([0, 32]).int()}, "must equal cu_seq_lens_q"),
    ],
)
def test_refusals_name_the_fix(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    model = build(LlamaConfig(**SHAPE, **config), attention.NAME)
    batch = packed(LENGTHS)
    if "cu_seq_lens_q" in change:
        batch["cu_seq_lens_k"] = change["cu_seq_lens_q"]
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_packed_rows_are_one_row_without_a_cache() -> None:
    model, batch = build(CONFIGS["llama"], attention.NAME), packed(LENGTHS)
    doubled = {name: batch[name].expand(2, -1) for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="one row, not 2: concatenate"):
        model(**{**batch, **doubled})
    cache = model(torch.ones(1, 3, dtype=torch.int64)).past_key_values
    with pytest.raises(ValueError, match="cannot continue a cache: pass use_cache=False"):
        model(**{**batch, "past_key_values": cache, "use_cache": True})


def test_describe_says_which_backend_and_why() -> None:
    assert "FlashAttention 2 to 4 need CUDA" in attention.describe("cpu")
    assert "meta" in attention.describe(torch.device("meta"))
    assert "no varlen kernel for mps" in attention.describe("mps")


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(("config", "name"), [(CONFIGS["llama"], "head_dim"), (GPTNeoXConfig(**SHAPE), "head_size")])
def test_a_model_activates_what_works_with_its_head_sizes_and_says_so(
    config: PretrainedConfig, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(config, attention.NAME)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", lambda: Activated(forward, backward))
    attention.activate(model, torch.device("cpu"))
    assert current_flash_attention_impl() is None  # this device has none
    with flash_on_cpu():
        try:
            attention.activate(model, torch.device("cpu"))
            assert current_flash_attention_impl() == "FA4" and "attention: FA4" in capsys.readouterr().err
        finally:
            _registry.restore_flash_attention_impl()
        setattr(next(m for m in model.modules() if hasattr(m, name)), name, 20)  # which none has
        attention.activate(model, torch.device("cpu"))
    assert current_flash_attention_impl() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_autocast_reaches_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_lengths, "plan", None)  # the other route would call it
    model = build(CONFIGS["qwen2"], attention.NAME).cuda()
    batch = packed(LENGTHS, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = model.base_model(**batch).last_hidden_state
    hidden.float().sum().backward()
    assert {p.grad.dtype for p in model.base_model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_on_a_gpu_packed_equals_the_cpu(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 300, 77]
    exact = [torch.randn(sum(lengths), heads, 64, dtype=dtype) for heads in (4, 2, 2, 4)]
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        q, k, v, weights = (x.detach().to(device, kind) for x in exact)
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        out = attention.packed_attention(q, k, v, cu, max(lengths))
        results.append([x.float().cpu() for x in (out, *torch.autograd.grad(out, inputs, weights))])
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) < bound
