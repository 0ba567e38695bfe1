"""The in-process engine: plain transformers, one prefill a prompt, finished rows dropped from the batch as they end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg_rollout.engines.decoding import DecodingBatch, check_decoding, hold_time_steps
from gapg_rollout.engines.help import HelpSteering
from gapg_rollout.records import Completion, Sampling
from gapg_rollout.text import has_stopped, plain_text, response_text

COMPACT_BELOW = 0.75
"""Rows are dropped once fewer than this part is alive: selecting rows copies the cache."""


class TransformersEngine:
    """Decodes with a second module. In the trainer's own type it shares its tensors, so that `sync` copies nothing.

    Raises:
        ValueError: transformers cannot decode this model in batches; the message names the way out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 2048,
    ) -> None:
        config, attention = copy.deepcopy(model.config), _attention(model)
        self.model = type(model)._from_config(config, attn_implementation=attention, dtype=dtype)
        self.model.to(model.device).eval().requires_grad_(False)
        hold_time_steps(self.model)
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        eos = getattr(model.generation_config, "eos_token_id", None)
        ids = eos if isinstance(eos, list) else [eos]
        self.eos_ids = tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))
        self._stop_tokens = lru_cache(self._find_stop_tokens)
        weights = model.state_dict()
        self._load(weights, torch.float32)  # whatever the trainer's type: rounding would hide a wrong cache
        self._pads = check_decoding(self.model)
        self.sync(weights)

    def sync(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Takes the given weights: shared where type and device are the module's own, else copied."""
        self._load(state_dict, self.dtype)

    def _load(self, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        device = self.model.device
        weights = {k: t.to(device, dtype if t.is_floating_point() else None) for k, t in state_dict.items()}
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
        for indices in self._waves([len(ids) for ids in prompt_token_ids], max(1, self.max_rows // n)):
            wave = _Wave(self, [prompt_token_ids[i] for i in indices], n, sampling, generator)
            for local, completions in wave.run():
                yield indices[local], completions

    def _waves(self, lengths: list[int], most: int) -> Iterator[list[int]]:
        """Indices of prompts that are decoded together: the shortest first, of one length where the model needs it."""
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, group in groupby(by_length, key=lambda i: self._pads or lengths[i]):
            indices = list(group)
            yield from (indices[start : start + most] for start in range(0, len(indices), most))

    def _find_stop_tokens(self, stop: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ends, may_end), both [V] bool: tokens that end a response, and those after which the text is looked at."""
        size = self.model.config.get_text_config().vocab_size
        may_end = torch.tensor([any(s[-1] in plain_text(self.tokenizer, [i]) for s in stop) for i in range(size)])
        ends = torch.zeros_like(may_end)
        ends[list(self.eos_ids)] = True
        return ends.to(self.model.device), (may_end & ~ends).to(self.model.device)


def _attention(model: PreTrainedModel) -> str:
    """PyTorch's own attention for kernels that know no cache; eager where the trainer's is (softcaps, sinks)."""
    return "eager" if model.config._attn_implementation == "eager" or not model._supports_sdpa else "sdpa"


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
        self.help = None
        if sampling.help is not None:
            self.help = HelpSteering(sampling, prompts, n, self.device)

    def run(self) -> Iterator[tuple[int, list[Completion]]]:
        ends, may_end = self.engine._stop_tokens(self.sampling.stop)
        open_rows = [self.n] * len(self.prompts)
        batch = DecodingBatch(self.engine.model, self.prompts, self.n)
        index = torch.arange(len(self.tokens), device=self.device)  # of the batch's rows in the wave's
        alive = torch.ones_like(index, dtype=torch.bool)
        for step in range(self.sampling.max_new_tokens):
            token, self.logprobs[index, step] = self._choose(batch.logits_BV, index, step)
            self.tokens[index, step] = token
            stop = alive & (ends[token] | self._text_stops(may_end[token] & alive, index, step))
            self.lengths[index] += alive
            self.stopped[index] |= stop
            done = stop if step + 1 < self.sampling.max_new_tokens else alive
            for row in index[done].tolist():
                prompt = row // self.n
                open_rows[prompt] -= 1
                if open_rows[prompt] == 0:
                    yield prompt, self._completions(prompt)
            alive = alive & ~done
            count = int(alive.sum())
            if count == 0:
                return
            if count < COMPACT_BELOW * len(alive):
                kept = alive.nonzero().squeeze(1)
                index, token, alive = index[kept], token[kept], alive[kept]
                batch.keep(kept)
            batch.step(token)

    def _choose(self, logits: torch.Tensor, index: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(next token, its log-prob before any bias), both [rows]."""
        temperature = self.sampling.temperature or 1.0
        logp = torch.log_softmax(logits.float() / temperature, dim=-1)
        biased, forced = logp, None
        if self.help is not None:
            back = self.help.look_back
            recent = pad(self.tokens[index, max(0, step - back) : step], (max(0, back - step), 0), value=-1)
            deciding, forced = self.help.look(logp, temperature, index, step, recent)
            biased = torch.where(deciding, logp + self.help.control.bias / temperature, logp)
        if self.sampling.temperature == 0:
            token = biased.argmax(-1)
        else:
            noise = torch.empty_like(biased).exponential_(generator=self.generator)
            token = (biased - noise.log()).argmax(-1)
        if forced is not None:
            token = torch.where(forced >= 0, forced, token)
        return token, logp.gather(1, token[:, None]).squeeze(1)

    def _text_stops(self, candidates: torch.Tensor, index: torch.Tensor, step: int) -> torch.Tensor:
        """Looks at the text where a token could complete a stop string; at all of it, for think blocks, if it did."""
        stops = torch.zeros_like(candidates)
        window = max((len(s.encode()) for s in self.sampling.stop), default=1)  # a token is a byte or more
        for i in candidates.nonzero().squeeze(1).tolist():
            tail = self.tokens[index[i], max(0, step + 1 - window) : step + 1].tolist()
            text = plain_text(self.engine.tokenizer, tail)
            if any(s in text for s in self.sampling.stop):
                text = plain_text(self.engine.tokenizer, self.tokens[index[i], : step + 1].tolist())
                stops[i] = has_stopped(text, self.sampling.stop, self.sampling.thinking)
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
                text=response_text(self.engine.tokenizer, tokens[:length], self.engine.eos_ids, self.sampling.stop),
                finish_reason="stop" if stopped else "length",
                help_margin=margin,
                help_log_odds=log_odds,
            )
            for tokens, logprobs, length, stopped, (margin, log_odds) in columns
        ]
