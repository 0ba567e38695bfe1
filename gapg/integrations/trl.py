"""TRL's GRPOTrainer with the fused head: TRL's own loss on log-probs that come without [B, T, V] logits.

    from gapg.integrations.trl import FusedLogprobs

    class Trainer(FusedLogprobs, GRPOTrainer): ...          # GRPOTrainer, or a class of yours made from it

    trainer = Trainer(model=..., reward_funcs=..., args=GRPOConfig(...), pack=True, skip_zero_advantage=True)

Everything else is TRL's: generation, rewards, advantages, every loss type, KL, importance sampling, metrics. One batch
gives the same loss and the same gradients as without the mixin, to rounding. Written for trl 1.16.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from trl import __version__
from trl.trainer.grpo_trainer import GRPOTrainer

from gapg.errors import one_line
from gapg.filtering import select
from gapg.integrations.trl_reward import HierarchicalReward
from gapg.model import attention
from gapg.model.policy import body, logit_arguments, logit_map
from gapg.seeding import derive
from gapg_kernels.linear_logprob import linear_logprob

IGNORED = -100
"""The label of a token that is not scored."""


class FusedLogprobs(GRPOTrainer):
    """A GRPOTrainer whose log-probs and entropies are those of `gapg_kernels.linear_logprob`.

    Among the bases of a trainer it stands before `GRPOTrainer`, or before a class made from that.

    Args:
        pack: put a micro-batch through the model as one row of sequences end to end, without its padding. Sets the
            model's attention to `gapg.model.attention`.
        skip_zero_advantage: completions whose advantage is exactly 0 are not put through the model. They still count in
            every denominator, so that loss and gradient stay the same; the `entropy` metric is of the others.
        filter_rho: the prompt filter of arXiv 2509.24050 (`gapg.filtering.select`), by the outcomes that a
            `HierarchicalReward` among `reward_funcs` saw: a training step learns from D alone, and its mean is over D.
            None: no filter.

    All other arguments are GRPOTrainer's. Completions that TRL masked whole (`mask_truncated_completions`) are not put
    through the model either.

    Raises:
        ValueError: a model whose logits are not its last hidden states times its LM head, or that packs inexactly; an
            option of TRL's that a switch would change. One line, which names the fix.
        ImportError: a version of trl that lacks what this needs.
    """

    def __init__(
        self,
        *args: Any,
        pack: bool = False,
        skip_zero_advantage: bool = False,
        filter_rho: Fraction | float | None = None,
        **kwargs: Any,
    ) -> None:
        _check_version()
        super().__init__(*args, **kwargs)
        self.skip_zero_advantage = skip_zero_advantage
        self.filter_rho = None if filter_rho is None else Fraction(str(filter_rho))
        self._idle: _Idle | None = None
        policy = _unwrapped(self.model)
        _refuse_model(self, policy)
        if pack and self.use_transformers_continuous_batching:
            raise ValueError("pack=True: set use_transformers_continuous_batching=False, which wants another attention")
        if skip_zero_advantage:
            _refuse_skipping(self)
        if filter_rho is not None:
            self._outcomes = _filter_of(self)
        settings: Any = self.args
        for model in (policy, *([] if self.ref_model is None else [self.ref_model])):
            fuse(model, self.temperature, float32_head=settings.cast_lm_head_to_fp32, pack=pack)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        if self.filter_rho is None or not self.model.training:  # type: ignore[union-attr]
            return batch
        rng = Random(derive(self.args.seed, "filter", self._step))
        groups = self._outcomes.groups
        kept = {id(group) for group in select(groups, self.filter_rho, rng).kept}
        rows = [id(group) in kept for group in groups for _ in group.completions]
        keep = torch.tensor(rows, device=batch["advantages"].device)
        return _only(batch, keep, by_tokens=self.loss_type in TOKEN_MEANS)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.skip_zero_advantage:
            idle = inputs["advantages"].eq(0).reshape(len(inputs["advantages"]), -1).all(1)
            counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            self._idle = _Idle(idle[:, None], counted.bool() & ~idle[:, None], inputs.get("old_per_token_logps"))
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._idle = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        idle = self._idle
        if idle is not None:  # what is masked has no label, and a row without labels is left out of the forward
            attention_mask = attention_mask.clone()
            attention_mask[:, -logits_to_keep:].masked_fill_(idle.rows, 0)
        logprob, entropy, aux = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        return (logprob, entropy, aux) if idle is None else (*idle.fill(logprob, entropy), aux)


class _Idle(NamedTuple):
    """Completions that have no gradient, and are not put through the model."""

    rows: Tensor
    """[B, 1] bool"""
    others: Tensor
    """[B, C] bool: the tokens that count of the other completions"""
    old: Tensor | None
    """[B, C] the old log-probs, where TRL keeps some"""

    def fill(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """A ratio of exactly 1 where nothing was computed, and a mean entropy that stays that of the others."""
        logprob = torch.where(self.rows, 0.0 if self.old is None else self.old, logprob)
        return logprob, torch.where(self.rows, entropy[self.others].mean(), entropy)


# --- the model's forward ---------------------------------------------------------------------------------------------


def fuse(model: PreTrainedModel, temperature: float, *, float32_head: bool, pack: bool) -> None:
    """Answers TRL's ``model(..., labels=labels, fused_lm_head=True)`` by `linear_logprob`; other calls are the model's.

    Args:
        model: a causal language model that TRL has given its own fused head.
        temperature: divides the logits.
        float32_head: compute the head in float32, outside autocast.
        pack: see `FusedLogprobs`.

    Raises ValueError where the log-probs are not the model's own.
    """
    theirs: Callable[..., Any] = model.forward
    if pack:
        if attention.implementation(model.config) != attention.NAME:
            raise ValueError(
                f"pack=True: the attention of a {model.config.model_type} model cannot pack; set pack=False"
            )
        if getattr(model.config.get_text_config(), "attention_dropout", 0):
            raise ValueError("pack=True: packed attention has no dropout; load the model with attention_dropout=0.0")
        attention.register()
        model.set_attn_implementation(attention.NAME)

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        hidden, target, scored, aux = _scored_states(self, pack=pack, **kwargs)
        with torch.autocast(hidden.device.type, enabled=False) if float32_head else nullcontext():
            logprob, entropy = _head(self, hidden.float() if float32_head else hidden, target, temperature)
        scored = scored.to(logprob.device)
        padded = (x.new_zeros(scored.shape).masked_scatter(scored, x) for x in (logprob, entropy))
        return trl_utils.FusedCausalLMOutput(**dict(zip(("log_probs", "entropy"), padded, strict=True)), aux_loss=aux)

    model.forward = types.MethodType(forward, model)
    _check_logprobs(model, temperature, pack)


def _head(model: PreTrainedModel, hidden_RH: Tensor, target_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    head, arguments = model.get_output_embeddings(), logit_arguments(model, temperature)
    device = head.weight.device  # a model may be split over several
    hidden_RH, target_R = hidden_RH.to(device), target_R.to(device)
    return linear_logprob(hidden_RH, head.weight, target_R, bias=head.bias, return_entropy=True, **arguments)


def _scored_states(
    model: PreTrainedModel,
    *,
    pack: bool,
    input_ids: Tensor | None = None,
    attention_mask: Tensor,
    labels: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The last hidden states that predict a label, [R, H], those labels [R], where they are, [B, L - 1] bool, and the
    load-balancing loss of a mixture of experts where TRL asks for it.

    Rows [B, L] without a label are left out; one stays, as every process must take part in a model's communication.
    """
    if input_ids is None:
        raise ValueError(
            "FusedLogprobs: the model got embeddings instead of token ids, as prompt tuning gives; use LoRA"
        )
    experts = bool(kwargs.get("output_router_logits"))  # their loss is over all rows
    scored = labels[:, 1:] != IGNORED
    rows = scored.any(1) | experts
    rows[0] |= ~rows.any()
    predicts, present = pad(scored, (0, 1))[rows], attention_mask.bool()[rows]
    ids, kwargs["use_cache"] = input_ids[rows], False
    if pack:
        lengths = present.sum(1)
        starts = pad(lengths.cumsum(0), (1, 0)).int()
        # the positions that the tokens have in TRL's padded rows
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[present][None]
        ids, predicts = ids[present][None], predicts[present][None]
        kwargs |= {"position_ids": places, **attention.packed_arguments(starts, int(lengths.max()))}
    else:
        kwargs["attention_mask"] = attention_mask[rows]
    out = body(model)(input_ids=ids, **kwargs)
    aux = _balance(model, out.router_logits, None if pack else kwargs["attention_mask"]) if experts else None
    return out.last_hidden_state[predicts], labels[:, 1:][scored], scored, aux


def _balance(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    assert isinstance(loss, Tensor)
    return loss


# --- the filter ------------------------------------------------------------------------------------------------------

TOKEN_MEANS = ("dapo", "cispo", "vespo")
"""Loss types that divide by the tokens of the whole generation batch."""


def _only(batch: dict[str, Any], keep: Tensor, *, by_tokens: bool) -> dict[str, Any]:
    """The batch, whose loss is the mean over the completions kept.

    keep: [B] bool. by_tokens: the loss divides by a count of tokens, which is made anew; else by that of completions,
    which the advantages make up for.
    """
    batch = dict(batch)
    rows = keep[:, None]
    for name in ("completion_mask", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        if name in batch:  # of masked tokens TRL's log-probs are 0
            batch[name] = batch[name].masked_fill(~rows, 0)
    batch["num_items_in_batch"] = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()
    share = 1.0 if by_tokens else len(keep) / max(1, int(keep.sum()))
    batch["advantages"] = torch.where(keep, batch["advantages"] * share, 0.0)
    return batch


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_version() -> None:
    """Raises ImportError unless TRL has the parts that are overridden or called."""
    wanted = {
        "_compute_loss": ["self", "model", "inputs"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    }
    lacks = [] if hasattr(trl_utils, "FusedCausalLMOutput") else ["FusedCausalLMOutput"]
    for name, names in wanted.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None or list(inspect.signature(method).parameters)[: len(names)] != names:
            lacks.append(f"GRPOTrainer.{name}({', '.join(names[1:])})")
    if lacks:
        raise ImportError(
            f"FusedLogprobs is made for trl 1.16, and this is trl {__version__}, without {', '.join(lacks)}: "
            "pip install trl==1.16.0"
        )


def _unwrapped(model: Any) -> PreTrainedModel:
    """The causal language model below PEFT's wrapper."""
    unwrapped: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return unwrapped


def _refuse_model(trainer: FusedLogprobs, model: PreTrainedModel) -> None:
    settings: Any = trainer.args
    if trainer._is_vlm:
        raise ValueError("FusedLogprobs is for text models: train a vision-language model with GRPOTrainer itself")
    if (plugin := settings.deepspeed_plugin) is not None and plugin.zero_stage == 3:
        raise ValueError("FusedLogprobs needs the whole LM head in each process: use DeepSpeed's ZeRO stage 2 or DDP")
    if (settings.fp16 or model.dtype == torch.float16) and not settings.cast_lm_head_to_fp32:
        raise ValueError(
            "FusedLogprobs: float16 is too narrow for the odds form; "
            "set bf16=True and a model's dtype of bfloat16 or float32, or cast_lm_head_to_fp32=True"
        )
    if trainer._entropy_bonus_enabled and logit_map(model).softcap:
        raise ValueError(
            "FusedLogprobs: under a softcap the entropy has no gradient; "
            "set entropy_coef=0 and use_adaptive_entropy=False"
        )


def _refuse_skipping(trainer: FusedLogprobs) -> None:
    """Zero advantage is no gradient only where the loss is nothing but advantage times something."""
    others = {
        "beta=0": trainer.beta != 0,
        "entropy_coef=0 and use_adaptive_entropy=False": trainer._entropy_bonus_enabled,
        "top_entropy_quantile=1": trainer.top_entropy_quantile < 1,
        "router_aux_loss_coef=0": trainer.aux_loss_enabled,
    }
    for fix, bad in others.items():
        if bad:
            raise ValueError(
                f"skip_zero_advantage=True: completions without advantage have a gradient here, or count; set {fix}"
            )


def _filter_of(trainer: FusedLogprobs) -> HierarchicalReward:
    """The reward function whose outcomes the filter goes by. Raises ValueError where its mean would not be over D."""
    found = [f for f in trainer.reward_funcs if isinstance(f, HierarchicalReward)]
    others = {
        "give 0 or more": trainer.filter_rho is not None and trainer.filter_rho < 0,
        "give one HierarchicalReward among reward_funcs": len(found) != 1,
        "train in one process: the filter draws from the groups of a whole step": trainer.accelerator.num_processes > 1,
        "set scale_rewards to 'group' or 'none': a batch's spread is over groups outside D too": (
            trainer.scale_rewards == "batch" or trainer.multi_objective_aggregation != "sum_then_normalize"
        ),
        "set loss_type to another than 'bnpo', which divides by the tokens of a micro-batch": (
            trainer.loss_type == "bnpo"
        ),
        f"set beta=0, or loss_type to one of {', '.join(TOKEN_MEANS)}": (
            trainer.beta != 0 and trainer.loss_type not in TOKEN_MEANS
        ),
    }
    for fix, bad in others.items():
        if bad:
            raise ValueError(f"filter_rho: {fix}")
    return found[0]


@torch.no_grad()
def _check_logprobs(model: PreTrainedModel, temperature: float, pack: bool) -> None:
    """Compares padded rows of unlike lengths with the model's own logits, which a head unlike others would not give."""
    device, vocab = model.get_output_embeddings().weight.device, model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (3, 12), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :2] = mask[2, 10:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :8] = IGNORED
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float() / temperature
        ours = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    except Exception as error:  # whatever a model's code says to rows that it did not expect
        if not pack:
            raise
        name = model.config.model_type
        raise ValueError(
            f"pack=True: a {name} model cannot take packed rows ({one_line(error)}); set pack=False"
        ) from None
    finally:
        model.train(training)
    own = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2).masked_fill(labels[:, 1:] == IGNORED, 0)
    bound = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not ((ours - own).abs() <= bound * (1 + own.abs())).all():
        raise ValueError(
            f"FusedLogprobs: a {model.config.model_type} model's log-probs are not those of its last hidden states and "
            f"its LM head{' in packed rows: set pack=False, or' if pack else ':'} use GRPOTrainer itself"
        )
