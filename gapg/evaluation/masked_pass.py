"""Problems decoded once with help masked: what any bias on the help phrase would do to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gapg.console import Display, warn
from gapg.evaluation.calibrate import MaskedPass
from gapg.evaluation.evaluate import finite, oracle_error
from gapg.help_phrase import UNSEEN, thinks_unseen
from gapg.judge import Group, Outcome, oracle_score, parse, verify
from gapg.runs import stop
from gapg.tasks.base import Budgeted, Prompt, Task, Verdict
from gapg_rollout.records import Completion, Engine, Oracle, Sampling
from gapg_rollout.text import spoken


def masked_pass(
    engine: Engine,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    oracle: Oracle | None,
    title: str = "",
) -> tuple[MaskedPass, list[dict[str, Any]], list[Group]]:
    """Decodes each problem once with help masked; the rows from which anyone can judge again; what the cloud said.

    title: what the progress display begins with. Raises Stopped.
    """
    if isinstance(task, Budgeted):
        task.start_step()
    ids = [task.render(p, tokenizer) for p in prompts]
    done: dict[int, Completion] = {}
    asked = {}
    with Display(f"{title}decode with help masked", len(prompts)) as display:
        for i, (completion,) in engine.generate(ids, 1, sampling):
            done[i] = completion
            if oracle is not None:
                asked[i] = oracle.ask(task.question(prompts[i]))
            display.advance()
            stop.look()
    rows, groups = [], []
    for i, prompt in enumerate(prompts):
        replies = tuple(asked[i].result()) if oracle is not None else ()
        score = oracle_score(task, prompt, replies)
        groups.append(Group(prompt, (done[i],), (), (), score, replies))
        row = _row(task, prompt, done[i], sampling.thinking)
        rows.append(row | {"oracle_score": score, "oracle_error": oracle_error(replies)})
    unsteered = sum(row["called_anyway"] for row in rows)
    if unsteered:
        warn(f"{unsteered} responses wrote the help phrase in other tokens than it is steered in; they call always")
    assert sampling.help is not None
    unseen = sum(thinks_unseen(sampling.help, ids[i], completion, sampling.thinking) for i, completion in done.items())
    if unseen:
        warn(f"{unseen} responses reason in a think block {UNSEEN}: S and the bias count in there too")
    endless = sum(spoken(completion.text, sampling.thinking) is None for completion in done.values())
    if endless:
        warn(
            f"{endless} of {len(done)} responses end while they think, without an answer: raise rollout.max_new_tokens"
        )
    odds = [c.help_log_odds or () for c in (done[i] for i in range(len(prompts)))]
    width = max(map(len, odds), default=0)
    decoded = MaskedPass(
        temperature=sampling.temperature,
        margin_N=np.array([_margin(row) for row in rows]),
        log_odds_NP=np.array([[*o, *[-math.inf] * (width - len(o))] for o in odds]).reshape(len(odds), width),
        local_N=np.array([float(r["local_correct"]) for r in rows]),
        cloud_N=None if oracle is None else np.array([r["oracle_score"] for r in rows], dtype=np.float64),
    )
    for row, stays in zip(rows, decoded.stays.tolist(), strict=True):
        row["answer_chance"] = stays
    return decoded, rows, groups


def _row(task: Task, prompt: Prompt, completion: Completion, thinking: bool) -> dict[str, Any]:
    parsed = parse(completion.text, thinking)
    right = parsed.answer is not None and verify(task, prompt, [parsed.answer]) == [Verdict.CORRECT]
    return {
        "id": prompt.id,
        "problem": prompt.text,
        "gold": prompt.answer,
        "response": completion.text,
        "thinking": thinking,
        "finish_reason": completion.finish_reason,
        "outcome": (Outcome.LOCAL_CORRECT if right else Outcome.LOCAL_WRONG).value,
        "local_correct": right,
        "called_anyway": parsed.kind == "help",
        "help_margin": finite(completion.help_margin),
        "help_log_odds": completion.help_log_odds,
    }


def _margin(row: dict[str, Any]) -> float:
    if row["called_anyway"]:
        return math.inf
    return -math.inf if row["help_margin"] is None else float(row["help_margin"])
