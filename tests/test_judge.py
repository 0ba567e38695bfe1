"""Judging: every ending, every outcome, UNKNOWN when the cloud failed, and the rewards."""

from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.judge import Group, Judge, Outcome, Parsed, parse, rewards
from gapg.tasks.base import HELP_PHRASE
from gapg.tasks.countdown import Countdown
from gapg_rollout.oracle.offline import OfflineOracle
from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Completion, OracleAnswer, OracleUsage
from gapg_rollout.text import THINK

TASK = Countdown()
PROMPT = next(p for p in TASK.prompts("train") if p.id.startswith("3 8 "))
GOLD = f"<answer> {PROMPT.answer} </answer>"
BAD = "<answer> 1 + 1 </answer>"
CALL = f"8 - 3 = 5 {HELP_PHRASE}"
LIMIT = f"<answer> {'1 + ' * 100}1 </answer>"

RIGHT, WRONG, CALLED = Outcome.LOCAL_CORRECT, Outcome.LOCAL_WRONG, Outcome.CLOUD_CORRECT
MISSED, UNKNOWN = Outcome.CLOUD_WRONG, Outcome.UNKNOWN


class ScriptedOracle:
    """An oracle of the protocol that replies what it was told to, None being a failure, and when it was told to."""

    def __init__(self, *texts: str | None, at_once: bool = True) -> None:
        self.texts, self.at_once = texts, at_once
        self.futures: list[Future[list[OracleAnswer]]] = []

    def ask(self, question):
        self.futures.append(Future())
        if self.at_once:
            self.reply()
        return self.futures[-1]

    def reply(self):
        answers = [OracleAnswer(t, error=None if t is not None else "503") for t in self.texts]
        self.futures[-1].set_result(answers)

    @property
    def usage(self):
        return OracleUsage(requests=len(self.futures))

    def restore(self, usage):
        raise NotImplementedError

    def close(self):
        self.futures.clear()


def solver(accuracy):
    return SolverOracle(TASK.solve, accuracy=accuracy, wrong=BAD)


ANSWER_2 = Parsed("answer", "2", True)


def judged(texts, oracle, **options) -> Group:
    completions = [Completion((1,), (-0.1,), text, "stop") for text in texts]
    return Judge(TASK, oracle, **options).submit(PROMPT, completions).result()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 1 = 2 <answer> 2 </answer>", Parsed("answer", "2", True)),
        ("<answer>\n 2\n</answer> \n", Parsed("answer", "2", True)),
        ("<answer> 2 </answer>.", Parsed("answer", "2", True)),  # a token that holds `>.`
        ("<answer></answer>", Parsed("answer", "", True)),
        ("<answer> 1 </answer> <answer> 2 </answer>", Parsed("answer", "2", False)),
        ("<answer> <answer> 2 </answer>", Parsed("answer", "2", False)),
        (HELP_PHRASE, Parsed("help", None, True)),
        (f"hard {HELP_PHRASE}\n", Parsed("help", None, True)),
        (f"{HELP_PHRASE} {HELP_PHRASE}", Parsed("help", None, False)),
        (f"<answer> 2 {HELP_PHRASE}", Parsed("help", None, False)),
        (f"<answer> 2 </answer> {HELP_PHRASE}", Parsed("both")),
        (f"{HELP_PHRASE} <answer> 2 </answer>", Parsed("both")),
        (f"<answer> {HELP_PHRASE} </answer>", Parsed("both")),
        (f"{HELP_PHRASE} or is it 7", Parsed("none")),
        ("<unknown> help </unknown>", Parsed("none")),
        ("<unknown> I need external assistance", Parsed("none")),
        ("<answer> 2 </answer> or 3", Parsed("none")),
        ("<answer> 2", Parsed("none")),
        ("2 </answer>", Parsed("none")),
        ("</answer> 2 <answer>", Parsed("none")),
        ("<answer> 2 </answer> <answer>", Parsed("none")),
        ("<answer> 2 </answer> <unknown>", Parsed("none")),
        # the blank that some tokenizers put beside a special token, and others swallow
        ("<unknown>  I need external assistance  </unknown>", Parsed("help", None, True)),
        ("<unknown>I need external assistance</unknown>", Parsed("help", None, True)),
        ("<unknown>\nI need external assistance </unknown>", Parsed("none")),
        ("<unknown> I needexternal assistance </unknown>", Parsed("none")),
        ("<answer> a < b > [2] </answer>", Parsed("answer", "a < b > [2]", True)),
        ("<answer> 2 </answer>__", ANSWER_2),  # `>_` is a token of many tokenizers
        ("", Parsed("none")),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


@given(
    st.lists(st.sampled_from(["<answer>", "</answer>", HELP_PHRASE, "<unknown>", "</unknown>", "7", " "]), max_size=9)
)
def test_parse_invariants(parts):
    text = " ".join(parts)
    parsed = parse(text)
    assert (parsed.answer is not None) == (parsed.kind == "answer")
    assert not parsed.well_formed or parsed.kind in ("answer", "help")
    if parsed.kind == "help":
        assert text.rstrip().endswith(HELP_PHRASE)
    if parsed.kind == "answer":
        assert HELP_PHRASE not in text and text.rstrip().endswith("</answer>")


ANGLED = [
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>\n",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "<seed:eos>",
]
OTHERS = ["[SEP]", "[PAD]", "[/INST]", "[|endofturn|]", "<reserved_102>", "<|im_end|>\n<|endoftext|>", ".</s>"]


@pytest.mark.parametrize("token", [*ANGLED, *OTHERS])
def test_special_tokens_after_an_ending_say_nothing(token):
    assert parse(f"<answer> 2 </answer>{token}") == ANSWER_2
    assert parse(f"{HELP_PHRASE}{token}") == Parsed("help", None, True)
    assert parse(f"<answer> 2 </answer>{token} or 3").kind == parse(f"{HELP_PHRASE} or{token}").kind == "none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> 1 + 1 </think> <answer> 2 </answer>", ANSWER_2),
        ("<think> <answer> 3 </answer> no </think> <answer> 2 </answer>", ANSWER_2),
        (f"<think> {HELP_PHRASE} ? </think> <answer> 2 </answer>", ANSWER_2),
        (f"<think> <answer> 3 </answer> </think> {HELP_PHRASE}", Parsed("help", None, True)),
        ("<think> a </think> <answer> 2 </answer> <think> sure? </think>", ANSWER_2),
        ("<answer> 1 </answer> <think> no </think> <answer> 2 </answer>", Parsed("answer", "2", False)),
        (f"<answer> 2 </answer> <think> no </think> {HELP_PHRASE}", Parsed("both")),
        ("<think> <answer> 2 </answer>", Parsed("none")),
        (f"<think> {HELP_PHRASE}", Parsed("none")),
        ("<answer> 2 </answer> <think> or", Parsed("none")),
        ("<think> <answer> 2 </answer> </think>", Parsed("none")),
        ("<think> <answer> 2 </answer> </think> so 2", Parsed("none")),
        # the prompt opened the block
        ("<answer> 3 </answer> no </think> <answer> 2 </answer>", ANSWER_2),
        ("<answer> 2 </answer> </think>", Parsed("none")),
        ("<answer> 3 </answer> <think> a </think> b </think> <answer> 2 </answer>", ANSWER_2),
        # halves of a tag are no tag
        ("<ans<think> x </think>wer> 2 </answer>", Parsed("none")),
        ("<unknown> I need<think> x </think> external assistance </unknown>", Parsed("none")),
        # another kind of block is text
        ("<think> [/THINK] <answer> 2 </answer>", Parsed("none")),
        ("<think> [THINK] </think> <answer> 2 </answer>", ANSWER_2),
        # a mark's case is not
        ("<THINK> <answer> 2 </answer>", Parsed("none")),
        ("<Think> <answer> 3 </answer> </think> <answer> 2 </answer>", ANSWER_2),
    ],
)
def test_nothing_inside_a_think_block_counts(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(("opened", "closed"), THINK)
def test_every_kind_of_think_block(opened, closed):
    draft = f"<answer> 3 </answer> {HELP_PHRASE}"
    assert parse(f"{opened} {draft} {closed} <answer> 2 </answer>") == ANSWER_2
    assert parse(f"{draft} {closed} <answer> 2 </answer>") == ANSWER_2
    assert parse(f"{opened} <answer> 2 </answer>") == Parsed("none")


def test_a_response_to_a_prompt_that_opens_a_block_has_to_close_it():
    assert parse("<answer> 2 </answer>", thinking=True) == parse(HELP_PHRASE, thinking=True) == Parsed("none")
    assert parse("<think> <answer> 2 </answer>", thinking=True) == Parsed("none")
    for text in ("so </think> <answer> 2 </answer>", "<think> so </think> <answer> 2 </answer>"):
        assert parse(text, thinking=True) == ANSWER_2
    opened = judged([GOLD, f"{BAD} </think> {GOLD}", CALL, f"</think> {CALL}"], solver(1.0), thinking=True)
    assert list(opened.outcomes) == [WRONG, RIGHT, WRONG, CALLED]
    assert opened.thinking
    assert list(judged([GOLD], solver(1.0)).outcomes) == [RIGHT]


pieces = st.lists(st.sampled_from(["<answer>", "</answer>", HELP_PHRASE, "7", "</s>"]), max_size=6).map(" ".join)


@given(pieces, pieces, pieces)
def test_think_blocks_change_nothing_outside(before, thought, after):
    whole = parse(f"{before}\n{after}")
    assert parse(f"{before}<think>{thought}</think>{after}") == whole
    assert parse(f"{thought}</think>{before}\n{after}") == whole
    assert parse(f"{thought}</think>{before}\n{after}", thinking=True) == whole
    assert parse(f"{before}<think>{thought}").kind == parse(thought, thinking=True).kind == "none"


def test_parse_is_linear():
    assert parse("<answer>" * 200_000).kind == "none"
    assert parse(("<answer>" * 100_000) + "</answer>" + "." * 200_000).kind == "answer"
    assert parse("<think>" * 200_000).kind == "none"
    assert parse("<think></think>" * 100_000 + GOLD).kind == "answer"
    assert parse("</think><answer>" * 100_000).kind == "none"
    for part in ("<", "[", "<|", "[[a", "<" + "a" * 63, "<unknown>" + " " * 50, "<unknown> I need"):
        assert parse(GOLD + part * 100_000).kind in ("answer", "none")
    assert parse("<unknown>" + " " * 1_000_000 + "I").kind == "none"


@pytest.mark.parametrize(
    ("texts", "accuracy", "outcomes"),
    [
        ([GOLD, BAD, CALL, "hm"], 1.0, [RIGHT, WRONG, CALLED, WRONG]),
        ([GOLD, BAD, CALL, "hm"], 0.0, [RIGHT, WRONG, MISSED, WRONG]),
        ([f"{GOLD} {HELP_PHRASE}", f"{HELP_PHRASE} {GOLD}", LIMIT], 1.0, [WRONG, WRONG, WRONG]),
        ([CALL, CALL], 1.0, [CALLED, CALLED]),
        ([f"{GOLD} {CALL} {GOLD}"], 1.0, [WRONG]),
    ],
)
def test_outcomes(texts, accuracy, outcomes):
    group = judged(texts, solver(accuracy))
    assert list(group.outcomes) == outcomes
    assert not group.unknown and group.oracle_score == accuracy
    assert group.cloud_correct == (accuracy == 1.0) and group.solved_locally == (RIGHT in outcomes)


def test_counts():
    group = judged([GOLD, LIMIT, CALL, f"{GOLD} {HELP_PHRASE}", "hm"], solver(1.0))
    assert (group.calls, group.limits, group.both_endings) == (1, 1, 1)
    assert group.well_formed == (True, True, True, False, False)
    assert len(group.completions) == 5 and group.prompt is PROMPT


class TestAsking:
    """The oracle costs money: it is asked only when the answer matters."""

    def asked(self, texts, **options):
        oracle = ScriptedOracle(GOLD)
        group = judged(texts, oracle, **options)
        assert group.oracle_asked == (len(oracle.futures) == 1) and len(oracle.futures) <= 1
        return group.oracle_asked

    def test_when_any_response_calls(self):
        assert self.asked([GOLD, CALL])
        assert self.asked([GOLD, CALL, CALL], ask_unsolved=False)

    def test_when_nobody_solved_it_for_the_filter(self):
        assert self.asked([BAD, "hm"])
        assert not self.asked([BAD, "hm"], ask_unsolved=False)

    def test_not_when_solved_without_a_call(self):
        assert not self.asked([GOLD, BAD])
        assert self.asked([GOLD, BAD], ask_always=True)


class TestUnknown:
    """A server that fails is never a reward of 0."""

    @pytest.mark.parametrize("texts", [[GOLD, CALL], [BAD, BAD], [CALL, CALL]])
    def test_a_group_that_needed_the_oracle(self, texts):
        group = judged(texts, ScriptedOracle(None))
        assert group.unknown and group.oracle_score is None and group.oracle_asked and not group.cloud_correct
        assert all((o is UNKNOWN) == (t == CALL) for o, t in zip(group.outcomes, texts, strict=True))
        assert group.calls == texts.count(CALL)
        with pytest.raises(ValueError, match="no rewards"):
            rewards(group, 1.0, 0.25)

    def test_a_group_that_did_not_need_it(self):
        group = judged([GOLD, BAD], ScriptedOracle(None), ask_always=True)
        assert not group.unknown and group.oracle_score is None
        assert rewards(group, 1.0, 0.25) == [1.0, 0.0]

    def test_without_the_filter_an_unsolved_group_needs_no_oracle(self):
        group = judged([BAD, "hm"], ScriptedOracle(None), ask_unsolved=False, ask_always=True)
        assert not group.unknown and rewards(group, 1.0, 0.25) == [0.0, 0.0]

    def test_a_solver_that_raises(self):
        def crash(question_id):
            raise RuntimeError(question_id)

        assert judged([CALL], SolverOracle(crash, accuracy=1.0, wrong=BAD)).outcomes == (UNKNOWN,)

    def test_an_oracle_without_samples(self):
        assert judged([CALL], ScriptedOracle()).unknown

    def test_an_oracle_that_sends_nothing_fails_only_who_calls(self):
        group = judged([GOLD, CALL], OfflineOracle())
        assert group.unknown and group.outcomes == (RIGHT, UNKNOWN) and not group.oracle_asked
        for options in ({"masked": True, "ask_always": True}, {"ask_unsolved": True}):
            group = judged([BAD, BAD], OfflineOracle(), **options)
            assert not group.unknown and group.oracle_score is None and not group.oracle_asked


class TestMasked:
    """Help was forbidden: nobody can call, and the cloud is asked for its own sake or not at all."""

    def test_it_is_asked_only_always(self):
        oracle = ScriptedOracle(GOLD)
        assert not judged([BAD, CALL], oracle, masked=True).unknown and not oracle.futures
        group = judged([GOLD, CALL], oracle, masked=True, ask_always=True)
        assert (len(oracle.futures), group.oracle_score) == (1, 1.0)
        assert group.outcomes == (RIGHT, WRONG) and (group.calls, group.both_endings) == (0, 1)

    def test_its_failure_makes_the_group_unknown(self):
        group = judged([GOLD, BAD], ScriptedOracle(None), masked=True, ask_always=True)
        assert group.unknown and group.oracle_asked and group.outcomes == (RIGHT, WRONG)


class TestStochasticOracle:
    @pytest.mark.parametrize(
        ("texts", "score", "outcome"),
        [
            ([GOLD, BAD, BAD, BAD], 0.25, MISSED),
            ([GOLD, BAD], 0.5, CALLED),
            ([GOLD, GOLD, BAD], 2 / 3, CALLED),
            ([GOLD, None, None], 1.0, CALLED),  # over those that came
            ([BAD, None], 0.0, MISSED),
        ],
    )
    def test_score_is_the_mean(self, texts, score, outcome):
        group = judged([CALL, GOLD], ScriptedOracle(*texts))
        assert group.oracle_score == pytest.approx(score) and group.outcomes == (outcome, RIGHT)
        assert rewards(group, 1.0, 0.4) == pytest.approx([0.4 * score, 1.0])
        assert len(group.oracle_answers) == len(texts)

    def test_a_reply_without_a_block_is_judged_whole(self):
        assert judged([CALL], ScriptedOracle(PROMPT.answer)).oracle_score == 1.0
        assert judged([CALL], ScriptedOracle(f"{BAD} No: {GOLD}")).oracle_score == 1.0
        assert judged([CALL], ScriptedOracle(f"{BAD} No: {GOLD} and not </answer>")).oracle_score == 1.0
        assert judged([CALL], ScriptedOracle("I do not know")).oracle_score == 0.0

    def test_what_a_reply_only_thinks_is_not_judged(self):
        def score(reply):
            return judged([CALL], ScriptedOracle(reply)).oracle_score

        assert score(f"<think> {BAD} ? </think> {PROMPT.answer}") == score(f"{BAD} </think> {GOLD}") == 1.0
        assert score(f"<think> {GOLD} ? </think> 1 + 1") == score(f"<think> {GOLD} but") == 0.0


def test_judging_does_not_wait_for_the_cloud():
    oracle = ScriptedOracle(GOLD, at_once=False)
    pending = Judge(TASK, oracle).submit(PROMPT, [Completion((1,), (-0.1,), CALL, "stop")])
    oracle.reply()
    assert pending.result().outcomes == (CALLED,)


alphas = st.floats(0, 1)
kinds = st.sampled_from([GOLD, BAD, CALL, LIMIT, "hm", f"{GOLD} {HELP_PHRASE}"])


@given(st.lists(kinds, min_size=1, max_size=8), st.booleans(), alphas, alphas, alphas)
def test_rewards(texts, cloud_right, alpha_a, alpha_c, alpha_f):
    group = judged(texts, solver(float(cloud_right)))
    found = rewards(group, alpha_a, alpha_c, alpha_f)
    worth = {GOLD: alpha_a, CALL: alpha_c * cloud_right}
    formed = {GOLD, BAD, CALL, LIMIT}
    assert found == [worth.get(t, 0.0) + alpha_f * (t in formed) for t in texts]
    plain = rewards(group, alpha_a, alpha_c)
    assert plain == [worth.get(t, 0.0) for t in texts]
    # The format reward cannot touch D1 or D2: they are read from outcomes and the oracle alone.
    assert group.solved_locally == (GOLD in texts)
    if group.oracle_asked:
        assert group.cloud_correct == cloud_right
