"""A router that decides by the prompt alone: a sequence classifier that predicts the device model's failure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gapg.build import fitting_prompts
from gapg.config import ConfigError
from gapg.config_sections import OptimConfig
from gapg.jsonl import read_jsonl
from gapg.model.load import device
from gapg.optim import clip_and_step, learning_rate
from gapg.runs.run import Run
from gapg.runs.tracking import Display, say
from gapg.seeding import derive
from gapg.studies.curves import FloatArray
from gapg.studies.products import make_product
from gapg.studies.study import product_path
from gapg.tasks.base import Prompt, Task

PRODUCT = "gapg.studies.prompt_router:prompt_router"
"""What a unit names in `products` to get the scores of a router trained on its model's failures."""
PRETRAINED = "microsoft/deberta-v3-base"
"""The encoder beside a device model that is pretrained itself."""


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained. `kept`: the part of the pairs that is not learned from, but chooses the epoch."""

    lr: float
    epochs: int
    batch_size: int
    weight_decay: float
    dropout: float
    kept: float = 0.2


SMALL = Recipe(lr=2e-3, epochs=24, batch_size=256, weight_decay=0.05, dropout=0.1)
FINE_TUNING = Recipe(lr=2e-5, epochs=4, batch_size=32, weight_decay=0.01, dropout=0.1)


@dataclass(frozen=True)
class PromptRouter:
    """A trained router. kept: the indices of the pairs it did not learn from; auc: over these, as chosen by them."""

    model: PreTrainedModel
    encode: Callable[[Prompt], list[int]]
    kept: tuple[int, ...]
    auc: float

    def scores(self, prompts: Sequence[Prompt]) -> FloatArray:
        """[n] log-odds of failure; the highest should be called first."""
        return _scores(self.model, [self.encode(p) for p in prompts])


def train_prompt_router(
    prompts: Sequence[Prompt],
    failed: Sequence[bool],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    model: str | None = None,
    recipe: Recipe | None = None,
) -> PromptRouter:
    """Learns from pairs of a prompt and whether the device model failed on it; keeps the best epoch by AUC.

    model: a Hugging Face folder or name of an encoder, read with its own tokenizer over the prompts' text. None: a
    small BERT from scratch over `tokenizer`, reading what the device model reads (`task.render`).
    The same seed gives the same router on the same machine. Raises ConfigError where `model` cannot be loaded,
    ValueError on fewer than two pairs.
    """
    if len(prompts) != len(failed) or len(prompts) < 2:
        raise ValueError(f"a prompt router needs pairs, at least two: {len(prompts)} prompts, {len(failed)} outcomes")
    recipe = recipe or (SMALL if model is None else FINE_TUNING)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive(seed, "prompt router"))
        if model is None:
            encoder, encode = _small(task, tokenizer, recipe)
        else:
            encoder, encode = _pretrained(model, recipe)
        encoder.to(device())  # type: ignore[arg-type]
        kept = _keep(failed, recipe.kept, random.Random(derive(seed, "prompt router", "kept")))
        best = _train(encoder, [encode(p) for p in prompts], failed, kept, recipe, seed)
    return PromptRouter(encoder, encode, kept, best)


def _small(
    task: Task, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[PreTrainedModel, Callable[[Prompt], list[int]]]:
    """About 0.1 M parameters; the first token, which the classifier reads, is the tokenizer's end token."""
    first = tokenizer.eos_token_id
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=512,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        initializer_range=0.1,  # BERT's own 0.02 is for wide layers: from there so small an encoder starts slowly
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForSequenceClassification(config)
    return model, lambda prompt: [first, *task.render(prompt, tokenizer)][: config.max_position_embeddings]


def _pretrained(name: str, recipe: Recipe) -> tuple[PreTrainedModel, Callable[[Prompt], list[int]]]:
    """Raises ConfigError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"prompt router: {name} is no classifier that can be loaded: {reason}") from None
    limit = min(512, tokenizer.model_max_length)
    return model, lambda prompt: list(tokenizer(prompt.text, truncation=True, max_length=limit)["input_ids"])


def _keep(failed: Sequence[bool], part: float, rng: random.Random) -> tuple[int, ...]:
    """The same part of the failures and of the others, so that a small set holds both."""
    kept: list[int] = []
    for label in (False, True):
        members = [i for i, f in enumerate(failed) if bool(f) == label]
        kept += rng.sample(members, round(part * len(members)))
    return tuple(sorted(kept)) or (rng.randrange(len(failed)),)


def _train(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    failed: Sequence[bool],
    kept: Sequence[int],
    recipe: Recipe,
    seed: int,
) -> float:
    """Trains in place, leaves the weights of the best epoch, in evaluation mode; returns its AUC on `kept`."""
    unseen = set(kept)
    learned = [i for i in range(len(ids)) if i not in unseen]
    labels = torch.tensor([int(f) for f in failed], device=device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    per_epoch = -(-len(learned) // recipe.batch_size)
    schedule = OptimConfig(lr=recipe.lr, warmup_steps=per_epoch // 2, final_lr=0.0)
    best, weights = -1.0, model.state_dict()
    with Display("prompt router", recipe.epochs) as display:
        for epoch in range(recipe.epochs):
            order = learned.copy()
            random.Random(derive(seed, "prompt router", epoch)).shuffle(order)
            model.train()
            for k in range(per_epoch):
                batch = order[k * recipe.batch_size : (k + 1) * recipe.batch_size]
                logits = _logits(model, [ids[i] for i in batch])
                functional.cross_entropy(logits, labels[batch]).backward()
                clip_and_step(optimizer, learning_rate(schedule, epoch * per_epoch + k, recipe.epochs * per_epoch), 1.0)
            reached = auc(_scores(model, [ids[i] for i in kept]), [failed[i] for i in kept])
            if reached > best:
                best, weights = reached, copy.deepcopy(model.state_dict())
            display.advance(f"AUC {reached:.3f}")
    model.load_state_dict(weights)
    model.eval()
    return best


def _logits(model: PreTrainedModel, ids: Sequence[list[int]]) -> torch.Tensor:
    """[n, 2] float32."""
    width = max(len(row) for row in ids)
    padded = torch.tensor([row + [model.config.pad_token_id or 0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    logits: torch.Tensor = model(input_ids=padded.to(device()), attention_mask=mask.to(device())).logits
    return logits


@torch.no_grad()
def _scores(model: PreTrainedModel, ids: Sequence[list[int]]) -> FloatArray:
    model.eval()
    chunks = [_logits(model, ids[i : i + 256]) for i in range(0, len(ids), 256)]
    logits = torch.cat(chunks).double()
    return np.asarray((logits[:, 1] - logits[:, 0]).cpu().numpy(), dtype=np.float64)


def auc(score: FloatArray, failed: Sequence[bool]) -> float:
    """The chance that a failure scores above a success, ties half; 0.5 where either is missing."""
    hits = np.asarray(failed, dtype=bool)
    ups, downs = int(hits.sum()), int((~hits).sum())
    if not ups or not downs:
        return 0.5
    ranks = stats.rankdata(score)
    return float((ranks[hits].sum() - ups * (ups + 1) / 2) / (ups * downs))


def prompt_router(run: Run) -> list[dict[str, Any]]:
    """The product: a router trained on the run's greedy failures on its training problems, and its scores.

    Rows of `split` "calibration" (pairs the router did not learn from, with `failed`) and "heldout"; `score` [log-odds
    of failure], and the router's `auc` on the first. The encoder is a small one, or `PRETRAINED` where the device model
    is pretrained.
    """
    make_product(run, "train-masked")
    rows = read_jsonl(product_path(run.folder, "train-masked"))
    failed = [row["outcome"] != "local_correct" for row in rows]
    splits = {s: fitting_prompts(run.config, run.task, run.tokenizer, s) for s in ("train", "heldout")}
    by_id = {p.id: p for p in splits["train"]}
    prompts = [by_id[row["id"]] for row in rows]
    pretrained = PRETRAINED if run.config.model.path else None
    router = train_prompt_router(prompts, failed, run.task, run.tokenizer, run.config.seed, model=pretrained)
    say(f"prompt router: AUC {router.auc:.3f} on {len(router.kept)} problems that it did not learn from")
    kept = [prompts[i] for i in router.kept]
    made = [
        {"split": "calibration", "id": rows[i]["id"], "score": s, "failed": failed[i], "auc": router.auc}
        for i, s in zip(router.kept, router.scores(kept).tolist(), strict=True)
    ]
    heldout = splits["heldout"]
    scores = router.scores(heldout).tolist()
    return made + [{"split": "heldout", "id": p.id, "score": s} for p, s in zip(heldout, scores, strict=True)]
