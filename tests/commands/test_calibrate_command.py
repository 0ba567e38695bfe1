"""`gapg calibrate`: what a masked pass says of a bias, the file beside the weights, and the command end to end."""

import json
import math
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel

from gapg.commands.cli import main
from gapg.config import RunConfig, dump_config
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import FILE, Calibration, MaskedPass, check_saves, load_calibration, save_calibration
from gapg.evaluation.calibration_curve import plot
from gapg.evaluation.masked_pass import masked_pass
from gapg.help_phrase import help_control, masked
from gapg.jsonl import read_jsonl
from gapg.tasks.base import STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import HelpSpelling, Sampling

INF = math.inf


def decoded(temperature: float, margins: list[float], odds: list[list[float]], **more: list[float]) -> MaskedPass:
    cloud = more.get("cloud")
    return MaskedPass(
        temperature,
        np.array(margins),
        np.array(odds).reshape(len(margins), -1),
        np.array(more.get("local", [0.0] * len(margins))),
        None if cloud is None else np.array(cloud),
    )


def test_a_greedy_problem_calls_where_its_margin_says() -> None:
    one = decoded(0.0, [2.0, -1.0, -3.0, -INF], [[]] * 4, local=[0, 1, 1, 0], cloud=[1, 1, 0, 1])
    assert one.chances(0.0).tolist() == [1, 0, 0, 0]
    assert one.chances(2.0).tolist() == [1, 1, 0, 0]
    assert one.accuracy(2.0) == (0.25, 0.75)
    assert one.chances(one.fit(0.5)).mean() == 0.5
    assert one.reachable == 0.75
    assert one.chances(one.fit(0.99)).tolist() == [1, 1, 1, 0], "as many as can"


def test_a_sampled_problem_calls_unless_it_passes_every_place() -> None:
    one = decoded(1.0, [0, 0, -INF], [[0.0, 0.0], [math.log(3), -INF], [-INF, -INF]], local=[1, 1, 1], cloud=[1, 0, 1])
    assert one.chances(0.0) == pytest.approx([1 - 0.5 * 0.5, 1 - 0.25, 0.0])
    assert one.accuracy(0.0) == (pytest.approx((0.25 + 0.25 + 1) / 3), pytest.approx((1 + 0.25 + 1) / 3))
    # the bias is of the logit, before the temperature
    assert replace(one, temperature=0.5).chances(0.5 * math.log(3))[0] == pytest.approx(1 - 0.25 * 0.25)


@given(
    st.floats(0.3, 2.0),
    st.lists(st.lists(st.floats(-30, 10), min_size=3, max_size=3), min_size=1, max_size=30),
    st.floats(0.02, 0.98),
)
def test_the_fitted_bias_gives_the_fraction_in_expectation(t: float, odds: list[list[float]], c: float) -> None:
    one = decoded(t, [max(o) for o in odds], odds)
    assert one.chances(one.fit(c)).mean() == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_that_calls_in_other_tokens_counts_as_a_call(temperature: float) -> None:
    one = decoded(temperature, [INF, -1.0, -2.0, -3.0], [[-INF], [-1.0], [-2.0], [-3.0]])
    assert one.chances(-100.0) == pytest.approx([1, 0, 0, 0], abs=1e-9)
    assert one.chances(one.fit(0.5)).mean() == pytest.approx(0.5)
    assert one.chances(one.fit(0.25)).mean() == pytest.approx(0.25, abs=1e-6)


def test_responses_that_reason_in_a_think_block_are_said(
    make_model: Callable[..., PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks whose marks are no tokens, and responses that never leave one."""
    task = Countdown(max_number=4, max_target=12, style="chat")
    tokenizer = task.tokenizer()
    engine = TransformersEngine(make_model(), tokenizer)
    for thinking, said in ((False, False), (True, True)):
        sampling = Sampling(4, 0.0, STOP, help=masked(help_control(tokenizer)), thinking=thinking)
        masked_pass(engine, task, tokenizer, task.prompts("train")[:2], sampling, None)
        words = capsys.readouterr().err
        assert ("2 responses reason in a think block whose marks are not single tokens" in words) == said
        assert ("2 of 2 responses end while they think" in words) == said


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_never_comes_near_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="came near the help phrase"):
        decoded(temperature, [-INF] * 3, [[-INF]] * 3).fit(0.5)


def test_the_oracle_s_failures_are_left_out_of_the_accuracy_together() -> None:
    one = decoded(0.0, [1.0, -1.0, -1.0], [[]] * 3, local=[0, 1, 0], cloud=[math.nan, 1, 1])
    assert one.accuracy(0.0) == (pytest.approx(1 / 3), 0.5)
    assert decoded(0.0, [1.0], [[]]).accuracy(0.0)[1] is None, "not asked"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_interval_holds_new_problems(temperature: float) -> None:
    """Calibrate on n problems, use on 400 others of the same kind, many times: about 95% are inside."""
    rng, inside = np.random.default_rng(0), 0

    def draw(n: int) -> MaskedPass:
        odds = rng.normal(-2.0, 3.0, (n, 1))
        return decoded(temperature, odds[:, 0].tolist(), odds.tolist())

    for _ in range(400):
        one, other = draw(200), draw(400)
        bias = one.fit(0.3)
        low, high = one.interval(bias, 400)
        inside += low <= (rng.random(400) < other.chances(bias)).mean() <= high
    assert 0.92 <= inside / 400 <= 0.985


ENTRY = Calibration(0.0, 0.2, 1.5, 0.2, "10 problems", 10, (0.1, 0.3), 20, (HelpSpelling(3, (1,), (4, 5)),))


def test_the_file_keeps_every_entry_and_replaces_its_own(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) == []
    others = [replace(ENTRY, cloud_fraction=0.3), replace(ENTRY, temperature=1.0)]
    for entry in (ENTRY, *others, replace(ENTRY, bias=-2.0)):
        save_calibration(tmp_path, entry)
    assert load_calibration(tmp_path) == [replace(ENTRY, bias=-2.0), *others]
    assert others[1].bias == 1.5
    assert [e.label for e in others] == ["greedy, calibrated to 30%", "sampled, T=1, calibrated to 20%"]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == [FILE]


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[{}]", '[{"spellings": [], "interval": [0, 1], "new": 3}]', "3", "[" * 100_000),
        *(json.dumps([asdict(ENTRY) | {key: value}]) for key, value in {
            "bias": "much", "temperature": -1, "cloud_fraction": [1], "spellings": {}, "interval": [1]
        }.items()),
        *(json.dumps([asdict(ENTRY) | {key: INF}]) for key in ("bias", "temperature", "cloud_fraction")),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_never_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    for use in (load_calibration, check_saves, lambda folder: save_calibration(folder, ENTRY)):
        with pytest.raises(ConfigError, match=f"{FILE}: .*delete it") as caught:
            use(tmp_path)
        assert str(caught.value).count(FILE) == 1
    assert (tmp_path / FILE).read_text() == text


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    """A model folder may be anyone's; it is refused before anything is decoded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "mine").write_text("precious")
    for target in ("mine", "made"):
        lock = tmp_path / "model" / f".{FILE}.lock"
        lock.symlink_to(tmp_path / target)
        for use in (check_saves, lambda folder: save_calibration(folder, ENTRY)):
            with pytest.raises(ConfigError, match=rf"\.{FILE}\.lock cannot be written"):
                use(tmp_path / "model")
        lock.unlink()
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "made").exists()


def test_a_title_may_hold_dollars(tmp_path: Path) -> None:
    one = decoded(0.0, [2.0, -1.0, -3.0], [[]] * 3)
    plot(one, ENTRY, "a $\\bad$ \x1b name", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.fixture
def model(warm_model: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> list[str]:
    """A model folder of the test's own, and its config: the first words of a command."""
    shutil.copytree(warm_model, tmp_path / "model")
    config = small_config(tmp_path / "run")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return [str(tmp_path / "model"), "--config", str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path / "out")]


def test_calibrate_and_evaluate(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", *model])
    assert f"no {FILE} beside the model" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "out" / "curve.png").symlink_to(tmp_path / "elsewhere")
    for argv in (["--cloud-fraction", "0.4"], ["--temperature", "1"]):
        main(["calibrate", *model, *argv])
        out = capsys.readouterr().out
        assert "saved" in out
        assert "100%" in out
    greedy, sampled = load_calibration(tmp_path / "model")
    assert (greedy.temperature, greedy.cloud_fraction) == (0.0, 0.4)
    assert (sampled.temperature, sampled.cloud_fraction) == (1.0, 0.3), "the config's own fraction"
    n = greedy.n
    assert greedy.called == round(0.4 * n) / n
    assert sampled.called == pytest.approx(0.3, abs=1e-6)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"curve.png", "summary.json", "predictions.jsonl"}
    assert not (tmp_path / "elsewhere").exists(), "a link in a shared folder leads nowhere"
    main(["eval", *model])
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    for entry in (greedy, sampled):
        row = rows[entry.label]
        # twice the 95% interval: this model has learnt its few training problems, and the held-out ones are others
        low, high = entry.interval
        assert low - (high - low) / 2 <= row["call_fraction"] <= high + (high - low) / 2
        assert row["help_bias"] == entry.bias


def test_the_first_n_of_a_seeded_order(model: list[str], tmp_path: Path) -> None:
    seen = []
    for n in (12, 24):
        main(["calibrate", *model, "--problems", str(n)])
        seen.append([row["id"] for row in read_jsonl(tmp_path / "out" / "predictions.jsonl")])
    assert len(set(seen[1])) == 24
    assert seen[1][:12] == seen[0]


def test_a_paid_oracle_is_asked_only_when_told(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bias needs no oracle, not even one that could be reached, nor its key."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        paid = [
            *("--oracle.kind", "openai", "--oracle.model", "cloud", "--oracle.api-key-env", "GAPG_NO_SUCH_KEY"),
            *("--oracle.base-url", f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", "--oracle.max-retries", "0"),
        ]
        main(["calibrate", *model, *paid, "--problems", "12"])
        (entry,) = load_calibration(tmp_path / "model")
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["chosen"]["accuracy"] is None
        assert summary["chosen"]["local_accuracy"] >= 0
        assert not (tmp_path / "out" / "oracle.sqlite").exists()
        with pytest.raises(SystemExit) as left:
            main(["calibrate", *model, *paid, "--problems", "12", "--accuracy"])
        assert left.value.code == 3
        assert "the oracle failed all 12 questions" in capsys.readouterr().err.splitlines()[-1]
        assert load_calibration(tmp_path / "model") == [entry], "a cloud that fails changes no bias"
        rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
        assert all(row["oracle_score"] is None and row["oracle_error"] for row in rows)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cloud-fraction", "1.5"], "cloud_fraction='1.5': input should be less than 1"),
        (["--cloud-fraction", "0"], "cloud_fraction='0': input should be greater than 0"),
        (["--temperature", "-1"], "temperature=-1: must be 0"),
        (["--problems", "0"], "--problems 0: the training split has"),
        (["--problems", "2", "--cloud-fraction", "0.1"], "no such part of 2 problems; take at least 10"),
    ],
)
def test_one_line_with_the_fix(
    model: list[str], argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["calibrate", *model, *argv])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gapg: ")
    assert words in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "model" / FILE).exists()


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["calibrate", "/no/such/run"], ["calibrate"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_another_tokenizer_s_calibration_is_refused(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = help_control(AutoTokenizer.from_pretrained(tmp_path / "model"))
    for entry in (ENTRY, replace(ENTRY, spellings=own.spellings, blocks=((1, 2),))):
        save_calibration(tmp_path / "model", entry)
        with pytest.raises(SystemExit):
            main(["eval", *model])
        assert "made with another tokenizer" in capsys.readouterr().err


def test_a_verifier_that_fails_is_one_line(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task is anyone's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lost_units.py").write_text(
        "from gapg.tasks.countdown import Countdown\n"
        "class Mine(Countdown):\n    def verify(self, prompt, answers): raise RuntimeError('no such unit')\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["calibrate", *model, "--task.name", "lost_units:Mine"])
    assert left.value.code == 2
    assert "verify() failed on prompt" in (line := capsys.readouterr().err.splitlines()[-1]) and "no such unit" in line
