"""The policy forward: packed or padded responses to log-probs, or to the policy loss, without [R, V] logits."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from gapg.batches.batching import Example, PackedBatch, one_batch, packed_batches
from gapg.config import ConfigError, one_line
from gapg.model import attention
from gapg.runs import health
from gapg.runs.tracking import say_once
from gapg_kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.policy_loss import PolicyLossOptions


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    """log pi(token) at `temperature` of every response token of a batch, [R] float32, differentiable.

    Only the R response positions go through the LM head, and no [R, V] tensor is kept. `compute` is the type of the
    matrix products; weights and their gradients stay float32.
    """
    return _head_logprobs(model, _response_states(model, batch, compute), batch.target, temperature)


def _head_logprobs(
    model: PreTrainedModel, hidden_RH: torch.Tensor, target_R: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    head, compute = model.get_output_embeddings(), hidden_RH.dtype
    bias = None if head.bias is None else head.bias.to(compute)
    temperature = temperature / logit_scale(model)
    return linear_logprob(hidden_RH, head.weight.to(compute), target_R, bias=bias, temperature=temperature)


def response_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    rewards_PG: torch.Tensor,
    denominator: float,
    options: PolicyLossOptions,
    *,
    temperature: float = 1.0,
    compute: torch.dtype = torch.float32,
    old_logprob: torch.Tensor | None = None,
    reference_logprob: torch.Tensor | None = None,
    with_entropy: bool = False,
) -> FusedLoss:
    """The policy loss of a batch, to be followed by ``loss.backward()`` and nothing else.

    The head's share of d(weight) is added to its float32 ``.grad`` here and now, never rounded to `compute`; the rest
    comes with backward. `rewards_PG` is the reward table of the whole step, on the model's device; the other arguments
    are as in `gapg_kernels.fused_policy_loss`.
    """
    head = model.get_output_embeddings()
    weight, main_grad = head.weight, None
    if weight.requires_grad:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        main_grad = weight.grad
    return fused_policy_loss(
        _response_states(model, batch, compute),
        weight.detach().to(compute),
        batch.target,
        rewards_PG,
        batch.group,
        batch.sample,
        denominator=denominator,
        options=options,
        bias=None if head.bias is None else head.bias.to(compute),
        temperature=temperature / logit_scale(model),
        coefficient=batch.weight,
        old_logprob=old_logprob,
        rollout_logprob=batch.rollout_logprob,
        reference_logprob=reference_logprob,
        with_entropy=with_entropy,
        main_grad=main_grad,
        drop_zero_rows=False,  # the batch holds what has a gradient
    )


def logit_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its head's logits with; the head's temperature takes it in. 1 for most."""
    config = model.config.get_text_config()
    if scaling := getattr(config, "logits_scaling", None):  # the Granites divide by it
        return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
    if width := getattr(config, "logits_mup_width_multiplier", None):
        return float(1 / width)
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere's, Falcon-H1's
        if isinstance(scale := getattr(config, name, None), float):
            return scale
    return 1.0


def _response_states(model: PreTrainedModel, batch: PackedBatch, compute: torch.dtype) -> torch.Tensor:
    """The last hidden states that predict a response token, [R, H] in `compute`."""
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        hidden_BLH = _body(model)(**_arguments(batch), use_cache=False).last_hidden_state
    return hidden_BLH.flatten(0, 1).index_select(0, batch.response_index).to(compute)


def _body(model: PreTrainedModel) -> torch.nn.Module:
    """The model below its head."""
    body: torch.nn.Module = model.base_model
    if body is model:
        body = model.get_decoder()
    return model.get_submodule("model") if body is model else body  # neither of the two knows Llama 4's


def _arguments(batch: PackedBatch) -> dict[str, Any]:
    """What tells a model where the sequences are.

    Padded rows need no mask: padding is on the right, where no causal layer looks. Positions are the model's own.
    """
    if batch.padded:
        return {"input_ids": batch.input_ids.view(-1, batch.max_length)}
    rows = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    if batch.shared is not None:
        return rows | attention.shared_arguments(batch.shared)
    return rows | attention.packed_arguments(batch.cu_seqlens, batch.max_length)


# --- is it exact? ----------------------------------------------------------------------------------------------------

LONGEST_PROBE = 4160
"""Tokens, more than the usual window of 4096; one beyond it is compared with the longest sequence, but not tried."""

BORDER = re.compile("window(?!_layers)|attention_chunk|index_|max_position")
"""Names of settings that are a number of tokens, beyond which a model computes something else."""

TOLERANCE = 1e-4
"""Of float32 log-probs in nats (of large ones relatively), of hidden states relatively; right models are at 4e-5."""


@contextmanager
def _exact_products() -> Iterator[None]:
    """Without TF32, in which a GPU's convolutions compute by default, and round by more than `TOLERANCE`."""
    cudnn: Any = torch.backends.cudnn
    settings: list[Any] = [cudnn.conv, torch.backends.cuda.matmul]
    before = [x.fp32_precision for x in settings]
    for x in settings:
        x.fp32_precision = "ieee"
    try:
        yield
    finally:
        for x, precision in zip(settings, before, strict=True):
            x.fp32_precision = precision


@_exact_products()
def choose_route(model: PreTrainedModel, pack: Literal["auto"] | bool = "auto", longest: int | None = None) -> bool:
    """Whether updates pack sequences end to end (True) or pad them to rows (False): packed where that is exact.

    Recurrent, convolutional and linear-attention layers carry state from one packed sequence into the next; attention
    may need what the packed kernels lack (a short sliding window, sinks). Padded rows go through transformers' own
    attention for the model, "sdpa" or "eager", which it is set to for good. Says so, once, where it pads.

    Args:
        model: on its device, before adapters are added.
        pack: the config's `update.pack`.
        longest: most tokens of a prompt and its response; None leaves what hangs on it unchecked.

    Raises ConfigError, one line, where no allowed route gives the model's own log-probs.
    """
    probes, refusals = _probes(model, longest), list[Exception]()
    plain = attention.implementation(model.config) == "eager"  # for good: its attention cannot be exchanged
    packed = [] if pack is False else ["eager" if plain else attention.NAME]
    padded = [] if pack is True else ["eager"] if plain else ["sdpa", "eager"]
    before = model.config._attn_implementation
    for implementation, pads in [*((name, False) for name in packed), *((name, True) for name in padded)]:
        try:
            model.set_attn_implementation(implementation)
            _compare_all(model, probes, pads, longest)
        except (ConfigError, ValueError, ImportError) as error:  # not every model has sdpa
            refusals.append(error)
            continue
        if pads:
            reason = f"packing is not exact: {refusals[0]}" if packed else "update.pack=false"
            say_once(f"updates pad their sequences instead of packing them; {reason}", about="padding")
        return not pads
    model.set_attn_implementation(before)
    if pack is True:
        raise ConfigError(f"update.pack=true: {refusals[0]}; set update.pack=auto for padded rows")
    raise ConfigError(str(refusals[-1]))


@_exact_products()
def check_supported(model: PreTrainedModel, *, padded: bool = False, longest: int | None = None) -> None:
    """Refuses a model whose log-probs here, packed or padded, are not those of its own logits, a sequence at a time.

    Several sequences of unlike lengths, packed in two orders, with and without a shared prompt. The model's own
    logits are those of transformers' "eager" attention in evaluation mode, as the policy samples.

    Raises ConfigError, one line, as `choose_route`.
    """
    _compare_all(model, _probes(model, longest), padded, longest)


class _Probe(NamedTuple):
    """A sequence, and the model's own log-probs [r] and last hidden states [r, H] of its response."""

    example: Example
    logprob: torch.Tensor
    hidden: torch.Tensor


def _probes(model: PreTrainedModel, longest: int | None) -> list[_Probe]:
    """Sequences of unlike lengths, two with the same prompt; and one beyond the last border that the run can cross."""
    name = model.config.model_type
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model {name}: has no LM head; choose a causal language model")
    _check_weights(model)
    _check_positions(model, longest)
    config, draw = model.config.get_text_config(), random.Random(0)
    sizes = [(0, 6, 4), (0, 6, 9), (1, 3, 2), (2, 11, 5)]
    most = min(longest or 0, LONGEST_PROBE)
    if most > 16 and any(border < most for border in _borders(config.to_dict())):
        sizes.append((3, most - 8, 8))  # the longest: a border may be a product of two settings
    prompts: dict[int, list[int]] = {}
    probes = []
    for i, (group, prompt, response) in enumerate(sizes):
        ids = prompts.setdefault(group, _draw(draw, config.vocab_size, prompt))
        example = Example(ids, _draw(draw, config.vocab_size, response), group=group, sample=i)
        try:
            probes.append(_Probe(example, *_own_rows(model, example)))
        except Exception as error:  # whatever a model's code says to an input that it did not expect
            raise ConfigError(f"model {name}: {one_line(error)}") from None
    if not all(p.logprob.isfinite().all() for p in probes):
        raise ConfigError(f"model {name}: its log-probs are not finite; choose another model")
    if not (_in_range(model) and all(p.hidden.any(-1).all() for p in probes)):
        raise ConfigError(
            f"model.path={model.name_or_path}: its weights or hidden states overflow float32, or are all 0, so the "
            "file is damaged or its training diverged; choose another checkpoint"
        )
    return probes


def _in_range(model: PreTrainedModel) -> bool:
    """Whether the model begins as every step must leave it."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return health.is_finite(model, torch.float32)
    finally:
        model.set_attn_implementation(implementation)


def _borders(config: dict[str, Any]) -> Iterator[int]:
    """Lengths beyond which attention is another: windows, chunks, chosen keys, rotary frequencies of long sequences."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _borders(value)
        elif type(value) is int and value > 0 and BORDER.search(key):
            yield value


def _draw(draw: random.Random, vocab: int, n: int) -> list[int]:
    return [draw.randrange(min(3, vocab - 1), vocab) for _ in range(n)]  # special tokens mostly come first


@torch.no_grad()
def _own_rows(model: PreTrainedModel, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]], device=model.device)
    rows = slice(-len(example.response_ids) - 1, -1)
    limit = {"logits_to_keep": -rows.start} if "logits_to_keep" in signature(model.forward).parameters else {}
    training, implementation, hidden = model.training, model.config._attn_implementation, list[torch.Tensor]()
    hook = _body(model).register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state[0, rows]))
    model.eval()
    model.set_attn_implementation("eager")
    try:
        logits = model(input_ids=ids, use_cache=False, **limit).logits[0, rows].float()
        if not hidden:  # OPT goes past its own body to a part of it
            _body(model)(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
        model.set_attn_implementation(implementation)
        model.train(training)
    return torch.log_softmax(logits, -1).gather(1, ids[0, rows.start + 1 :, None]).squeeze(1), hidden[0]


def _check_weights(model: PreTrainedModel) -> None:
    for name, x in model.named_parameters():
        if not x.sum().isfinite() and not x.isfinite().all():  # the sum makes no mask, but may overflow
            raise ConfigError(
                f"model.path={model.name_or_path}: weight {name} holds NaN or infinity, so the file is damaged or its "
                "training diverged; choose another checkpoint"
            )


def _check_positions(model: PreTrainedModel, longest: int | None) -> None:
    """Learned positions and tables end; others may go on, though the model has not seen them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None or not isinstance(most, int) or longest <= most:
        return
    learned = [n for n, _ in model.named_parameters() if re.search(r"pos(ition)?s?[_.]|wpe", n)]
    tables = [n for n, x in model.named_buffers() if x.dim() > 1 and most in x.shape]
    what = f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens, and this {model.config.model_type}"
    if learned or tables:
        raise ConfigError(f"{what} model has positions for {most}: lower one of the two")
    say_once(f"{what} model was made for {most}: beyond them its answers may be poor")


def _compare_all(model: PreTrainedModel, probes: list[_Probe], padded: bool, longest: int | None) -> None:
    try:
        for batch in _layouts([p.example for p in probes], model.device, padded, longest):
            _compare(model, batch, probes)
    except ConfigError:
        raise
    except Exception as error:  # as above
        route = "padded" if padded else "packed"
        raise ConfigError(f"model {model.config.model_type}: cannot take {route} rows: {one_line(error)}") from None


def _layouts(examples: list[Example], device: torch.device, padded: bool, longest: int | None) -> Iterator[PackedBatch]:
    if padded:
        # the longest beside a shorter one, and the others; all as long as that would take their time
        yield from packed_batches(examples, 2 * max(map(len, examples)), device, padded=True)
        return
    for order in (examples, examples[::-1]):
        batch = one_batch(order, device)
        # the attention compares the longest sequence with the model's window
        yield replace(batch, max_length=max(batch.max_length, longest or 0))
        yield one_batch(order, device, share=True)


@torch.no_grad()
def _compare(model: PreTrainedModel, batch: PackedBatch, probes: list[_Probe]) -> None:
    name, route = model.config.model_type, "padded" if batch.padded else "packed"
    why = (
        "rotary frequencies follow the longest of a batch, or that look ahead"
        if batch.padded
        else "layers carry state along a row"
    )
    hidden_RH = _response_states(model, batch, torch.float32)
    logprob_R = _head_logprobs(model, hidden_RH, batch.target)
    for probe in probes:
        rows = (batch.group == probe.example.group) & (batch.sample == probe.example.sample)
        if not rows.any():  # it is in another batch
            continue
        off = (hidden_RH[rows] - probe.hidden).norm(dim=-1) / probe.hidden.norm(dim=-1)
        if not (off <= TOLERANCE).all():
            raise ConfigError(
                f"model {name}: computes something else for {route} sequences than for each alone, as models do whose "
                f"{why} (its hidden states differ by {float(off.max()):.0e})"
            )
        gap = (logprob_R[rows] - probe.logprob).abs()
        if not (gap <= TOLERANCE * (1 + probe.logprob.abs())).all():
            raise ConfigError(
                f"model {name}: its logits are not its last hidden states times its LM head, as with softcapping or a "
                f"layer between, which is not supported (log-probs differ by {float(gap.max()):.0e} nats)"
            )
