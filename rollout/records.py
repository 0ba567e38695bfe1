"""The records that cross the rollout border: what an engine is asked for, what it returns, what the oracle answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class HelpControl:
    """Steers one phrase at decoding time: `bias` is added to the logit of `token_id`, its first deciding token.

    The bias applies only where the last generated tokens equal `prefix_ids` (the tokens the phrase shares with other
    endings, often a lone `<`; empty for a phrase that is one token of its own). When `token_id` is chosen, `rest_ids`
    are forced. `bias = -inf` forbids the phrase.
    """

    token_id: int
    prefix_ids: tuple[int, ...] = ()
    rest_ids: tuple[int, ...] = ()
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. No top-k, no top-p, no penalties, in every engine: they would bias the policy gradient.

    `temperature = 0` is greedy. `stop` strings end a response and stay part of it, as does the tokenizer's EOS.
    The same `seed` gives the same completions on the same engine, device and thread count.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    help: HelpControl | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. `logprobs[t]` is log pi(token_ids[t]) at the sampling temperature (at 1 when greedy).

    The last token of a finished response (EOS, or the last token of a stop string) is part of `token_ids`.
    `help_margin` is max over positions of (help logit - best other logit), before the bias; None without `HelpControl`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    help_margin: float | None = None


class Engine(Protocol):
    """Generates responses from the current policy weights, and knows nothing of the method."""

    def generate(
        self, prompt_token_ids: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (prompt index, its n completions), each prompt once, in the order in which they finish."""

    def sync(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Makes the next `generate` use these weights (`model.state_dict()`, tied weights included)."""

    def close(self) -> None:
        """Frees what the engine holds; calling it twice is harmless."""


@dataclass(frozen=True, slots=True)
class OracleQuestion:
    """What is sent to the cloud: chat `messages`, and an `id` that is stable over runs."""

    id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class OracleAnswer:
    """One sampled answer. `text is None` means the oracle failed (see `error`): unknown, never wrong."""

    text: str | None
    error: str | None = None
    cached: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class OracleUsage:
    """What the oracle has cost so far in this run: requests sent, cache hits, tokens, money."""

    requests: int = 0
    cache_hits: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Oracle(Protocol):
    """The cloud model. Asks at once and answers later; a failure is an answer without text, never an exception."""

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        """One future of k answers (k is the oracle's own number of samples a question)."""

    @property
    def usage(self) -> OracleUsage:
        """Totals of this run; survives a resume through `restore`."""

    def restore(self, usage: OracleUsage) -> None:
        """Continues the totals, and so the spending cap, of a checkpoint."""

    def close(self) -> None:
        """Ends open requests and frees what the oracle holds."""
