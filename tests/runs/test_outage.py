"""A cloud that fails, behind a real server: asked before anything is trained, told with its words, and when it ends."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gapg.build import make_oracle
from gapg.commands.cli import main
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.judge import Group, Judge, Outcome
from gapg.runs import checkpoint, outage
from gapg.runs.run import Run
from gapg.runs.state import TrainState
from gapg.tasks.base import Prompt
from gapg.train import train
from gapg_rollout.records import OracleAnswer
from tests.runs.small import SMALL

KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture
def cloud(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield make_server()


def options(url: str, model: str = "m", **more: str) -> dict[str, str]:
    plain = {"kind": "openai", "model": model, "base_url": url, "max_retries": "0", "timeout_s": "2"}
    return {f"oracle__{key}": value for key, value in (plain | more).items()}


def as_arguments(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key.replace('__', '.')}", value)]


WITHOUT_WARM_START = (*SMALL, "--eval.heldout", "8", "--steps", "2", "--warm-start", "")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"status": 401, "message": f"Incorrect API key provided: {KEY[:8]}***6789"}, "401"),
        ({"status": 404, "message": "The model `m` does not exist"}, "does not exist"),
        ({"status": 404, "message": "no such path"}, "/v1"),
        ({"status": 400, "message": "max_tokens is not supported with this model"}, "max_tokens is not supported"),
        ({"status": 500, "message": "on fire"}, "on fire"),
        ({"sleep": 30}, "no reply"),
        ({"kind": "empty"}, "no text"),
    ],
)
def test_a_cloud_that_fails_a_first_question_stops_the_run_before_it_begins(
    plan: dict[str, Any], words: str, cloud: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.plan("m", plan)
    with pytest.raises(SystemExit) as left:
        main([*WITHOUT_WARM_START, *as_arguments(options(cloud.url)), "--output-dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert left.value.code == 3
    assert words in said.splitlines()[-1] and "nothing was trained" in said.splitlines()[-1]
    assert KEY not in said and KEY[:8] not in said
    assert not (tmp_path / "run" / "config.yaml").exists(), "the folder can be used again"


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = as_arguments(options("http://127.0.0.1:9/v1"))
    with pytest.raises(SystemExit) as left:
        main([*WITHOUT_WARM_START, *settings, "--output-dir", str(tmp_path / "run")])
    assert left.value.code == 3 and "cannot connect" in capsys.readouterr().err.splitlines()[-1]


def test_the_first_question_is_one_and_is_not_paid_for_twice(cloud: Any, start: Callable[..., Run]) -> None:
    cloud.plan("m", {})
    run = start(**options(cloud.url, cache=""))
    first = outage.check_cloud(run.oracle, run.task)
    assert (first.requests, cloud.seen("m")["requests"]) == (1, 1)
    shortest = min(run.task.prompts("train"), key=lambda p: len(p.text))
    assert cloud.seen("m")["last"]["messages"] == list(run.task.question(shortest).messages)
    again = make_oracle(run.config, run.task, run.folder)
    outage.check_cloud(again, run.task)
    again.close()
    assert cloud.seen("m")["requests"] == 1


def test_one_odd_question_refuses_no_cloud_and_one_sample_of_several_is_enough(
    cloud: Any, start: Callable[..., Run]
) -> None:
    flagged = {"status": 400, "message": "flagged by moderation"}
    cloud.plan("m", {"kind": "empty"}, flagged, {})
    run = start(**options(cloud.url, samples="3", requests_per_minute="3"))
    assert outage.first_question(run.config, run.task).requests == 3
    cloud.plan("strict", flagged)
    with pytest.raises(outage.OracleDown, match=r"nothing was trained: .*flagged by moderation"):
        outage.first_question(start(**options(cloud.url, "strict")).config, run.task)
    assert cloud.seen("strict")["requests"] == 3


def with_cloud(start: Callable[..., Run], url: str, **more: str) -> Run:
    """A run of whose prompts each asks the cloud."""
    run = start(steps="6", eval__every="0", checkpoint_every="1000", **options(url, **more))
    run.judge = Judge(run.task, run.oracle, ask_always=True)
    return run


@pytest.mark.usefixtures("nothing_said")
def test_a_failure_for_good_ends_the_run_at_once_with_the_servers_words(
    cloud: Any, start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.plan("m", *[{}] * 11, {"status": 402, "message": "the account is empty"})
    run = with_cloud(start, cloud.url)
    with pytest.raises(outage.OracleDown, match=r"^step 2: .*the account is empty.*saved: mend it, then go on"):
        train(run, validate)
    assert checkpoint.steps(run.folder / "checkpoints") == [2]
    assert cloud.seen("m")["requests"] < 11 + 16 + 1, "nothing is sent after it"
    assert "the account is empty" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_said")
def test_only_groups_that_needed_the_cloud_count(cloud: Any, start: Callable[..., Run]) -> None:
    """Three steps in which each question failed end the run, however many prompts asked none."""
    cloud.plan("m", {"status": 503, "message": "on fire"})
    run = start(steps="9", eval__every="0", checkpoint_every="1000", **options(cloud.url))
    with pytest.raises(outage.OracleDown, match=r"every question of the last 3 steps: .*on fire"):
        train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert all(row["groups/unknown"] > 0 for row in rows[-3:])
    assert any(row["groups/unknown"] < 8 for row in rows), "there were prompts that needed no cloud"


@pytest.mark.usefixtures("nothing_said")
def test_a_share_of_failures_is_told_once_a_reason_and_ever_more_rarely(
    cloud: Any, start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = [{"status": 500, "message": f"request {n}7f failed"} for n in range(9)]
    cloud.plan("m", *[step for fault in faults for step in ({}, {}, fault, {"status": 500, "message": "boom"})], {})
    run = with_cloud(start, cloud.url)
    train(run, validate)
    said = capsys.readouterr().err
    assert said.count("the oracle failed: ") == 2 and said.count("boom") >= 1
    assert 1 <= said.count("whose prompts are asked again later") <= 3


def test_a_short_run_that_the_cloud_failed_does_not_end_well(cloud: Any, start: Callable[..., Run]) -> None:
    cloud.plan("m", {"status": 500})
    run = with_cloud(start, cloud.url)
    run.config = run.config.model_copy(update={"steps": 2})
    with pytest.raises(outage.OracleDown, match="every question of the last 2 steps"):
        train(run, validate)


def test_which_steps_are_lost() -> None:
    """Every question failed, however few were asked; a step that asked nothing says nothing; an answer begins anew."""
    state, prompt = TrainState(), Prompt("a", "a", "1", "toy")
    failed, answered = OracleAnswer(None, error="on fire"), OracleAnswer("<answer> 1 </answer>")

    def group(outcome: Outcome, *answers: OracleAnswer) -> Group:
        unknown = outcome is Outcome.UNKNOWN
        return Group(prompt, (), (outcome,), (True,), None if unknown else 0.0, answers, unknown)

    local, lost = group(Outcome.LOCAL_CORRECT), group(Outcome.UNKNOWN, failed)
    for groups, count in [
        ([local, lost], 1),
        ([local, local], 1),
        ([lost, lost], 2),
        ([lost, group(Outcome.CLOUD_WRONG, answered, failed)], 0),
        ([local, lost, local], 1),
    ]:
        failure = outage.watch(state, groups)
        assert state.lost_steps == count
        assert (failure is None) == (groups == [local, local])
    assert outage.verdict(state, failure, last=False) is None
    assert "every question of the last step: on fire" in str(outage.verdict(state, failure, last=True))


def test_the_key_is_written_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, make_server: Any
) -> None:
    """A run whose cloud answers once and then echoes the key: it is in no file and no line of output."""
    server = make_server()
    server.plan("cloud", {}, {"status": 503, "message": "not with Bearer sk-very-secret-123, sk-very-secr…"})
    monkeypatch.setenv("GAPG_TEST_KEY", "sk-very-secret-123")
    argv = [
        *(*WITHOUT_WARM_START, "--output-dir", str(tmp_path / "run"), "--steps", "9"),
        *("--oracle.kind", "openai", "--oracle.model", "cloud", "--oracle.api-key-env", "GAPG_TEST_KEY"),
        *("--oracle.base-url", server.url, "--oracle.max-retries", "0", "--oracle.timeout-s", "2"),
    ]
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 3
    captured = capsys.readouterr()
    assert "GAPG_TEST_KEY" in captured.err, "it was shown under its name"
    assert "sk-very" not in captured.out + captured.err
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"oracle.sqlite", "config.yaml", "state.json"} <= {p.name for p in files}
    assert not any(b"sk-very" in p.read_bytes() for p in files)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["groups/unknown"] + row["groups/d1"] == 2 for row in rows)
