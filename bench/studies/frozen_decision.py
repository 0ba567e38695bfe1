"""The decision learned beside a frozen policy: is it worth anything to train both together?

The task-tuned policy gives all answers and is not changed. Its masked responses to training problems, as many as the
policy gradient had and in as many updates, teach by the log score when to call (`gapg.marginal`; S is the chance that
no token begins the help phrase). Two learners see the same responses: the help tokens' rows of the LM head and a bias,
on the frozen hidden states; and a copy of the whole model, by the update of `method: marginal` without worth for the
trace. Both take the run's own optimizer and schedule, and no validation problem is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gapg import marginal
from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig
from gapg.config_sections import MarginalConfig
from gapg.console import Display
from gapg.data import PromptQueue
from gapg.examples import sampled_masked
from gapg.help_phrase import deciding_tokens, help_control, masked
from gapg.jsonl import read_jsonl
from gapg.judge import Group, Judge, Outcome
from gapg.model.policy import logit_arguments, response_states
from gapg.optim import clip_and_step, learning_rate, make_optimizer
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import STOP
from gapg.update import policy_update
from gapg_kernels.linear_loss import linear_loss
from gapg_rollout.records import Completion, HelpControl, Sampling
from studies import arms
from studies.answers import Answers, own_answers, score_rows
from studies.arms import Entrant, Predictions, Rows
from studies.predictions import make_predictions

DECISION = MarginalConfig(score="log", trace=(0.0, 0.0))
"""The trace earns nothing: the gradient is that of the log score alone."""
NEVER = -80.0
"""The log of a hazard that is taken for 0: of a response in which the phrase could begin nowhere."""


class HelpRows(nn.Module):
    """What is learned of the LM head: changes of the help tokens' rows and biases, all 0 at first."""

    def __init__(self, control: HelpControl, hidden_size: int) -> None:
        super().__init__()
        self.tokens = sorted({spelling.token_id for spelling in control.spellings})
        self.change = nn.Linear(hidden_size, len(self.tokens))
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, hidden_RH: Tensor, tokens: Sequence[int]) -> Tensor:
        """[R, K] what is added to the logits of these tokens."""
        return self.change(hidden_RH)[:, [self.tokens.index(t) for t in tokens]]


def log_hazards(
    model: PreTrainedModel, batch: PackedBatch, config: RunConfig, temperature: float, rows: HelpRows | None = None
) -> Tensor:
    """[B] float32 log x of the responses of `batch.decisions`, differentiable in `rows` alone."""
    decisions, parts = batch.decisions, []
    assert decisions is not None
    with torch.no_grad():
        hidden_RH = response_states(model, batch, getattr(torch, config.model.dtype))
    for tokens, index in decisions.parts:
        if tokens:
            hidden_nH = hidden_RH if index is None else hidden_RH[index]
            target = batch.target if index is None else batch.target[index]
            log_odds_nK = _log_odds(model, hidden_nH, target, tokens, temperature)
            if rows is not None:
                log_odds_nK = log_odds_nK + rows(hidden_nH.float(), tokens) / temperature
            parts.append(marginal.log_hazard(log_odds_nK.logsumexp(1)))
    padded = torch.cat([*parts, hidden_RH.new_full((1,), NEVER, dtype=torch.float32)])
    return padded[decisions.place].logsumexp(1)


@torch.no_grad()
def _log_odds(
    model: PreTrainedModel, hidden_nH: Tensor, target: Tensor, tokens: Sequence[int], temperature: float
) -> Tensor:
    head = model.get_output_embeddings()
    arguments: dict[str, Any] = {"bias": head.bias, "mask_columns": tokens, **logit_arguments(model, temperature)}
    out = linear_loss(hidden_nH, head.weight, target, _nothing, **arguments)
    assert out.log_odds is not None
    return out.log_odds


def _nothing(logprob: Tensor, log_odds: Tensor) -> Tensor:
    return logprob.new_zeros(())


def log_loss(log_x: Tensor, right: Tensor) -> Tensor:
    """[B] minus the log score of S = exp(-x) as a forecast of r: x where right, else -log(1 - S)."""
    x = log_x.exp()
    return torch.where(right > 0, x, x - marginal.log_expm1(log_x))


def learn(run: Run) -> tuple[HelpRows, PreTrainedModel]:
    """(the rows, the copy) after `steps` updates. The same run gives the same on the same machine."""
    config, help = run.config.model_copy(update={"marginal": DECISION}), masked(help_control(run.tokenizer))
    rows = HelpRows(help, run.model.get_output_embeddings().weight.shape[1]).to(run.model.device)
    copied = copy.deepcopy(run.model)
    of_rows = torch.optim.AdamW(rows.parameters(), lr=config.optim.lr, betas=config.optim.betas, fused=True)
    of_copy = make_optimizer(copied, config.optim, config.model.parameters)
    with Display("frozen decision", config.steps) as display:
        for step, groups in enumerate(_samples(run, help)):
            ids_of = {g.prompt.id: run.task.render(g.prompt, run.tokenizer) for g in groups}
            examples, about = sampled_masked(groups, ids_of, help)
            right_PG = torch.tensor([[float(o is Outcome.LOCAL_CORRECT) for o in g.outcomes] for g in groups])
            policy_update(copied, of_copy, config, step, examples, right_PG, None, about)
            _update_rows(run.model, rows, of_rows, config, step, examples, right_PG)
            display.advance()
    return rows, copied


def _samples(run: Run, help: HelpControl) -> Iterator[list[Group]]:
    """The frozen policy's masked responses, judged without the cloud: the groups of each step."""
    rollout, steps = run.config.rollout, run.config.steps
    seed = derive(run.config.seed, "frozen decision")
    queue = PromptQueue(run.queue.prompts, seed)
    prompts = [p for _ in range(steps) for p in queue.next(rollout.prompts_per_step)]
    ids = [run.task.render(p, run.tokenizer) for p in prompts]
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, STOP, seed, help, run.judge.thinking)
    found: dict[int, list[Completion]] = {}
    with Display("sample from the frozen policy", len(prompts)) as display:
        for i, completions in run.engine.generate(ids, rollout.samples_per_prompt, sampling):
            found[i] = completions
            display.advance()
    judge = Judge(run.task, run.oracle, thinking=run.judge.thinking, masked=True)
    for start in range(0, len(prompts), rollout.prompts_per_step):
        judge.start_step()
        step = range(start, start + rollout.prompts_per_step)
        yield [judge.submit(prompts[i], found[i]).result() for i in step]


def _update_rows(
    model: PreTrainedModel, rows: HelpRows, optimizer: torch.optim.Optimizer, config: RunConfig, step: int,
    examples: Sequence[Example], right_PG: Tensor,
) -> None:  # fmt: skip
    right_PG = right_PG.to(model.device)
    for batch in packed_batches(examples, config.token_cap, model.device, padded=config.update.pack is False):
        assert batch.decisions is not None
        log_x = log_hazards(model, batch, config, config.rollout.temperature, rows)
        loss = log_loss(log_x, right_PG[batch.decisions.group, batch.decisions.sample])
        (loss * (log_x > NEVER + 1)).sum().div(right_PG.numel()).backward()
    clip_and_step(optimizer, learning_rate(config.optim, step, config.steps), config.optim.grad_clip)


@torch.no_grad()
def scores(run: Run, model: PreTrainedModel, answers: Answers, rows: HelpRows | None = None) -> Tensor:
    """[n] log of the hazard of the run's greedy answers, by this model or by these rows."""
    help, found = help_control(run.tokenizer), torch.full((len(answers.ids),), NEVER)
    thinking = run.judge.thinking
    examples = [
        replace(e, deciding=deciding_tokens(help, e.prompt_ids, e.response_ids, thinking)) for e in answers.examples
    ]
    padded = run.config.update.pack is False
    for batch in packed_batches(examples, run.config.token_cap, model.device, padded=padded):
        if batch.decisions is not None:
            log_x = log_hazards(model, batch, run.config, run.config.rollout.temperature, rows)
            found[batch.decisions.group.cpu()] = log_x.cpu()
    return found


def _frozen_decision(run: Run) -> Rows:
    answers = own_answers(run)
    rows, copied = learn(run)
    parts = answers.validation, answers.heldout
    made = score_rows(answers, *(scores(run, copied, part) for part in parts))
    of_rows = [x for part in parts for x in scores(run, run.model, part, rows).tolist()]
    return [row | {"of_rows": x} for row, x in zip(made, of_rows, strict=True)]


COPY = Predictions("frozen-decision", _frozen_decision)


def _of_rows(run: Run) -> Rows:
    """Of the rows alone: they learned beside the copy."""
    make_predictions(run, COPY)
    return [{**row, "score": row["of_rows"]} for row in read_jsonl(COPY.path(run.folder))]


ROWS = Predictions("frozen-decision-rows", _of_rows)
ENTRANTS = (
    Entrant("+ help token's row, by the log score", arms.masked, ROWS),
    Entrant("+ decision in a copy, by the log score", arms.masked, COPY),
)
