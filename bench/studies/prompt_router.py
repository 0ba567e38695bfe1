"""A router that decides by the prompt alone: a sequence classifier that predicts the device model's failure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gapg.build import fitting_prompts
from gapg.config_sections import OptimConfig
from gapg.console import Display, say
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from gapg.model.load import device
from gapg.optim import clip_and_step, learning_rate
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import Prompt, Task
from studies import arms, self_check
from studies.answers import Answers, OwnAnswers, own_answers, score_rows
from studies.arms import Entrant, Predictions, Rows
from studies.predictions import TRAIN_MASKED, heldout, make_predictions
from studies.statistics import FloatArray

PRETRAINED = "microsoft/deberta-v3-base"
"""The encoder beside a device model that is pretrained itself."""


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained."""

    lr: float
    epochs: int
    batch_size: int
    weight_decay: float
    dropout: float = 0.1


SMALL, FINE_TUNING = Recipe(2e-3, 24, 256, 0.05), Recipe(2e-5, 4, 32, 0.01)
KEPT = 0.2
"""The part of the pairs that is not learned from, but chooses the epoch."""
Encode = Callable[[Prompt], list[int]]


@dataclass(frozen=True)
class PromptRouter:
    """A trained router. kept: the indices of the pairs it did not learn from; auc: over these, as chosen by them."""

    model: PreTrainedModel
    encode: Encode
    kept: list[int]
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
    recipe = recipe or (FINE_TUNING if model else SMALL)
    rng = random.Random(derive(seed, "prompt router", "kept"))
    # the same part of the failures and of the others, so that a small set holds both
    kinds = [[i for i, f in enumerate(failed) if bool(f) == kind] for kind in (False, True)]
    kept = sorted(i for kind in kinds for i in rng.sample(kind, round(KEPT * len(kind)))) or [
        rng.randrange(len(failed))
    ]
    learned = sorted(set(range(len(prompts))) - set(kept))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive(seed, "prompt router"))
        encoder, encode = _pretrained(model) if model else _small(task, tokenizer, recipe.dropout)
        encoder.to(device())  # type: ignore[arg-type]
        ids, best, weights = [encode(p) for p in prompts], -1.0, {}
        for _ in _epochs(encoder, [ids[i] for i in learned], [failed[i] for i in learned], recipe, seed):
            reached = auc(_scores(encoder, [ids[i] for i in kept]), [failed[i] for i in kept])
            if reached > best:
                best, weights = reached, copy.deepcopy(encoder.state_dict())
        encoder.load_state_dict(weights)
    return PromptRouter(encoder.eval(), encode, kept, best)


def _small(task: Task, tokenizer: PreTrainedTokenizerBase, dropout: float) -> tuple[PreTrainedModel, Encode]:
    """About 0.1 M parameters; the first token, which the classifier reads, is the tokenizer's end token."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,  # BERT's own 0.02 is for wide layers: from there so small an encoder starts slowly
        pad_token_id=tokenizer.pad_token_id,
    )
    first, limit = tokenizer.eos_token_id, config.max_position_embeddings
    return BertForSequenceClassification(config), lambda prompt: [first, *task.render(prompt, tokenizer)][:limit]


def _pretrained(name: str) -> tuple[PreTrainedModel, Encode]:
    """Raises ConfigError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"prompt router: {name} is no classifier that can be loaded: {reason}") from None
    limit = min(512, tokenizer.model_max_length)
    return model, lambda prompt: list(tokenizer(prompt.text, truncation=True, max_length=limit)["input_ids"])


def _epochs(
    model: PreTrainedModel, ids: Sequence[list[int]], failed: Sequence[bool], recipe: Recipe, seed: int
) -> Iterator[int]:
    """Trains in place, pausing after every epoch."""
    labels = torch.tensor(failed, device=device()).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    per_epoch = -(-len(ids) // recipe.batch_size)
    schedule = OptimConfig(lr=recipe.lr, warmup_steps=per_epoch // 2, final_lr=0.0)
    with Display("prompt router", recipe.epochs) as display:
        for epoch in range(recipe.epochs):
            order = list(range(len(ids)))
            random.Random(derive(seed, "prompt router", epoch)).shuffle(order)
            model.train()
            for k in range(per_epoch):
                batch = order[k * recipe.batch_size : (k + 1) * recipe.batch_size]
                functional.cross_entropy(_logits(model, [ids[i] for i in batch]), labels[batch]).backward()
                clip_and_step(optimizer, learning_rate(schedule, epoch * per_epoch + k, recipe.epochs * per_epoch), 1.0)
            yield epoch
            display.advance()


def _logits(model: PreTrainedModel, ids: Sequence[list[int]]) -> torch.Tensor:
    """[n, 2] float32."""
    rows = [torch.tensor(row) for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id or 0)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits: torch.Tensor = model(input_ids=padded.to(device()), attention_mask=mask.to(device())).logits
    return logits


@torch.no_grad()
def _scores(model: PreTrainedModel, ids: Sequence[list[int]]) -> FloatArray:
    model.eval()
    logits = torch.cat([_logits(model, ids[i : i + 256]) for i in range(0, len(ids), 256)]).double()
    return np.asarray((logits[:, 1] - logits[:, 0]).cpu().numpy(), dtype=np.float64)


def auc(score: FloatArray, failed: Sequence[bool]) -> float:
    """The chance that a failure scores above a success, ties half; 0.5 where either is missing."""
    hits = np.asarray(failed, dtype=bool)
    ups, downs = score[hits], score[~hits]
    if not ups.size or not downs.size:
        return 0.5
    return float(stats.mannwhitneyu(ups, downs, method="asymptotic").statistic / (ups.size * downs.size))


def prompt_router(run: Run) -> Rows:
    """The scores of a router trained on the run's greedy failures on its training problems.

    Rows of `split` "calibration" (pairs the router did not learn from, with `failed`) and "heldout"; `score` [log-odds
    of failure], and the router's `auc` on the first. The encoder is a small one, or `PRETRAINED` where the device model
    is pretrained.
    """
    make_predictions(run, TRAIN_MASKED)
    rows = read_jsonl(TRAIN_MASKED.path(run.folder))
    failed = [row["outcome"] != "local_correct" for row in rows]
    by_id = {p.id: p for p in fitting_prompts(run.config, run.task, run.tokenizer, "train")}
    prompts = [by_id[row["id"]] for row in rows]
    pretrained = PRETRAINED if run.config.model.path else None
    router = train_prompt_router(prompts, failed, run.task, run.tokenizer, run.config.seed, model=pretrained)
    say(f"prompt router: AUC {router.auc:.3f} on {len(router.kept)} problems that it did not learn from")
    made: Rows = [
        {"split": "calibration", "id": rows[i]["id"], "score": s, "failed": failed[i], "auc": router.auc}
        for i, s in zip(router.kept, router.scores([prompts[i] for i in router.kept]).tolist(), strict=True)
    ]
    others = heldout(run)
    scores = router.scores(others).tolist()
    return made + [{"split": "heldout", "id": p.id, "score": s} for p, s in zip(others, scores, strict=True)]


PROMPT_ROUTER = Predictions("prompt_router", prompt_router)

# ---- the better of two sources of labels

SCRATCH, DEVICE = "scratch", "device"
"""Encoders beside the names of Hugging Face: the small one, and a copy of the device model as it is after training."""
ASKED_OF_SMALL, ASKED_OF_PRETRAINED = self_check.Recipe(1e-3, 8, 64), self_check.Recipe(1e-5, 3, 32)
FOLDS = 5
Score = Callable[[Answers], FloatArray]
"""[n] log-odds of failure, by the prompts of these answers."""


def cross_fitted(encoder: str, run: Run) -> Rows:
    """The better of two routers, by AUC on the validation problems.

    One learns from the training problems, which are easier to a model that was trained on them. The other learns from
    the validation problems, in folds: each is scored by the router that did not see it, and the held-out ones by the
    mean of all. encoder: `SCRATCH`, `DEVICE`, or a Hugging Face folder or name. Raises ConfigError for one that cannot
    be loaded.
    """
    answers = own_answers(run)
    prompts = {p.id: p for p in (*run.queue.prompts, *run.validation, *heldout(run))}

    def learn(pairs: Answers, label: str) -> Score:
        if encoder == DEVICE:
            return _device_router(run, pairs, label)
        failed = [w > 0 for w in pairs.wrong.tolist()]
        model = None if encoder == SCRATCH else encoder
        of_pairs = [prompts[i] for i in pairs.ids]
        seed = derive(run.config.seed, label)
        router = train_prompt_router(of_pairs, failed, run.task, run.tokenizer, seed, model=model)
        return lambda others: router.scores([prompts[i] for i in others.ids])

    score = learn(answers.training, "training problems")
    known = score(answers.validation), score(answers.heldout)
    folded = _in_folds(answers, learn, run.config.seed)
    failed = [w > 0 for w in answers.validation.wrong.tolist()]
    of_training, of_validation = (auc(scores, failed) for scores, _ in (known, folded))
    say(f"prompt router, {encoder}: AUC {of_training:.3f} from training problems, {of_validation:.3f} from others")
    better = known if of_training >= of_validation else folded
    return score_rows(answers, *(torch.from_numpy(scores) for scores in better))


def _in_folds(answers: OwnAnswers, learn: Callable[[Answers, str], Score], seed: int) -> tuple[FloatArray, FloatArray]:
    """Scores of the validation and of the held-out problems, by routers that learned from other validation problems."""
    n = len(answers.validation.ids)
    order = random.Random(derive(seed, "prompt router", "folds")).sample(range(n), n)
    validation, others = np.zeros(n), np.zeros(len(answers.heldout.ids))
    for fold in range(FOLDS):
        mine = order[fold::FOLDS]
        score = learn(answers.validation.part(sorted(set(order) - set(mine))), f"fold {fold}")
        validation[mine] = score(answers.validation.part(mine))
        others += score(answers.heldout) / FOLDS
    return validation, others


def _device_router(run: Run, pairs: Answers, label: str) -> Score:
    """A copy of the device model, asked for P(true) before it answers; a part of the pairs chooses the epoch."""
    n, label = len(pairs.ids), f"prompt router, {label}"
    order = random.Random(derive(run.config.seed, label)).sample(range(n), n)
    kept = max(1, round(KEPT * n))
    asked = pairs.prompts_alone()
    recipe = ASKED_OF_PRETRAINED if run.config.model.path else ASKED_OF_SMALL
    check = self_check.trained(run, asked.part(order[kept:]), asked.part(order[:kept]), recipe, label)
    return lambda others: check.scores(others.prompts_alone()).double().numpy()


def cross_fitted_router(encoder: str) -> Predictions:
    """Predictions of `cross_fitted` with this encoder."""
    return Predictions(f"prompt-only-{encoder.strip('./').replace('/', '-')}", partial(cross_fitted, encoder))


ENTRANTS = (
    Entrant("+ prompt-only router, from scratch", arms.masked, cross_fitted_router(SCRATCH), sees="prompt"),
    Entrant("+ prompt-only router, the device model", arms.masked, cross_fitted_router(DEVICE), sees="prompt"),
)
