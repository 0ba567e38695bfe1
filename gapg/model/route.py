"""Packed or padded: the route of the policy's forward that gives the model's own log-probs, found by trying it."""

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
from gapg.console import say_once
from gapg.errors import ConfigError, one_line
from gapg.model import attention
from gapg.model.finite import is_finite
from gapg.model.policy import body, head_logprobs, response_states
from gapg_kernels import flash

LONGEST_PROBE = 4160
"""Tokens, more than the usual window of 4096; beyond them nothing is tried, and nothing taken for granted."""

ATTENTION, POSITIONS = re.compile("window(?!_layers)|attention_chunk|index_"), re.compile("max_position")
"""Names of settings that are a number of tokens, beyond which a model may attend in another way, or rotate."""

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

    Several sequences of unlike lengths are tried, packed in two orders, with and without a shared prompt, against the
    model's own logits, a sequence at a time: those of transformers' "eager" attention in evaluation mode, as the policy
    samples. Recurrent, convolutional and linear-attention layers carry state from one packed sequence into the next;
    attention may need what the packed kernels lack (softcapped scores, sinks, heads over 256 in 16-bit types on CUDA).
    Padded rows go through transformers' own attention for the model, "sdpa" or "eager", which it is set to for good.
    Says so, once, where it pads.

    Args:
        model: on its device, before adapters are added.
        pack: the config's `update.pack`.
        longest: most tokens of a prompt and its response; None leaves what hangs on it unchecked.

    Raises ConfigError, one line, where no allowed route gives the model's own log-probs.
    """
    name, before = model.config.model_type, model.config._attn_implementation
    probes, refusals = _probes(model, longest), list[ConfigError]()
    plain = attention.implementation(model.config) == "eager"  # for good: its attention cannot be exchanged
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # sdpa leaves it out in silence
    packed = [] if pack is False else ["eager" if plain else attention.NAME]
    padded = [] if pack is True else ["eager"] if plain or capped else ["sdpa", "eager"]
    for implementation, pads in [*((name, False) for name in packed), *((name, True) for name in padded)]:
        try:
            _check_tried(model, longest, pads)
            model.set_attn_implementation(implementation)
            for batch in _layouts([p.example for p in probes], model.device, pads, longest):
                _compare(model, batch, probes)
        except ConfigError as error:
            refusals.append(error)
        except Exception as error:  # whatever a model's code says to rows that it did not expect; not all have sdpa
            route = "padded" if pads else "packed"
            refusals.append(ConfigError(f"model {name}: cannot take {route} rows: {one_line(error)}"))
        else:
            if pads:
                reason = f"packing is not exact: {refusals[0]}" if packed else "update.pack=false"
                say_once(f"updates pad their sequences instead of packing them; {reason}", about="padding")
            return not pads
    model.set_attn_implementation(before)
    if pack is True:
        raise ConfigError(f"update.pack=true: {refusals[0]}; set update.pack=auto for padded rows")
    raise refusals[-1]


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
    if most > 16 and any(border < most for border in _borders(config.to_dict(), ATTENTION, POSITIONS)):
        sizes.append((3, most - 8, 8))  # the longest: a border may be a product of two settings
    prompts: dict[int, list[int]] = {}
    probes = []
    for i, (group, prompt, response) in enumerate(sizes):
        ids = prompts.setdefault(group, _draw(draw, config.vocab_size, prompt))
        example = Example(ids, _draw(draw, config.vocab_size, response), group=group, sample=i)
        try:
            with _own_attention(model):
                probes.append(_Probe(example, *_own_rows(model, example)))
        except Exception as error:  # whatever a model's code says to an input that it did not expect
            raise ConfigError(f"model {name}: {one_line(error)}") from None
    if not all(p.logprob.isfinite().all() for p in probes):
        raise ConfigError(f"model {name}: its log-probs are not finite; choose another model")
    with _own_attention(model):  # whether it begins as every step must leave it
        finite = is_finite(model, torch.float32)
    if not (finite and all(p.hidden.any(-1).all() for p in probes)):
        raise ConfigError(
            f"model.path={model.name_or_path}: its weights or hidden states overflow float32, or are all 0, so the "
            "file is damaged or its training diverged; choose another checkpoint"
        )
    _check_training_mode(model, probes[1])
    return probes


def _check_training_mode(model: PreTrainedModel, probe: _Probe) -> None:
    with _own_attention(model):
        model.train()
        logprob, _ = _own_rows(model, probe.example)
    gap = (logprob - probe.logprob).abs()
    if not (gap <= TOLERANCE * (1 + probe.logprob.abs())).all():
        raise ConfigError(
            f"model {model.config.model_type}: in training mode it computes something else than in evaluation mode, as "
            "with dropout or noise in its routers, so what is trained would not be what sampled: set those to 0 in its "
            f"config (log-probs differ by {float(gap.max()):.0e} nats)"
        )


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model as its own code has it: eager attention, in evaluation mode."""
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        with torch.compiler.set_stance("force_eager"):  # the truth is not compiled, whatever model.compile says
            yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


def _borders(config: dict[str, Any], *names: re.Pattern[str]) -> Iterator[int]:
    """The values of the settings that have such names."""
    return (n for key, n in _settings(config) if type(n) is int and n > 0 and any(name.search(key) for name in names))


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those of nested parts too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield key, value


def _check_tried(model: PreTrainedModel, longest: int | None, pads: bool) -> None:
    """Raises ConfigError where a border is too far to try: of attention for packed rows, and for both of rotary
    frequencies that follow the longest sequence of a batch.
    """
    config = model.config.get_text_config().to_dict()
    follows = {"dynamic", "longrope"} & {value for key, value in _settings(config) if key == "rope_type"}
    names = ([] if pads else [ATTENTION]) + ([POSITIONS] if follows else [])
    beyond = [n for n in _borders(config, *names) if LONGEST_PROBE <= n < (longest or 0)]
    if beyond:
        raise ConfigError(
            f"model {model.config.model_type}: computes in another way beyond {min(beyond)} tokens, and a prompt with "
            f"its response may have {longest}: {'padded' if pads else 'packed'} rows are tried up to {LONGEST_PROBE}"
        )


def _draw(draw: random.Random, vocab: int, n: int) -> list[int]:
    return [draw.randrange(min(3, vocab - 1), vocab) for _ in range(n)]  # special tokens mostly come first


@torch.no_grad()
def _own_rows(model: PreTrainedModel, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]], device=model.device)
    rows = slice(-len(example.response_ids) - 1, -1)
    limit = {"logits_to_keep": -rows.start} if "logits_to_keep" in signature(model.forward).parameters else {}
    hidden = list[torch.Tensor]()
    hook = body(model).register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state[0, rows]))
    try:
        logits = model(input_ids=ids, use_cache=False, **limit).logits[0, rows].float()
        if not hidden:  # OPT goes past its own body to a part of it
            body(model)(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
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


def _layouts(examples: list[Example], device: torch.device, padded: bool, longest: int | None) -> Iterator[PackedBatch]:
    if padded:
        # the longest beside a shorter one, and the others; all as long as that would take their time
        yield from packed_batches(examples, 2 * max(map(len, examples)), device, padded=True)
        return
    for order in (examples, examples[::-1]):
        batch = one_batch(order, device)
        # a run's longest sequence decides whether a window is looked at, so it does here
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
    if not batch.padded and flash.has_flash(model.device):
        response_states(model, batch, torch.bfloat16)  # whose kernels lack head sizes that float32's have
    hidden_RH = response_states(model, batch, torch.float32)
    logprob_R = head_logprobs(model, hidden_RH, batch.target)
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
                f"model {name}: its logits are not its last hidden states times its LM head, scaled and softcapped, as "
                f"with a layer between, which is not supported (log-probs differ by {float(gap.max()):.0e} nats)"
            )
