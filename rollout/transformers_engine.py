"""The in-process engine: plain transformers, one prefill a prompt, finished rows dropped from the batch as they end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gapg.rollout.records import Completion, Sampling
from gapg.rollout.transformers_help import HelpSteering

COMPACT_BELOW = 0.75
"""Rows are dropped once fewer than this part is alive: selecting rows copies the cache."""


class TransformersEngine:
    """Decodes with a second module. In the trainer's own type it shares its tensors, so that `sync` copies nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 2048,
    ) -> None:
        config = copy.deepcopy(model.config)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        self.model.to(model.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        eos = getattr(model.generation_config, "eos_token_id", None)
        ids = eos if isinstance(eos, list) else [eos]
        self.eos_ids = tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))
        self._stop_tokens = lru_cache(self._find_stop_tokens)
        self.sync(model.state_dict())

    def sync(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Takes the given weights: shared where type and device are the module's own, else copied."""
        like = next(self.model.parameters())
        weights = {k: t.to(like.device, like.dtype if t.is_floating_point() else None) for k, t in state_dict.items()}
        self.model.load_state_dict(weights, strict=True, assign=True)
        self.model.tie_weights()

    def close(self) -> None:
        """Nothing outlives the object."""

    @torch.inference_mode()
    def generate(
        self, prompt_token_ids: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.generate`. Prompts of like length share a wave of at most `max_rows` responses.

        Raises ValueError for an empty prompt.
        """
        for i, ids in enumerate(prompt_token_ids):
            if not ids:
                raise ValueError(f"prompt {i} is empty: the task's render() must return at least one token")
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        by_length = sorted(range(len(prompt_token_ids)), key=lambda i: len(prompt_token_ids[i]))
        per_wave = max(1, self.max_rows // n)
        for start in range(0, len(by_length), per_wave):
            indices = by_length[start : start + per_wave]
            wave = _Wave(self, [prompt_token_ids[i] for i in indices], n, sampling, generator)
            for local, completions in wave.run():
                yield indices[local], completions

    def _find_stop_tokens(self, stop: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ends, may_end), both [V] bool: tokens that end a response, and those after which the text is looked at."""
        size = self.model.config.get_text_config().vocab_size
        texts = self.tokenizer.batch_decode([[i] for i in range(size)])
        ends = torch.tensor([any(s in text for s in stop) for text in texts])
        ends[list(self.eos_ids)] = True
        may_end = torch.tensor([any(s[-1] in text for s in stop) for text in texts]) & ~ends
        return ends.to(self.model.device), may_end.to(self.model.device)


@dataclass(slots=True)
class _Rows:
    """The rows in the batch: index into the wave's responses, which still decode, next input token, cache and mask."""

    index: torch.Tensor
    alive: torch.Tensor
    token: torch.Tensor
    cache: Any
    mask: torch.Tensor | None
    position: torch.Tensor

    def keep(self, alive: torch.Tensor) -> None:
        self.index, self.token, self.position = self.index[alive], self.token[alive], self.position[alive]
        self.alive = self.alive[alive]
        self.cache.batch_select_indices(alive)
        self.mask = None if self.mask is None else self.mask[alive]


class _Wave:
    """One batch of prompts decoded to its end."""

    def __init__(
        self,
        engine: TransformersEngine,
        prompts: list[Sequence[int]],
        n: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        self.engine, self.prompts, self.n, self.sampling, self.generator = engine, prompts, n, sampling, generator
        self.device = engine.model.device
        rows = len(prompts) * n
        shape = (rows, sampling.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.help = None if sampling.help is None else HelpSteering(sampling.help, *shape, self.device)

    def run(self) -> Iterator[tuple[int, list[Completion]]]:
        ends, may_end = self.engine._stop_tokens(self.sampling.stop)
        open_rows = [self.n] * len(self.prompts)
        logits, rows = self._prefill()
        for step in range(self.sampling.max_new_tokens):
            rows.token, self.logprobs[rows.index, step] = self._choose(logits, rows.index, step)
            self.tokens[rows.index, step] = rows.token
            stop = rows.alive & (ends[rows.token] | self._text_stops(may_end[rows.token] & rows.alive, rows, step))
            self.lengths[rows.index] += rows.alive
            self.stopped[rows.index] |= stop
            done = stop if step + 1 < self.sampling.max_new_tokens else rows.alive
            for row in rows.index[done].tolist():
                prompt = row // self.n
                open_rows[prompt] -= 1
                if open_rows[prompt] == 0:
                    yield prompt, self._completions(prompt)
            rows.alive = rows.alive & ~done
            count = int(rows.alive.sum())
            if count == 0:
                return
            if count < COMPACT_BELOW * len(rows.alive):
                rows.keep(rows.alive.nonzero().squeeze(1))
            logits = self._decode(rows)

    def _prefill(self) -> tuple[torch.Tensor, _Rows]:
        lengths = torch.tensor([len(p) for p in self.prompts], device=self.device)
        width = int(lengths.max())
        ids = torch.zeros(len(self.prompts), width, dtype=torch.long, device=self.device)
        for i, prompt in enumerate(self.prompts):
            ids[i, width - len(prompt) :] = torch.tensor(list(prompt), device=self.device)
        ragged = bool((lengths != width).any())
        mask = (torch.arange(width, device=self.device) >= (width - lengths)[:, None]).long() if ragged else None
        position = (torch.arange(width, device=self.device) - (width - lengths)[:, None]).clamp(min=0)
        cache = DynamicCache(config=self.engine.model.config)
        out = self.engine.model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
        )
        cache.batch_repeat_interleave(self.n)
        index = torch.arange(len(self.prompts) * self.n, device=self.device)
        rows = _Rows(
            index=index,
            alive=torch.ones_like(index, dtype=torch.bool),
            token=index,
            cache=cache,
            mask=None if mask is None else mask.repeat_interleave(self.n, 0),
            position=lengths.repeat_interleave(self.n),
        )
        return out.logits[:, -1].repeat_interleave(self.n, 0), rows

    def _decode(self, rows: _Rows) -> torch.Tensor:
        if rows.mask is not None:
            rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.mask), 1)], 1)
        out = self.engine.model(
            input_ids=rows.token[:, None],
            attention_mask=rows.mask,
            position_ids=rows.position[:, None],
            past_key_values=rows.cache,
        )
        rows.position = rows.position + 1
        return out.logits[:, -1]

    def _choose(self, logits: torch.Tensor, index: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(next token, its log-prob before any bias), both [rows]."""
        temperature = self.sampling.temperature
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        biased = logp
        if self.help is not None:
            fits = self.help.fits(self.tokens, index, step)
            biased = self.help.steer(logp, temperature or 1.0, fits, index, step, ~self.stopped[index])
        if temperature == 0:
            token = biased.argmax(-1)
        else:
            noise = torch.empty_like(biased).exponential_(generator=self.generator)
            token = (biased - noise.log()).argmax(-1)
        if self.help is not None:
            token = self.help.force_rest(token, fits, index)
        return token, logp.gather(1, token[:, None]).squeeze(1)

    def _text_stops(self, candidates: torch.Tensor, rows: _Rows, step: int) -> torch.Tensor:
        """A stop string of several tokens: the tail's text is looked at where a token could complete it."""
        stops = torch.zeros_like(candidates)
        window = max((len(s.encode()) for s in self.sampling.stop), default=1)  # a token is a byte or more
        for i in candidates.nonzero().squeeze(1).tolist():
            tail = self.tokens[rows.index[i], max(0, step + 1 - window) : step + 1].tolist()
            text = self.engine.tokenizer.decode(tail)
            stops[i] = any(s in text for s in self.sampling.stop)
        return stops

    def _completions(self, prompt: int) -> list[Completion]:
        span = slice(prompt * self.n, (prompt + 1) * self.n)
        lengths = self.lengths[span].tolist()
        columns = zip(
            self.tokens[span].tolist(),
            self.logprobs[span].tolist(),
            lengths,
            self.stopped[span].tolist(),
            [(None, None)] * self.n if self.help is None else self.help.recorded(span, lengths),
            strict=True,
        )
        return [
            Completion(
                token_ids=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                text=str(self.engine.tokenizer.decode(tokens[:length], skip_special_tokens=True)),
                finish_reason="stop" if stopped else "length",
                help_margin=margin,
                help_log_odds=log_odds,
            )
            for tokens, logprobs, length, stopped, (margin, log_odds) in columns
        ]
