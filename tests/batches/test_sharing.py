"""The cost model of shared prompts: its counts against counted work, and its decisions at the ends."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gapg.batches.sharing import RATES, ModelShape, saving, shape_of
from gapg.model import attention
from gapg_kernels.shared_layout import share_prompts

Groups = list[tuple[int, list[int]]]

SMALL = ModelShape(layers=28, weights=1_310_000_000, heads=12, head_dim=128)
TOY = ModelShape(layers=2, weights=100_000, heads=4, head_dim=16)


def model() -> PreTrainedModel:
    attention.register()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).train()


def counted(policy: PreTrainedModel, tokens: int, arguments: dict[str, object]) -> tuple[int, int]:
    """Flops of the matrix products and of the attention, forward and backward, as PyTorch counts them."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        embedded = policy.get_input_embeddings()(ids).detach().requires_grad_()
        policy.base_model(
            inputs_embeds=embedded, position_ids=ids, use_cache=False, **arguments
        ).last_hidden_state.sum().backward()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counts.items() if name in ("aten.mm", "aten.addmm"))
    rope = sum(flops for name, flops in counts.items() if name == "aten.bmm")  # of the rotary embedding's tables
    return products, sum(counts.values()) - products - rope


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def test_its_flops_are_those_that_run() -> None:
    groups: Groups = [(30, [12, 5, 9]), (7, [20])]
    policy = model()
    shape = shape_of(policy)
    assert shape == (2, 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160), 4, 16)
    what = saving(groups, shape, RATES["cpu"])
    assert (what.tokens_unshared, what.tokens_saved) == (30 * 3 + 7 + 46, 60)
    tokens = what.tokens_unshared - what.tokens_saved
    prompts, responses = [p for p, _ in groups], [r for _, rs in groups for r in rs]
    layout = share_prompts(
        cumulative(prompts + responses), cumulative(prompts), cumulative([sum(r) for _, r in groups])
    )
    products, pairs = counted(policy, tokens, attention.shared_arguments(layout))
    assert products == 6 * shape.weights * tokens
    # PyTorch counts masked pairs too: the whole square of each segment
    masked = sum(n * (n - 1) // 2 for n in prompts + responses)
    assert what.flops_shared == products + pairs - 14 * 2 * 4 * 16 * masked


@given(st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(1, 300), min_size=1, max_size=8)), max_size=5))
def test_the_difference_is_what_the_formula_says(groups: Groups) -> None:
    what = saving(groups, SMALL, RATES["cuda"])
    alone = [saving([(p, [r])], SMALL, RATES["cuda"]) for p, rs in groups for r in rs]
    assert what.flops_unshared == sum(a.flops_unshared for a in alone) == sum(a.flops_shared for a in alone)
    assert what.tokens_unshared == sum(a.tokens_unshared for a in alone)
    assert not any(a.pays for a in alone)
    fewer = sum((len(rs) - 1) * p * (p + 1) // 2 for p, rs in groups)
    saved = 6 * SMALL.weights * what.tokens_saved + 14 * 28 * 12 * 128 * fewer
    assert what.flops_unshared - what.flops_shared == saved
    assert what.pays == (what.overhead_flops < saved) == (what.speedup > 1)


@pytest.mark.parametrize("device", RATES)
def test_long_prompts_pay_and_lone_responses_do_not(device: str) -> None:
    long = saving([(1024, [256] * 8)], SMALL, RATES[device])
    assert long.pays and 2 < long.speedup < 8
    assert not saving([(1024, [256])], SMALL, RATES[device]).pays
    assert not saving([(1, [2, 2])], TOY, RATES[device]).pays
    nothing = saving([], SMALL, RATES[device])
    assert not nothing.pays and nothing.speedup == 1.0
    gains = [saving([(p, [64] * 8)], SMALL, RATES[device]).speedup for p in (8, 64, 512, 4096)]
    assert gains == sorted(gains)
