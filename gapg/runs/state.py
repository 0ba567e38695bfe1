"""What a run counts from step to step; all of it is in its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TrainState:
    """What a checkpoint holds beside tensors, the queue, the controller and the oracle's totals."""

    step: int = 0
    empty_steps: int = 0
    """Steps whose filter kept no group."""
    bad_steps: int = 0
    """Steps that were skipped because a number was not finite."""
    bad_in_a_row: int = 0
    """How many of these were the last ones; an idle step between two of them is passed over."""
    idle_steps: int = 0
    """Steps that were not skipped and had no group to learn from."""
    idle_excess: int = 0
    """By how many the idle steps outnumber those that learned; and the step at which that was last said."""
    idle_said_at: int = 0
    never_called: int = 0
    """The last steps in which no response called; and below, in which all did."""
    always_called: int = 0
    right: float = 0.0
    """With `method: marginal`: how many answers are right of late, the most that were, and whether a loss was said."""
    most_right: float = 0.0
    loss_said: bool = False
    lost_steps: int = 0
    """The last steps in which the oracle failed every question; and the step at which that was last said."""
    outage_said_at: int = 0
    best_score: float | None = None
    """The best validation score so far, and its step."""
    best_step: int = 0
