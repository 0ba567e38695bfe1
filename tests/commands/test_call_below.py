"""`gapg calibrate --call-below`: calls where the policy gives a right answer less than a chance."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.commands.cli import main
from gapg.config import RunConfig, dump_config
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import FILE, Calibration, MaskedPass, load_calibration, save_calibration
from gapg.jsonl import read_jsonl
from gapg_rollout.records import HelpSpelling

INF = math.inf
FRACTION = Calibration(0.0, 0.2, 1.5, 0.2, "10 problems", 10, (0.1, 0.3), 20, (HelpSpelling(3, (1,), (4, 5)),))
BELOW = replace(FRACTION, cloud_fraction=None, call_below=0.7, agreement=0.9)


def decoded(margins: list[float], odds: list[list[float]], local: list[float] | None = None) -> MaskedPass:
    return MaskedPass(0.0, np.array(margins), np.array(odds), np.array(local or [0.0] * len(margins)))


@given(
    st.lists(st.tuples(st.sampled_from([-INF, -2.0, -1.0, 0.5, 3.0, INF]), st.floats(-4, 4)), min_size=1, max_size=20),
    st.floats(0.05, 0.95),
)
def test_no_bias_agrees_better(problems: list[tuple[float, float]], chance: float) -> None:
    one = decoded([m for m, _ in problems], [[z] for _, z in problems])
    below = [m == INF or 1 / (1 + math.exp(z)) < chance for m, z in problems]
    agreements = {b: np.mean(below == (one.chances(b) > 0)) for b in (-9.0, -2.0, 0.0, 1.5, 9.0)}
    if not any(math.isfinite(m) for m, _ in problems):
        with pytest.raises(ValueError, match="came near the help phrase"):
            one.fit_below(chance)
        return
    bias, agreement = one.fit_below(chance)
    assert agreement == max(agreements.values())
    least = min(one.chances(b).sum() for b, a in agreements.items() if a == agreement)
    assert one.chances(bias).sum() == least, "of equals the one that calls least"


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30, unique=True), st.floats(0.05, 0.95))
def test_where_one_token_decides_it_agrees_everywhere(odds: list[float], chance: float) -> None:
    one = decoded(odds, [[z] for z in odds])
    threshold = math.log(1 / chance - 1)
    gaps = np.diff(np.sort([*odds, threshold]))
    if gaps.min() < 1e-6:  # closer together than a bias can tell
        return
    bias, agreement = one.fit_below(chance)
    assert agreement == 1
    assert bias == pytest.approx(-threshold), "also where few problems, or none, lie about it"
    assert (one.chances(bias) > 0).tolist() == [z > threshold for z in odds]


def test_right_among_those_it_answers_and_those_it_calls_on() -> None:
    one = decoded([2.0, 1.0, -1.0, -2.0, -3.0], [[0.0]] * 5, [0, 1, 0, 1, 1])
    assert one.right_among(0.0) == (pytest.approx(2 / 3), 0.5)
    answered, called = one.right_among(-5.0)
    assert answered == pytest.approx(0.6) and math.isnan(called)


@pytest.mark.parametrize("n", [30, 300])
def test_where_none_calls_or_all_some_others_may(n: int) -> None:
    """Three in n, about, as the rule of three says of n problems without a case."""
    one = decoded([0.0] * n, [[0.0]] * n)
    low, high = one.interval(-1.0, 10**6)
    assert low == 0 and 3 / n < high < 4 / n
    assert one.interval(1.0, 10**6) == (pytest.approx(1 - high), 1)
    assert one.interval(-1.0, n)[1] > 1.5 * high, "few new ones differ more"


def test_both_kinds_live_in_one_file(tmp_path: Path) -> None:
    seventh = replace(FRACTION, cloud_fraction=0.7)
    for entry in (BELOW, seventh, FRACTION, replace(BELOW, bias=-2.0), replace(BELOW, call_below=0.5)):
        save_calibration(tmp_path, entry)
    found = load_calibration(tmp_path)
    assert found == [FRACTION, seventh, replace(BELOW, call_below=0.5), replace(BELOW, bias=-2.0)]
    assert [e.label for e in found[1:]] == [
        "greedy, calibrated to 70%",
        "greedy, calls below 50%",
        "greedy, calls below 70%",
    ]


def test_a_file_of_before_is_read_and_one_that_says_both_is_not(tmp_path: Path) -> None:
    old = {k: v for k, v in asdict(FRACTION).items() if k not in ("call_below", "agreement")}
    (tmp_path / FILE).write_text(json.dumps([old]))
    assert load_calibration(tmp_path) == [FRACTION]
    for odd in ({"call_below": 0.7}, {"cloud_fraction": None}, {"call_below": "high", "cloud_fraction": None}):
        (tmp_path / FILE).write_text(json.dumps([old | odd]))
        with pytest.raises(ConfigError, match="delete it"):
            load_calibration(tmp_path)


@pytest.fixture
def model(warm_model: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> list[str]:
    shutil.copytree(warm_model, tmp_path / "model")
    config = small_config(tmp_path / "run", method="marginal")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return [str(tmp_path / "model"), "--config", str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path / "out")]


def test_calibrate_and_evaluate(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", *model, "--cloud-fraction", "0.4"])
    main(["calibrate", *model, "--call-below", "0.85"])
    said = " ".join(capsys.readouterr().out.split())
    fraction, entry = load_calibration(tmp_path / "model")
    assert (fraction.cloud_fraction, fraction.call_below) == (0.4, None)
    assert (entry.temperature, entry.cloud_fraction, entry.call_below) == (0.0, None, 0.85)
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    calls = [r["help_margin"] + entry.bias > 0 for r in rows]
    assert entry.called == np.mean(calls) and 0 < entry.called < 1
    assert entry.agreement == pytest.approx(
        np.mean([(r["answer_chance"] < 0.85) == c for r, c in zip(rows, calls, strict=True)])
    )
    assert f"agree with S < 0.85 (S: its own chance of answering) on {entry.agreement:.1%} right" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["call_below"], summary["agreement"]) == (0.85, entry.agreement)
    right = [r["local_correct"] for r in rows]
    for key, which in (("right_called", True), ("right_answered", False)):
        assert summary["chosen"][key] == pytest.approx(
            np.mean([r for r, c in zip(right, calls, strict=True) if c == which])
        )
    assert summary["chosen"]["wanted"] == np.mean([r["answer_chance"] < 0.85 for r in rows])
    main(["eval", *model])
    assert "trained to be that of a right answer" in capsys.readouterr().out
    found = {r["name"]: r for r in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    masked = [r for r in read_jsonl(tmp_path / "out" / "predictions.jsonl") if r["decoding"] == "greedy, help masked"]
    assert found["greedy, calls below 85%"]["call_fraction"] == np.mean(
        [r["help_margin"] + entry.bias > 0 for r in masked]
    )
    assert found["greedy, calls below 85%"]["help_bias"] == entry.bias


def test_a_threshold_that_no_problem_is_beyond_is_said(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["calibrate", *model, "--call-below", "0.001", "--problems", "12"])
    said = " ".join(capsys.readouterr().err.split())
    assert "none of these 12 problems have S < 0.001" in said and "no such chance yet" not in said
    (entry,) = load_calibration(tmp_path / "model")
    assert (entry.called, entry.agreement) == (0.0, 1.0)


def test_a_chance_that_is_none_is_said(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that never trained its decision answers what it seldom gets right."""
    main(["calibrate", *model, "--call-below", "0.8"])
    assert "where S says 0.8 or more: S is no such chance yet" in " ".join(capsys.readouterr().err.split())


def test_with_a_known_cloud_it_is_said_what_s_is(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brier = ["--marginal.score", "brier", "--marginal.cloud", "ask"]
    main(["calibrate", *model, *brier, "--call-below", "0.7", "--problems", "12"])
    assert "over the chance that the cloud is right; calls come where that ratio is below 0.7" in " ".join(
        capsys.readouterr().err.split()
    )
    assert len(load_calibration(tmp_path / "model")) == 1


@pytest.mark.parametrize("named", [[], ["--config"]])
def test_what_a_run_was_trained_by_is_not_changed_on_the_command_line(
    named: list[str],
    warm_model: Path,
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = tmp_path / "run", tmp_path / "marginal.yaml"
    shutil.copytree(warm_model, run / "checkpoints" / "step-3" / "model")
    (run / "config.yaml").write_text(dump_config(small_config(run)))
    other.write_text(dump_config(small_config(run, method="marginal")))
    claimed = [str(run / "checkpoints" / "step-3"), *([*named, str(other)] if named else ["--method", "marginal"])]
    with pytest.raises(SystemExit):
        main(["calibrate", *claimed, "--call-below", "0.7"])
    assert "(method=gapg)" in capsys.readouterr().err
    main(["eval", *claimed])
    assert "not trained to be that of a right answer (method=gapg)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--call-below", "1"], ["call_below='1': input should be less than 1"]),
        (["--call-below", "0"], ["call_below='0': input should be greater than 0"]),
        (["--call-below", "70%"], ["call_below='70%': should be a number, as in 0.7"]),
        (["--call-below", "0.7", "--cloud-fraction", "0.3"], ["give one of them"]),
        (["--call-below", "0.7", "--temperature", "1"], ["greedy decoding", "leave out --temperature"]),
        (["--call-below", "0.7", "--method", "gapg"], ["(method=gapg)", "use --cloud-fraction"]),
        (["--call-below", "0.7", "--marginal.score", "price"], ["(marginal.score=price)", "use --cloud-fraction"]),
        (["--call-below", "0.7", "--rollout.temperature", "0.8"], ["(rollout.temperature=0.8,"]),
        (
            ["--call-below", "0.7", "--marginal.score", "brier", "--marginal.prices", "[0.1, 0.5]"],
            ["--call-below 0.7: with marginal.prices=[0.1, 0.5]", "give one inside"],
        ),
    ],
)  # fmt: skip
def test_one_line_with_the_fix(
    model: list[str], argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["calibrate", *model, *argv])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gapg: ") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "model" / FILE).exists()
