"""`method: marginal` and the cloud: not asked, known from what was paid for, or asked. Counted at a real server."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gapg.build import make_task
from gapg.commands.cli import main
from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.runs.outage import OracleDown, first_question
from gapg.runs.run import Run
from gapg.tasks.base import Prompt, Task
from gapg.train import train, train_step
from gapg_rollout.oracle.openai import OpenAIOracle
from gapg_rollout.records import Completion, OracleUsage
from tests.conftest import SMALL_RUN

NO_CLOUD = "https://cloud.invalid/v1"


def options(url: str, **more: str) -> dict[str, str]:
    plain = {"kind": "openai", "model": "m", "base_url": url, "max_retries": "0", "timeout_s": "5"}
    return {f"oracle.{key}": value for key, value in (plain | more).items()}


def arguments(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def whole_run(folder: Path, model: Path, url: str, **more: str) -> None:
    """`gapg train` from a warm start, which calls now and then, with evaluations before, in and after training."""
    small = {key: value for key, value in SMALL_RUN.items() if not key.startswith("warm_start")}
    own = {"model.path": str(model), "eval.every": "1", "eval.heldout": "24", "steps": "1", "output_dir": str(folder)}
    main(["train", "quickstart", "--warm-start", "", *arguments(small | options(url) | own | more)])


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_whole_run_asks_the_cloud_nothing(
    tmp_path: Path, warm_model: Path, make_server: Any, no_key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    server, folder = make_server(), tmp_path / "marginal"
    whole_run(folder, warm_model, server.url, method="marginal")
    said = capsys.readouterr()
    assert server.seen("m")["requests"] == 0
    assert not (folder / "oracle.sqlite").exists()
    assert "for every cloud budget at once; the cloud is not asked" in said.err and "rho" not in said.err
    assert f"gapg calibrate {folder} --cloud-fraction 0.3" in said.err
    assert f"gapg eval {folder} asks m" in said.err and "oracle failed" not in said.err
    predictions = read_jsonl(folder / "predictions.jsonl")
    unknown = [row for row in predictions if row.get("outcome") == "unknown"]
    assert unknown and all(row["reward"] is None and "not asked" in row["oracle_error"] for row in unknown)
    sampled = next(row for row in json.loads((folder / "summary.json").read_text())["rows"] if row["unknown"])
    assert sampled["accuracy"] is None and sampled["unknown"] > 0  # without the calls it would be a precision
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["oracle/requests"] == rows[1]["groups/unknown"] == 0
    assert all(row["eval/unknown"] == 0 for row in rows)

    main(["eval", str(folder)])
    assert 0 < server.seen("m")["requests"] <= len(unknown), "its calls, each once"
    judged = read_jsonl(next(folder.glob("eval/*/predictions.jsonl")))
    assert not any(row.get("outcome") == "unknown" for row in judged)


def test_a_run_of_gapg_asks(tmp_path: Path, warm_model: Path, make_server: Any) -> None:
    server = make_server()
    whole_run(tmp_path / "gapg", warm_model, server.url, method="gapg")
    assert server.seen("m")["requests"] > 8
    assert (tmp_path / "gapg" / "oracle.sqlite").exists()


def test_the_solver_is_no_cloud_either_until_the_last_evaluation(
    tmp_path: Path, warm_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    whole_run(folder, warm_model, NO_CLOUD, **{"method": "marginal", "oracle.kind": "solver"})
    assert read_jsonl(folder / "metrics.jsonl")[-1]["oracle/requests"] == 0
    outcomes = {row.get("outcome") for row in read_jsonl(folder / "predictions.jsonl")}
    assert "cloud_correct" in outcomes and "unknown" not in outcomes
    assert "stay unknown" not in capsys.readouterr().err


def settings(url: str, cloud: str, **more: str) -> dict[str, str]:
    own = {"method": "marginal", "marginal.score": "brier", "marginal.cloud": cloud, "eval.every": "0"}
    return {key.replace(".", "__"): value for key, value in (options(url) | own | more).items()}


def paid_for(config: RunConfig, task: Task, prompts: Sequence[Prompt], path: Path) -> None:
    """A cache with the cloud's answers to these problems, by another run."""
    oracle = OpenAIOracle(config.oracle.base_url, "m", max_tokens=config.oracle.max_tokens, cache_path=path)
    for asked in [oracle.ask(task.question(p)) for p in prompts]:
        assert asked.result(20)[0].text
    oracle.close()


def test_cached_answers_count_and_nothing_is_sent(
    start: Callable[..., Run], make_server: Any, tmp_path: Path, no_key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers are wrong, so a call is worth nothing where they are known; the others count as right."""
    server, path = make_server(), tmp_path / "paid.sqlite"
    ignoring = start("ignore", **settings(server.url, "ignore"))
    drawn = ignoring.queue.next(8)
    ignoring.queue.restore(0, [])
    paid_for(ignoring.config, ignoring.task, [*drawn[:5], ignoring.validation[0]], path)
    server.kill()

    run = start("cached", **settings(server.url, "cached", **{"oracle.cache": str(path)}))
    assert first_question(run.config, run.task) == OracleUsage()
    assert f"6 of {len(run.task.prompts('train'))} training problems are cached" in capsys.readouterr().err
    without, row = train_step(ignoring), train_step(run)
    assert row["local_accuracy"] == without["local_accuracy"]
    assert 0 < without["accuracy"] - row["accuracy"] < row["call_fraction"]
    assert (row["oracle/cache_hits"], row["oracle/requests"], row["oracle/failures"]) == (5, 0, 0)
    assert row["groups/unknown"] == 0 and run.failure is None
    known, unknown = (run.judge.submit(p, [Completion((1,), (0.0,), "x", "stop")]).result() for p in drawn[4:6])
    assert (known.oracle_score, unknown.oracle_score) == (0.0, None)

    validate(run)
    usage = run.oracle.usage
    run.save()
    run.close()
    again = start("cached", **settings(server.url, "cached", **{"oracle.cache": str(path)}))
    assert again.oracle.usage == usage and usage.cache_hits == 5 + 1 + 1, "a step, the line above, an evaluation"


@pytest.mark.parametrize("fault", ["missing", "another model's", "damaged"])
def test_a_cache_that_is_of_no_use_is_refused_before_anything_is_trained(
    fault: str, small_config: Callable[..., RunConfig], make_server: Any, tmp_path: Path
) -> None:
    server, path = make_server(), tmp_path / "paid.sqlite"
    other = {"oracle.model": "other"} if fault == "another model's" else {}
    config = small_config(tmp_path, **settings(server.url, "cached", **{"oracle.cache": str(path)}, **other))
    task = make_task(config)
    if fault != "missing":
        paid_for(config, task, task.prompts("train")[:1], path)
    if fault == "damaged":
        path.write_bytes(b"not a database" * 400)
    with pytest.raises(ConfigError, match=r"^marginal\.cloud=cached: .*oracle\.cache") as refused:
        first_question(config, task)
    assert "\n" not in str(refused.value)
    assert path.exists() == (fault != "missing")


def test_ask_asks_each_problem_once(start: Callable[..., Run], make_server: Any, no_key: None, tmp_path: Path) -> None:
    server, shared = make_server(), {"oracle.cache": str(tmp_path / "paid.sqlite")}
    run = start(**settings(server.url, "ask", **shared, steps="2"))
    assert first_question(run.config, run.task).requests == 1
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [row["oracle/requests"] + row["oracle/cache_hits"] for row in rows] == [8, 16]
    assert server.seen("m")["requests"] <= 17
    again = start("again", **settings(server.url, "ask", **shared, steps="2"))
    train(again, validate)
    assert again.oracle.usage.requests == 0 and again.oracle.usage.cache_hits == 16
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.usefixtures("nothing_said")
def test_what_ask_does_not_learn_is_unknown_and_asked_again(start: Callable[..., Run], make_server: Any) -> None:
    server = make_server()
    server.plan("m", *[{}] * 3, {"status": 500, "message": "on fire"})
    run = start(**settings(server.url, "ask", steps="9"))
    row = train_step(run)
    assert (row["groups/unknown"], row["groups/trained"], row["oracle/failures"]) == (5, 3, 5)
    returned = list(run.queue.returned)
    assert len(returned) == 5 and run.state.lost_steps == 0
    assert run.failure is not None and "on fire" in str(run.failure.error)
    assert [p.id for p in run.queue.next(5)] == returned
    run.queue.restore(run.queue.cursor, returned)
    with pytest.raises(OracleDown, match=r"every question of the last 3 steps: .*on fire"):
        train(run, validate)
