"""Responses sampled with help forbidden: what each engine records of them is what the trainer computes."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gapg.batches.batching import Example, PackedBatch, one_batch
from gapg.config import RunConfig, load_config
from gapg.examples import sampled_masked
from gapg.help_phrase import deciding_tokens, help_control, masked
from gapg.judge import Group, Outcome, parse
from gapg.marginal_loss import MarginalLoss
from gapg.model.policy import response_logprobs, response_states
from gapg.optim import make_optimizer
from gapg.tasks.base import HELP_PHRASE, STOP, Prompt
from gapg.update import policy_update
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, Engine, HelpControl, HelpSpelling, Sampling

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
BEFORE = ("so {} = 39 ", "so {} = 39\n", "so {} = 39.\n\n", "so {} = 39.")
"""How a response goes on to its ending: after a blank, on a line of its own, and right after a full stop."""
MARKS = ("so", " = 39", "<answer>")
"""Their last tokens open, close and open a think block here: the prompts open the first."""
PROMPTS, SAMPLES = 8, 4


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level: ` <` and `.<` are tokens of their own beside `<`, and the phrase is several."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    texts = [f"{b.format(i)}{tag}" for b in BEFORE for i in range(9) for tag in (HELP_PHRASE, "<answer> 4 </answer>")]
    inner.train_from_iterator([*texts, "a <b> and .<c>" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., PreTrainedModel], bpe: PreTrainedTokenizerFast) -> PreTrainedModel:
    """It has learnt to end its text with an answer or, nearly as often, with the phrase."""
    model = make_model(seed=0, vocab_size=len(bpe), hidden_size=64, intermediate_size=128)
    rng, examples = random.Random(0), []
    for i in range(40):
        text = BEFORE[i % 4].format(i % 10) + (HELP_PHRASE if rng.random() < 0.4 else f"<answer> {i % 7} </answer>")
        examples.append(Example(bpe(text[:5])["input_ids"], bpe(text[5:])["input_ids"]))
    batch = one_batch(examples, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (-response_logprobs(model, batch).mean()).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def controls(bpe: PreTrainedTokenizerFast) -> dict[str, HelpControl]:
    """A phrase of one token, which may begin anywhere; the tokenizer's own spellings, after `<` only; both; and these
    outside think blocks, which other tokens of this model open and close."""
    real = help_control(bpe)
    assert len(real.spellings) > 2
    one, sure = (HelpSpelling(bpe.convert_tokens_to_ids(token)) for token in ("unknown", "Ġ="))
    both = HelpControl((*real.spellings, sure))
    begins, ends, answers = (bpe(text)["input_ids"][-1] for text in MARKS)
    return {
        "a token": HelpControl((one,)),
        "spellings": real,
        "both": both,
        "blocks": replace(both, blocks=((begins, ends), (answers, ends))),
    }


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(
    request: pytest.FixtureRequest,
    model: PreTrainedModel,
    bpe: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    if request.param == "transformers":
        yield TransformersEngine(model, bpe)
        return
    pytest.importorskip("vllm")
    from gapg_rollout.engines.vllm import VLLMEngine

    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    bpe.save_pretrained(folder)
    running = VLLMEngine(folder, dtype="float32", max_model_len=64, max_num_seqs=32)
    yield running
    running.close()


def prompts(bpe: PreTrainedTokenizerFast) -> list[list[int]]:
    return [bpe(BEFORE[i % 4].format(i)[:5])["input_ids"] for i in range(PROMPTS)]


def sample(
    engine: Engine, bpe: PreTrainedTokenizerFast, control: HelpControl, temperature: float
) -> list[list[Completion]]:
    sampling = Sampling(32, temperature, STOP, seed=3, help=control, thinking=bool(control.blocks))
    return [cs for _, cs in sorted(engine.generate(prompts(bpe), SAMPLES, sampling), key=lambda pair: pair[0])]


def groups_of(found: list[list[Completion]], thinking: bool) -> list[Group]:
    """Every second response is right."""
    outcomes, formed = (Outcome.LOCAL_CORRECT, Outcome.LOCAL_WRONG) * (SAMPLES // 2), (True,) * SAMPLES
    return [
        Group(Prompt(str(i), "", "", ""), tuple(cs), outcomes, formed, thinking=thinking) for i, cs in enumerate(found)
    ]


def config_at(temperature: float) -> RunConfig:
    return load_config("quickstart", {"method": "marginal", "rollout.temperature": str(temperature)})


def log_odds_by_place(
    loss: MarginalLoss, model: PreTrainedModel, batch: PackedBatch, prompt_lengths: list[int]
) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Of each (group, sample): (token of the response, the trainer's log-odds that the phrase begins there)."""
    assert batch.decisions is not None
    with torch.no_grad():
        odds_N = loss._log_odds(response_states(model, batch, torch.float32), batch).logsumexp(1)
    rows_N = torch.cat(
        [torch.arange(len(batch.target)) if rows is None else rows for tokens, rows in batch.decisions.parts if tokens]
    )
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row, odds in sorted(zip(rows_N.tolist(), odds_N.tolist(), strict=True)):
        cell = int(batch.group[row]), int(batch.sample[row])
        at = int(batch.position_ids[batch.response_index[row]]) + 1 - prompt_lengths[cell[0]]
        found.setdefault(cell, []).append((at, odds))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["a token", "spellings", "both", "blocks"])
def test_the_engines_hazards_are_the_trainers(
    engine: Engine,
    model: PreTrainedModel,
    bpe: PreTrainedTokenizerFast,
    controls: dict[str, HelpControl],
    kind: str,
    temperature: float,
) -> None:
    """Place by place; of each response; and the log-prob of each token among those that were left."""
    control = masked(controls[kind])
    found = sample(engine, bpe, control, temperature)
    groups, ids = groups_of(found, thinking=kind == "blocks"), prompts(bpe)
    examples, known = sampled_masked(groups, {g.prompt.id: ids[i] for i, g in enumerate(groups)}, control)
    table = torch.tensor([[1.0, 0.0] * (SAMPLES // 2)] * PROMPTS)
    config = config_at(temperature)

    batch = one_batch(examples, torch.device("cpu"))
    places = log_odds_by_place(MarginalLoss(model, config, table, known), model, batch, [len(p) for p in ids])
    compared = 0
    for e in examples:
        trainers = places.get((e.group, e.sample), [])
        engines = found[e.group][e.sample].help_log_odds
        assert [t for t, _ in trainers] == [t for t, tokens in enumerate(e.deciding) if tokens]
        assert [odds for _, odds in trainers] == pytest.approx(engines, abs=1e-4)
        compared += len(trainers)
    everywhere = sum(len(e.response_ids) for e in examples)
    assert compared == everywhere if kind in ("a token", "both") else 16 < compared < everywhere
    assert known.hazard_PG.max() > (2 if kind == "both" else 0.1), "it was near, or all but certain"

    policy = copy.deepcopy(model)
    row = policy_update(policy, make_optimizer(policy, config.optim), config, 0, examples, table, masked=known)
    assert row["hazard_gap"] < 1e-4
    assert row["logprob_gap"] < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("kind", ["a token", "spellings", "both", "blocks"])
def test_no_masked_response_begins_the_phrase(
    engine: Engine, bpe: PreTrainedTokenizerFast, controls: dict[str, HelpControl], kind: str, temperature: float
) -> None:
    thinking = kind == "blocks"

    def begins(control: HelpControl) -> int:
        found = sample(engine, bpe, control, temperature)
        written = sum(parse(c.text).kind == "help" for cs in found for c in cs)
        assert not (math.isinf(control.bias) and written and kind == "spellings")
        return sum(
            token in tokens
            for prompt, completions in zip(prompts(bpe), found, strict=True)
            for c in completions
            for token, tokens in zip(c.token_ids, deciding_tokens(control, prompt, c.token_ids, thinking), strict=True)
        )

    assert begins(controls[kind]) > 0, "left alone, it does"
    assert begins(masked(controls[kind])) == 0
