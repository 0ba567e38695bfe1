"""The records that cross the rollout border: what an engine is asked for, what it returns, what the oracle answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class HelpSpelling:
    """One way to write the help phrase in tokens: `prefix_ids`, then `token_id`, its deciding token, then `rest_ids`.

    `prefix_ids` are the tokens that the phrase shares with other endings, often a lone `<`; empty for a phrase that is
    one token of its own.
    """

    token_id: int
    prefix_ids: tuple[int, ...] = ()
    rest_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HelpControl:
    """Steers the help phrase at decoding time: `bias` is added to the logit of each spelling's deciding token.

    The bias applies only where the last generated tokens equal the spelling's `prefix_ids`. When its `token_id` is
    chosen there, its `rest_ids` are forced; where several spellings fit, those of the longest prefix. `bias = -inf`
    forbids the phrase.

    blocks: (the token that opens a think block, the one that closes it), of each kind. What is said in a block is no
    call, so the phrase can begin nowhere in it. A block that other tokens open or close is not known: there it can.
    """

    spellings: tuple[HelpSpelling, ...]
    bias: float = 0.0
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def by_prefix(self) -> tuple[HelpSpelling, ...]:
        """The spellings, those of the longest prefix last."""
        return tuple(sorted(self.spellings, key=lambda s: len(s.prefix_ids)))

    def block_after(self, prompt_ids: Sequence[int], thinking: bool) -> int:
        """The token that closes the block in which a response to this prompt begins, -1 for none.

        thinking: the prompt opens one.
        """
        close_of = dict(self.blocks)
        marks = close_of.keys() | close_of.values()
        last = next((token for token in reversed(prompt_ids) if token in marks), -1) if thinking and marks else -1
        return close_of.get(last, -1)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. No top-k, no top-p, no penalties, in every engine: they would bias the policy gradient.

    `temperature = 0` is greedy. `stop` strings end a response and stay part of it, as does the tokenizer's EOS. They do
    not count inside a think block (`gapg_rollout.text.THINK`); `thinking`: the prompts open one.
    The same `seed` gives the same completions on the same engine, device and thread count.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    help: HelpControl | None = None
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. `logprobs[t]` is log pi(token_ids[t]) at the sampling temperature (at 1 when greedy).

    The last token of a finished response (EOS, or the last token of a stop string) is part of `token_ids`. `text` has
    every special token but the final end and padding. Log-probs of a model whose weights are ruined are NaN.
    `help_margin` is max over positions of (best deciding token's logit - best other logit), before the bias.
    `help_log_odds` has, for each position where the phrase could begin, log p - log(1 - p) of a deciding token, before
    the bias, at the temperature of `logprobs`. Both are None without `HelpControl`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    help_margin: float | None = None
    help_log_odds: tuple[float, ...] | None = None


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
    """One sampled answer. `text is None` means the oracle failed (see `error`): unknown, never wrong.

    permanent: it failed for what waiting does not mend (the key, the account, the spending cap), so no other question
    will be answered either. own: it failed for what is in the question or in the model's reply to it, which says
    nothing of others. offline: nobody was asked, because the oracle sends nothing; that is no failure of a cloud.
    """

    text: str | None
    error: str | None = None
    cached: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    permanent: bool = False
    own: bool = False
    offline: bool = False


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
