"""What a run's settings want of a task beside its four members, and whether its data are what a run can read."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import fields
from typing import Any

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.tasks import call_member
from gapg.tasks.base import Demonstrated, Demonstration, Prompt, Solvable, Task, Tokenized


def check_members(config: RunConfig, task: Task) -> None:
    """Raises ConfigError: one line with a fix for each member that is wanted and not there, or for what one returns."""
    warm = config.warm_start
    demonstrates = warm is not None and warm.demonstrations is None
    wanted = {
        "tokenizer() (or set model.path to a model)": config.model.path is None and not isinstance(task, Tokenized),
        "demonstrations() (or name a jsonl in warm_start.demonstrations, or set warm_start=none)": (
            demonstrates and not isinstance(task, Demonstrated)
        ),
        "solve() (or set oracle.kind=openai)": config.oracle.kind == "solver" and not isinstance(task, Solvable),
    }
    if lacking := [member for member, lacks in wanted.items() if lacks]:
        raise ConfigError(f"task {task.name!r} lacks what these settings want: {', '.join(lacking)}")
    train, heldout = (_listed(task, "prompts", call_member(task, "prompts", s), Prompt) for s in ("train", "heldout"))
    if demonstrates:
        made = _listed(task, "demonstrations", call_member(task, "demonstrations", config.seed), Demonstration)
        unseen = {p.id for p in heldout} - {p.id for p in train}
        if shown := [demo.prompt.id for demo in made if demo.prompt.id in unseen]:
            raise ConfigError(
                f"task {task.name!r}: demonstrations() shows {shown[0]!r}, which is held out: leave it out"
            )


def _listed(task: Task, member: str, found: Any, kind: type[Prompt | Demonstration]) -> Any:
    """What was found, a collection of `kind` or of what has the same fields, its texts being texts. Or ConfigError."""
    listed = isinstance(found, Iterable) and isinstance(found, Sized)
    strange = [x for x in found if not all(hasattr(x, f.name) for f in fields(kind))] if listed else [found]
    if strange:
        raise ConfigError(
            f"task {task.name!r}: {member}() must return a list of {kind.__name__}, not {strange[0]!r:.60}"
        )
    for name in ("answer", "text", "response"):
        for value in (getattr(x, name, "") for x in found):
            if not isinstance(value, str):
                raise ConfigError(f"task {task.name!r}: {member}() has {name}={value!r:.60}, where a text is needed")
    return found
