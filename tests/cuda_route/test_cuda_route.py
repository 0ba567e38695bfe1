"""The update's forward and backward as CUDA gets them, at real sizes, without a GPU.

The policy is float32 and computes in bfloat16 by autocast, which leaves the residual stream and the rotary embedding's
tables float32: which types reach a kernel depends on autocast. The meta device has no autocast (torch.autocast refuses
it), so it cannot show that. Fake tensors can: they have a device but no data, and operators on them go through the
dispatcher's real autocast and autograd, then stop at shapes and types. What needs a value, and so would wait for a
GPU, raises DataDependentOutputException.

1. Fake tensors on "cuda" show which route CUDA's autocast leads to. A CPU build can do no more with them: autograd and
   indexing ask for a device guard that it lacks.
2. Fake tensors on "cpu" therefore carry the whole update, under the CPU's autocast and with `has_flash` saying yes.
   That this is CUDA's autocast too is checked, not assumed: only operators that both treat alike see a 16-bit tensor.
3. Real tensors on the CPU compare packed rows under autocast with one sequence at a time.
"""

from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.model import attention
from gapg.model.policy import response_logprobs
from tests.cuda_route.real_sizes import (
    FULL,
    HALF,
    VOCAB,
    Operators,
    check_autocast_is_cudas,
    check_flash_backward,
    check_flash_forward,
    check_products,
    fake_policy,
    qwen,
)

# --- 1. CUDA's autocast, at the attention ----------------------------------------------------------------------------


@pytest.fixture
def cuda_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast("cuda", bfloat16) asks for a real GPU; the dispatcher's part does not need one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


def fake_inputs(query: torch.dtype, value: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((8, 14, query), (8, 2, query), (8, 2, value))
    return tuple(torch.empty(tokens, heads, 64, dtype=dtype, device="cuda") for tokens, heads, dtype in shapes)


@pytest.mark.parametrize(("query", "value"), [(FULL, HALF), (HALF, HALF), (FULL, FULL)])
@pytest.mark.usefixtures("cuda_autocast", "flash_everywhere")
def test_under_cudas_autocast_every_mixture_reaches_flash_attention(query: torch.dtype, value: torch.dtype) -> None:
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", HALF), Operators() as operators:
        q, k, v = fake_inputs(query, value)
        weight = torch.empty(64, 64, device="cuda")
        assert torch.nn.functional.linear(q, weight).dtype == HALF  # autocast is on, and is CUDA's own
        out = attention.packed_attention(q, k, v, torch.empty(3, dtype=torch.int32, device="cuda"), 8)
        assert (out.dtype, out.shape, out.device.type) == (HALF, (8, 14, 64), "cuda")
    (call,) = operators.calls["aten._flash_attention_forward"]
    assert [x.dtype for x in call.args[:3]] == [HALF] * 3


@pytest.mark.usefixtures("flash_everywhere")
def test_without_autocast_only_16_bits_reach_it() -> None:
    with FakeTensorMode(), torch.no_grad():
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        assert attention.packed_attention(*fake_inputs(HALF, HALF), cu, 8).dtype == HALF
        with pytest.raises(ValueError, match=r"run the model under torch\.autocast"):
            attention.packed_attention(*fake_inputs(FULL, HALF), cu, 8)
        with pytest.raises(DataDependentOutputException):  # the documented slow route, which reads the lengths
            attention.packed_attention(*fake_inputs(FULL, FULL), cu, 8)


# --- 2. the log-probs and their gradients -----------------------------------------------------------------------------


def fake_batch(sequences: int, length: int, responses: int) -> PackedBatch:
    tokens = sequences * length
    ids, at = (torch.empty(n, dtype=torch.int64) for n in (tokens, responses))
    return PackedBatch(
        input_ids=ids,
        position_ids=ids,
        cu_seqlens=torch.empty(sequences + 1, dtype=torch.int32),
        max_length=length,
        response_index=at,
        target=at,
        weight=torch.empty(responses),
        rollout_logprob=torch.empty(responses),
        group=at,
        sample=at,
    )


@pytest.mark.parametrize(
    ("config", "checkpointing", "per_sequence"),
    [
        pytest.param(qwen("0.5B"), False, 256, id="0.5B"),
        pytest.param(qwen("1.5B", layers=4), True, 448, id="1.5B, checkpointing, more responses than E is kept for"),
    ],
)
@pytest.mark.usefixtures("flash_everywhere")
def test_the_update_at_real_sizes(config: Qwen2Config, checkpointing: bool, per_sequence: int) -> None:
    sequences, length = 16, 512
    tokens, rows = sequences * length, sequences * per_sequence
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    head_dim, kv_heads = hidden // heads, config.num_key_value_heads
    with FakeTensorMode():
        model, batch = fake_policy(config, checkpointing), fake_batch(sequences, length, rows)
        with FlopCounterMode(display=False) as counter, Operators() as operators:
            logprob = response_logprobs(model, batch, compute=HALF)
            (batch.weight * logprob).sum().backward()
    assert (logprob.dtype, logprob.shape) == (FULL, (rows,))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.dtype, parameter.grad.shape) == (FULL, parameter.shape), name

    # each layer's attention is one varlen kernel each way
    attentions = operators.calls["aten._flash_attention_forward"]
    assert sum(not call.backward for call in attentions) == layers
    assert len(attentions) == layers * (2 if checkpointing else 1)
    for call in attentions:
        check_flash_forward(call)
        q, k, _, cu_q, cu_k, longest_q, longest_k, _, causal, _ = call.args
        assert (q.shape, k.shape) == ((tokens, heads, head_dim), (tokens, kv_heads, head_dim))
        assert cu_q is cu_k and cu_q.shape == (sequences + 1,)
        assert (longest_q, longest_k, causal) == (length, length, True)
    backwards = operators.calls["aten._flash_attention_backward"]
    assert len(backwards) == layers
    for call in backwards:
        check_flash_backward(call)
    check_products(operators)

    # so is the head; E is made for its R rows only
    (head,) = operators.calls["gapg.linear_logprob"]
    head_hidden, head_weight = head.args[:2]
    assert (head_hidden.dtype, head_hidden.shape) == (HALF, (rows, hidden))
    assert (head_weight.dtype, head_weight.shape) == (FULL, (VOCAB, hidden))  # the operator rounds it, once

    check_autocast_is_cudas(operators)

    # the work, exactly
    flops: dict[str, int] = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops[str(operator)] += count
    linears = {name: m.weight.numel() for name, m in model.base_model.named_modules() if hasattr(m, "in_features")}
    weights = sum(linears.values())
    expected = 6 * weights * tokens
    if checkpointing:  # computed again, but for each layer's last product, which no backward needs
        expected += 2 * (weights - sum(n for name, n in linears.items() if name.endswith("down_proj"))) * tokens
    assert flops.pop("aten.mm") + flops.pop("aten.addmm") == expected
    # PyTorch counts the full square, though half is masked: 2 products forward, 5 backward
    square = 2 * sequences * length**2 * heads * head_dim * layers
    assert flops.pop("aten._flash_attention_forward") == square * (4 if checkpointing else 2)
    assert flops.pop("aten._flash_attention_backward") == square * 5
    kept = rows * (VOCAB * 2) < 2 << 30
    assert kept == (not checkpointing)  # so both cases are here
    assert flops.pop("gapg.linear_logprob") == 2 * rows * hidden * VOCAB
    assert flops.pop("gapg.linear_logprob_backward") == (4 if kept else 6) * rows * hidden * VOCAB
    assert not flops


def test_without_flash_attention_the_update_would_wait_for_the_gpu() -> None:
    """So the update above would have raised, had it done so."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with FakeTensorMode():
        model, batch = fake_policy(config, False), fake_batch(2, 8, 4)
        with pytest.raises(DataDependentOutputException):
            response_logprobs(model, batch, compute=HALF)


# --- 3. values -------------------------------------------------------------------------------------------------------


def tiny(kind: type[PreTrainedConfig], implementation: str) -> PreTrainedModel:
    config = kind(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=FULL)
    for name, parameter in model.named_parameters():  # biases too, which start at 0; the norms' stay near 1
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model.train()


def one_by_one(model: PreTrainedModel, examples: list[Example], compute: torch.dtype) -> torch.Tensor:
    """The same, by transformers' own sdpa and an ordinary head on each sequence alone."""
    found = []
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        with torch.autocast("cpu", compute, enabled=compute != FULL):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(e.prompt_ids) - 1 : -1]
        logits = states.to(compute).float() @ model.get_output_embeddings().weight.to(compute).float().T
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(e.response_ids)[:, None])[:, 0])
    return torch.cat(found)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_under_autocast_packed_equals_one_by_one(kind: type[PreTrainedConfig]) -> None:
    """To a fraction of what bfloat16 costs either of them, in log-probs and in every gradient."""
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 9), (1, 3), (7, 7), (5, 9), (2, 1), (12, 20)]

    def ids(n: int) -> list[int]:
        return torch.randint(1, 60, (n,), generator=generator).tolist()

    examples = [Example(ids(prompt), ids(response), weight=1.0 + i) for i, (prompt, response) in enumerate(lengths)]
    (batch,) = packed_batches(examples, 4000, torch.device("cpu"))

    def outcome(implementation: str, compute: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny(kind, implementation)
        if implementation == attention.NAME:
            packed = response_logprobs(model, batch, compute=compute)
            (batch.weight * packed).sum().backward()
            logprob = torch.cat([packed[batch.weight == e.weight] for e in examples])
        else:
            logprob = one_by_one(model, examples, compute)
            weight = torch.cat([torch.full((len(e.response_ids),), e.weight) for e in examples])
            (weight * logprob).sum().backward()
        return logprob.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact, exact_grads = outcome("sdpa", FULL)
    plain, plain_grads = outcome("sdpa", HALF)
    ours, our_grads = outcome(attention.NAME, HALF)
    assert ours.dtype == FULL and exact.std() > 0.3
    assert relative(ours, plain) < 0.5 * relative(plain, exact)
    parameters = dict(tiny(kind, "sdpa").named_parameters())
    assert exact_grads.keys() == plain_grads.keys() == our_grads.keys() == parameters.keys()
    for name, exact_grad in exact_grads.items():
        rounding = relative(plain_grads[name], exact_grad)
        assert rounding < 0.1 and our_grads[name].dtype == FULL, name
        assert relative(our_grads[name], exact_grad) < 1.5 * rounding, name
        assert relative(our_grads[name], plain_grads[name]) < 0.7 * rounding, name
