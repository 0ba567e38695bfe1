"""The library's face: its names, its examples, the module, and what trainers wrap around it."""

import doctest
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gapg_kernels
from gapg_kernels import LogprobHead, linear_logprob
from tests.kernels.two_ranks import on_two_ranks


def test_every_name_is_a_function_or_a_class_that_says_what_it_is() -> None:
    for name in gapg_kernels.__all__:
        thing = getattr(gapg_kernels, name)
        assert callable(thing) and thing.__doc__, name
    assert sorted(gapg_kernels.__all__, key=lambda name: (name.lower() == name, name)) == gapg_kernels.__all__


EXAMPLES = {"linear_logprob", "linear_loss", "chunked_head", "module", "fused_policy_loss", "policy_loss"}
EXAMPLES |= {"shared_layout", "shared_prompt_attention"}


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(gapg_kernels.__path__)))
def test_the_examples_run(name: str) -> None:
    if name in EXAMPLES:
        tried = doctest.testmod(importlib.import_module(f"gapg_kernels.{name}"))
        assert tried.attempted > 0 and tried.failed == 0


def test_every_public_function_has_its_modules_example() -> None:
    homes = {getattr(gapg_kernels, name).__module__.rpartition(".")[2] for name in gapg_kernels.__all__}
    assert homes - EXAMPLES <= {"policy_loss_reference", "routes"}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(16, 50, dtype=dtype), torch.randn(3, 5, 16, dtype=dtype), torch.randint(50, (3, 5))


def gradients(lm_head: nn.Linear, hidden: Tensor, logprob: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((0.3 * logprob).exp().sum(), (hidden, lm_head.weight, lm_head.bias)))


def test_the_module_is_the_function_on_the_models_own_parameters() -> None:
    lm_head, hidden, target = inputs()
    head, hidden = LogprobHead(lm_head, temperature=0.7, softcap=4.0), hidden.requires_grad_()
    assert dict(head.named_parameters()) == dict(lm_head.named_parameters())
    want = linear_logprob(
        hidden.view(-1, 16), lm_head.weight, target.view(-1), bias=lm_head.bias, temperature=0.7, softcap=4.0
    )
    assert torch.equal(head(hidden, target), want.view(3, 5))
    out = head(hidden, target, loss=lambda logprob, weight: (weight * logprob).sum(), rows={"weight": torch.rand(15)})
    out.loss.backward()
    assert torch.equal(out.logprob, want.detach()) and hidden.grad is not None and lm_head.weight.grad is not None
    with pytest.raises(TypeError, match="LogprobHead: rows: options of a loss; pass loss="):
        head(hidden, target, rows={})
    assert torch.equal(head(hidden[0, 0], target[0, 0]), want[0])


def test_the_module_refuses_a_head_with_adapters_and_targets_of_another_shape() -> None:
    """An adapter's layer shows its base's weight, so that training it would do nothing."""
    peft = pytest.importorskip("peft")
    lm_head, hidden, target = inputs()
    adapted = peft.get_peft_model(nn.Sequential(lm_head), peft.LoraConfig(target_modules=["0"])).base_model.model[0]
    with pytest.raises(TypeError, match=r"lm_head is of <class 'peft.*>: pass the torch\.nn\.Linear itself"):
        LogprobHead(adapted)
    for odd in (target.T, target.flatten(), target[:, :4]):
        with pytest.raises(ValueError, match=r"hidden \(3, 5, 16\) and target .*: a target for each hidden state"):
            LogprobHead(lm_head)(hidden, odd)


def test_gradient_checkpointing_changes_no_bit() -> None:
    lm_head, hidden, target = inputs()
    head, hidden = LogprobHead(lm_head), hidden.requires_grad_()
    want = gradients(lm_head, hidden, head(hidden, target))
    got = gradients(lm_head, hidden, checkpoint(head, hidden, target, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_is_followed_as_linear_follows_it() -> None:
    lm_head, hidden, target = inputs()
    head, hidden = LogprobHead(lm_head), hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = head(hidden, target)
        logits = lm_head(hidden)
    plain = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    assert got.dtype == torch.float32
    assert (got - plain).abs().max() < 0.05 and not torch.equal(got, head(hidden, target))
    for grad, want in zip(gradients(lm_head, hidden, got), gradients(lm_head, hidden, plain), strict=True):
        assert grad.dtype == torch.float32 and (grad - want).norm() < 0.02 * want.norm()
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="under autocast"):
        head(hidden, target)


def test_it_compiles_into_one_graph_for_any_number_of_rows() -> None:
    lm_head, _, _ = inputs()
    head: Any = LogprobHead(lm_head, softcap=5.0)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 12, 31):
            hidden, target = torch.randn(rows, 16, requires_grad=True), torch.randint(50, (rows,))
            got, want = compiled(hidden, target), head(hidden, target)
            assert torch.equal(got, want)
            pairs = zip(gradients(lm_head, hidden, got), gradients(lm_head, hidden, want), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_ddp_and_fsdp2_train_it_as_any_module(tmp_path: Path) -> None:
    for found in on_two_ranks("module_on_ranks", tmp_path):
        plain = found.pop("plain")
        assert set(found) == {"DDP", "DDP, its loss", "FSDP2", "FSDP2, its loss"}
        for name, grads in found.items():
            for got, want in zip(grads, plain, strict=True):
                assert (got - want).norm() <= 1e-5 * want.norm(), name
