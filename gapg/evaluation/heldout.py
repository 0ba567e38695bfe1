"""A model on the held-out problems: greedy, sampled, and with each calibration beside it; how good a forecast its
decision is; tables, a picture and their files.

Greedy decoding with help masked comes first. Whatever does not call is decoded alike without the mask, so a greedy
decoding takes those responses from there, and decodes the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import fitting_prompts
from gapg.config import RunConfig
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import FILE, MaskedPass, load_calibration
from gapg.evaluation.evaluate import as_result, prediction, respond
from gapg.evaluation.masked_pass import masked_pass
from gapg.evaluation.reliability import bin_scores, forecast, reliability
from gapg.evaluation.report import print_reliability, print_table
from gapg.files import write_whole
from gapg.help_phrase import help_control, masked
from gapg.jsonl import to_json
from gapg.judge import Group, Judge
from gapg.model.endings import opens_think
from gapg.runs.outage import check_evaluation
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt, Task
from gapg_rollout.records import Completion, Engine, HelpControl, Oracle, OracleUsage, Sampling

Decoding = tuple[str, float, HelpControl | None]
"""A name, a temperature (0 is greedy), and how the help phrase is steered."""
PICTURE = "reliability.png"
NOTHING = OracleUsage()


@dataclass(frozen=True, slots=True)
class Setup:
    """What is evaluated and how, on whatever problems. wanted: each decoding. about: what summary.json begins with."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    wanted: Sequence[Decoding]
    about: Mapping[str, Any]


def evaluate(
    config: RunConfig,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    oracle: Oracle,
    *,
    model: str,
    trained: RunConfig,
    settings: Mapping[str, Any] | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> None:
    """Held-out problems, greedy, sampled, and as each calibration beside the model says, and how good a forecast the
    decision is: tables on standard output; summary.json, predictions.jsonl and reliability.png in `folder`.

    trained: the config that the model was trained by. settings: what else summary.json tells of where the figures
    come from. prompts: what `heldout_prompts` found, where that was asked before the engine was made.
    Raises ConfigError where there is no problem, or a calibration does not fit the tokenizer; and OracleDown, after all
    is written, where the cloud failed every question, so that nothing is known of the calls.
    """
    prompts = heldout_prompts(config, task, tokenizer) if prompts is None else prompts
    wanted = decodings(config, tokenizer, Path(model))
    setup = Setup(config, tokenizer, engine, wanted, {"model": model, **(settings or {})})
    summary, judged = measure(setup, folder, task, oracle, prompts)
    print_table(summary["rows"])
    files = [folder / "summary.json", folder / "predictions.jsonl"]
    if "decision" in summary:
        files.append(folder / PICTURE)
        print_reliability(summary["decision"], forecast(trained, Path(model)))
    say_usage(summary["oracle_usage"])
    say("  ".join(map(str, files)))
    check_evaluation(judged)


def heldout_prompts(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> list[Prompt]:
    """The held-out problems to evaluate on; name: what they are called, other than the task. Raises ConfigError where
    there is none."""
    prompts = fitting_prompts(config, task, tokenizer, "heldout", name)
    if not prompts:
        raise ConfigError(
            "no held-out problem to evaluate on: add --eval.heldout none for all, or --eval.heldout 200 for the first"
            if config.eval.heldout == 0
            else f"{name or f'task {task.name!r}'}: no held-out problem fits; raise rollout.max_prompt_tokens"
        )
    return prompts


def measure(
    setup: Setup,
    folder: Path,
    task: Task,
    oracle: Oracle,
    prompts: Sequence[Prompt],
    name: str | None = None,
    before: OracleUsage = NOTHING,
) -> tuple[dict[str, Any], list[Group]]:
    """(what summary.json says, the judged responses) of these problems in each wanted decoding, and of the decision.

    Writes summary.json, predictions.jsonl and reliability.png into `folder`, and prints no table.
    name: what the problems are called, other than the task. before: what the oracle had spent on others than these.
    """
    config, tokenizer, engine = setup.config, setup.tokenizer, setup.engine
    title = f"{name}: " if name else ""
    judge = Judge(task, oracle, ask_unsolved=False, thinking=opens_think(task, tokenizer))
    decoded, lines, unbiased = masked_greedy(config, task, tokenizer, engine, prompts, judge.thinking, title)
    rows, judged = [], list[Group]()
    for label, temperature, help in setup.wanted:
        how = "sampled" if temperature else "greedy"
        seed = derive(config.seed, "eval", how)
        sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, seed, help, judge.thinking)
        known = {} if temperature else unmoved(unbiased, help)
        groups = respond(
            engine, task, tokenizer, judge, prompts, sampling, title=f"{title}evaluate {label}", known=known
        )
        judged += groups
        decoding = label if help else how
        lines += [{"decoding": decoding, **prediction(g, config.reward)} for g in groups]
        outcomes = [g.outcomes[0].value for g in groups]
        rows.append(
            as_result(label, groups).row()
            | {"help_bias": help.bias if help else 0.0}
            | {"outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))}}
            | {"unknown": sum(g.unknown for g in groups)}
        )
    spent = asdict(before)
    usage = {key: value - spent[key] for key, value in asdict(oracle.usage).items()}
    problems = ({"set": name} if name else {}) | {"task": task.name, "oracle": config.oracle.kind}
    summary = {**setup.about, **problems, "rows": rows, "oracle_usage": usage}
    write_whole(folder / "predictions.jsonl", "".join(to_json(line) + "\n" for line in lines))
    if decoded is not None:
        summary["decision"] = draw_decision(decoded, folder / PICTURE, f"{name or task.name}, {len(prompts)} problems")
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    return summary, judged


def masked_greedy(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    prompts: Sequence[Prompt],
    thinking: bool,
    title: str = "",
) -> tuple[MaskedPass | None, list[dict[str, Any]], list[Completion]]:
    """The problems decoded greedily with help masked: (what that tells, lines of predictions.jsonl, responses).

    title: what the progress display begins with.
    Nothing, and a line that says why, where the tokenizer cannot tell the help phrase from an answer.
    """
    try:
        control = masked(help_control(tokenizer))
    except ConfigError as error:
        say(f"nothing is said of how calibrated the decision is: {error}")
        return None, [], []
    sampling = Sampling(config.rollout.max_new_tokens, 0.0, STOP, help=control, thinking=thinking)
    decoded, rows, groups = masked_pass(engine, task, tokenizer, prompts, sampling, None, title)
    lines = [{"decoding": "greedy, help masked", **row} for row in rows]
    return decoded, lines, [g.completions[0] for g in groups]


def unmoved(unbiased: Sequence[Completion], help: HelpControl | None) -> dict[int, Completion]:
    """The responses of greedy decoding with help masked that decoding with `help` gives too, by the index of their
    problem: those that it makes call nowhere. Decoding without a control records no margins, so they have none then."""
    bias = help.bias if help else 0.0
    stay = {i: c for i, c in enumerate(unbiased) if c.help_margin is not None and c.help_margin + bias < 0}
    return stay if help else {i: replace(c, help_margin=None, help_log_odds=None) for i, c in stay.items()}


def draw_decision(decoded: MaskedPass, picture: Path, title: str) -> dict[str, Any]:
    """How good a forecast of a right answer the decision is: the figures, and a picture of them."""
    figures = reliability(decoded.hazard(), decoded.margin_N, decoded.local_N)
    bins = bin_scores(decoded.stays, decoded.local_N)
    # not above: matplotlib takes a second to import, and training imports this file before it starts
    from gapg.evaluation.reliability_diagram import draw

    draw(bins, decoded.stays, decoded.local_N, title, picture)
    return figures | {"bins": [asdict(b) for b in bins]}


def say_usage(usage: Mapping[str, float]) -> None:
    say(f"oracle: {', '.join(f'{key} {value:g}' for key, value in usage.items())}")


def decodings(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> list[Decoding]:
    """All that is evaluated; says so where nothing is calibrated. Raises ConfigError."""
    temperature = config.rollout.temperature
    found: list[Decoding] = [
        ("greedy", 0.0, None),
        (f"sampled, T={temperature:g}", temperature, None),
    ]
    entries = load_calibration(model_folder)
    if not entries:
        say(f"no {FILE} beside the model: only as trained (gapg calibrate sets a call fraction)")
        return found
    control = help_control(tokenizer)
    if any((e.spellings, e.blocks) != (control.spellings, control.blocks) for e in entries):
        raise ConfigError(f"{model_folder / FILE}: made with another tokenizer; delete it and run gapg calibrate again")
    return found + [(e.label, e.temperature, replace(control, bias=e.bias)) for e in entries]
