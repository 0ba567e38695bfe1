"""Both endings through real tokenizers and back, and prompts that leave a think block open."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.build import make_task
from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.heldout import evaluate
from gapg.model.endings import check_endings, opens_think
from gapg.runs.run import build_run
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_CLOSE, HELP_OPEN
from gapg.tasks.countdown import Countdown
from gapg_rollout.text import THINK

TAGS = [ANSWER_OPEN, ANSWER_CLOSE, HELP_OPEN, HELP_CLOSE]
METASPACE = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
LLAMA_2 = {
    "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
}
BYTES = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
WORDS = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": decoders.WordPiece()}


def make(special: list[str] | None = None, **parts: object) -> PreTrainedTokenizerFast:
    """A character is a token, or a word where the parts are those of `WORDS`; the given tags are special tokens."""
    letters = [*(chr(i) for i in range(33, 127)), "▁", *pre_tokenizers.ByteLevel.alphabet()]
    names = ["<s>", "</s>", "<pad>", "<unk>", "need", "external", "assistance", "answer", "unknown", *letters]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    word = parts.get("decoder") is WORDS["decoder"]
    kind = models.WordPiece(vocab, unk_token="<unk>") if word else models.BPE(vocab, [], unk_token="<unk>")
    inner = Tokenizer(kind)
    for name, part in parts.items():
        setattr(inner, name, part)
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=special or [], **settings)


@pytest.mark.parametrize("special", [[], TAGS, [*TAGS, *THINK[0]]], ids=["plain", "special tags", "special think tags"])
@pytest.mark.parametrize("parts", [BYTES, METASPACE, LLAMA_2], ids=["bytes", "metaspace", "llama 2"])
def test_endings_survive(parts: dict[str, object], special: list[str]) -> None:
    tokenizer = make(special, **parts)
    check_endings(tokenizer, [])
    check_endings(tokenizer, {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<s>")})


def test_endings_survive_in_our_own_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    check_endings(tokenizer, [tokenizer.eos_token_id])
    check_endings(make(TAGS, **WORDS), [])
    two = Countdown(numbers=[2, 3], max_number=2, max_target=2, max_value=2, heldout=0.5).tokenizer()
    assert "3" not in two.get_vocab()
    check_endings(two, [two.eos_token_id])


@pytest.mark.parametrize("end", TAGS)
def test_a_closing_tag_may_be_the_end_token(end: str) -> None:
    tokenizer = make(TAGS, **BYTES)
    ids = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]
    if end in (ANSWER_CLOSE, HELP_CLOSE):
        check_endings(tokenizer, ids)
    else:
        with pytest.raises(ConfigError, match="comes back as ''"):
            check_endings(tokenizer, ids)


LOSSES: dict[str, tuple[PreTrainedTokenizerFast, str]] = {
    "lower case": (make(normalizer=normalizers.Lowercase(), **BYTES), "help phrase: .*'<unknown> i need"),
    "no blanks": (make(normalizer=normalizers.Replace(" ", ""), **BYTES), "help phrase: .*'<unknown>Ineed"),
    "words": (make(**WORDS), "answer block: .*'< answer > 3 < / answer >'"),
    "no brackets": (make(normalizer=normalizers.Replace("<", ""), **BYTES), "answer block: .*'answer> 3"),
    "no digits": (make(normalizer=normalizers.Replace("3", ""), **BYTES), "answer block: .*'<answer>  </answer>'"),
    "no slash": (make(normalizer=normalizers.Replace("/", ""), **BYTES), "answer block: .* 3 <answer>'"),
}


@pytest.mark.parametrize(("tokenizer", "what"), LOSSES.values(), ids=LOSSES)
def test_a_lost_ending_is_named_in_one_line(tokenizer: PreTrainedTokenizerFast, what: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.path: the tokenizer of the task loses the {what}") as error:
        check_endings(tokenizer, [tokenizer.eos_token_id])
    assert "\n" not in str(error.value)


def test_an_ending_that_an_end_or_padding_token_cuts_is_lost() -> None:
    tokenizer = make(**BYTES)
    with pytest.raises(ConfigError, match=r"answer block: .* comes back as '<answer'"):
        check_endings(tokenizer, [tokenizer.convert_tokens_to_ids(">")])
    tokenizer.pad_token = ">"
    with pytest.raises(ConfigError, match=r"answer block: .* comes back as '<answer> 3 </answer'"):
        check_endings(tokenizer, [])


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_tags_may_swallow_the_blanks_beside_them(flags: dict[str, bool]) -> None:
    tokenizer = make(**BYTES)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True, **flags) for t in TAGS]})
    check_endings(tokenizer, [tokenizer.eos_token_id])
    check_endings(make(TAGS, normalizer=normalizers.Strip(), **BYTES), [])


def test_a_line_break_may_end_a_response() -> None:
    tokenizer = make(**BYTES)
    check_endings(tokenizer, tokenizer.encode("\n"))


def test_a_tokenizer_that_cannot_write_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"word": 0}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match=r"cannot write '3' \(.*\); give it an unknown token"):
        check_endings(PreTrainedTokenizerFast(tokenizer_object=inner), [])


@pytest.mark.parametrize(
    ("opening", "opens"),
    [("", False), ("<think>\n\n</think>\n\n", False), *((f"{open_}\n", True) for open_, _ in THINK)],
)
@pytest.mark.parametrize("special", [[], [t for pair in THINK for t in pair]], ids=["plain", "special"])
def test_a_template_may_open_a_think_block(opening: str, opens: bool, special: list[str]) -> None:
    task, tokenizer = Countdown(max_number=4, max_target=12, style="chat"), make(special, **BYTES)
    tokenizer.chat_template = f"{{{{ messages[0].content }}}} <think> in a problem </s>assistant: {{{{ {opening!r} }}}}"
    assert opens_think(task, tokenizer) == opens


def test_a_run_knows_that_its_prompts_open_a_think_block(
    make_model: Callable[..., PreTrainedModel], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Training, validation and evaluation judge alike; the line that evaluation leaves says how."""
    tokenizer = make([*TAGS, *THINK[0]], **BYTES)
    tokenizer.chat_template = "{{ messages[0].content[:9] }}<think>"
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_model(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task_args = "{max_number: 4, max_target: 12, style: chat}"
    config = small_config(tmp_path, model__path=str(tmp_path / "model"), task__args=task_args, eval__heldout="2")
    run = build_run(config, tmp_path, make_task(config), None)
    try:
        assert run.judge.thinking
        evaluate(
            config, tmp_path, run.task, tokenizer, run.engine, run.oracle, model=config.model.path or "", trained=config
        )
    finally:
        run.close()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["thinking"] for line in lines] == [True] * 6
