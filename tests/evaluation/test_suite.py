"""`gapg eval --suite`, end to end: one table and one suite.json of several sets, a cloud's money and its failures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gapg.commands.cli import main
from gapg.evaluation.reliability import auroc, brier, ece
from gapg.evaluation.report import print_suite
from gapg.evaluation.statistics import wilson
from gapg.evaluation.suite import OWN
from gapg.jsonl import read_jsonl
from tests.conftest import FaultServer
from tests.evaluation.small_maths import make_config, sums, write

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warm-started by its data's worked solutions, and calibrated."""
    folder = tmp_path_factory.mktemp("suite")
    config = make_config(folder)
    main(["train", str(folder / "config.yaml")])
    main(["calibrate", str(config.output_dir), "--cloud-fraction", "0.5"])
    return config.output_dir


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A suite of two sets of one's own."""
    write(tmp_path / "minus" / "test.jsonl", *sums(range(12), "-"))
    write(
        tmp_path / "times.jsonl",
        *({"problem": r["question"], "gold": 5 + n % 2} for n, r in enumerate(sums(range(8), "*"))),
    )
    minus = {"path": str(tmp_path / "minus"), "split": "test", "answer_pattern": "#### (.+)"}
    times = {"path": str(tmp_path / "times.jsonl"), "question": "problem", "answer": "gold"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"minus": minus, "times": times}, sort_keys=False))
    return tmp_path / "mine.yaml"


def figures(lines: list[dict[str, Any]], key: str, decoding: str) -> dict[str, Any]:
    """A cell of suite.json, computed again from predictions.jsonl."""
    outcomes = [line["outcome"] for line in lines if line["decoding"] == decoding]
    hits = {
        "accuracy": [o in ("local_correct", "cloud_correct") for o in outcomes],
        "local_accuracy": [o == "local_correct" for o in outcomes],
        "call_fraction": [o.startswith("cloud") for o in outcomes],
    }[key]
    low, high = wilson(sum(hits), len(hits))
    return {"n": len(hits), key: sum(hits) / len(hits), f"{key}_low": low, f"{key}_high": high}


DECODINGS = {
    "greedy": "greedy",
    "sampled, T=1": "sampled",
    "greedy, calibrated to 50%": "greedy, calibrated to 50%",
    "alone, greedy": "greedy, help masked",
}
"""To each row of suite.json its lines of predictions.jsonl."""


def test_one_table_and_one_json_of_several_sets(
    run: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are those of the predictions; the first column is what the command says without a suite."""
    out = tmp_path / "eval"
    out.mkdir()
    (out / "suite.json").write_text("of another evaluation")
    both = ["eval", str(run), "--eval.heldout", "none"]
    main([*both, "--suite", str(mine), "--output-dir", str(out)])
    captured = capsys.readouterr()
    suite = json.loads((out / "suite.json").read_text())
    assert [(s["key"], s["name"], s["in_domain"], s["n"]) for s in suite["sets"]] == [
        (OWN, "maths", True, 20),
        ("minus", "minus", False, 12),
        ("times", "times", False, 8),
    ]
    assert (suite["averaged"], suite["complete"], suite["not_evaluated"]) == (["minus", "times"], True, [])
    read = yaml.safe_load(mine.read_text())
    assert [s["source"] for s in suite["sets"]] == [
        yaml.safe_load((run / "config.yaml").read_text())["task"]["args"],
        {"subset": None, "limit": None, **read["minus"]},
        {"subset": None, "limit": None, "split": "test", **read["times"]},
    ]
    assert (suite["suite"], suite.get("suite_data")) == (str(mine), None)
    assert [row["name"] for row in suite["rows"]] == list(DECODINGS)
    calls = 0
    for one in suite["sets"]:
        lines = read_jsonl(out / one["key"] / "predictions.jsonl")
        assert {line["decoding"] for line in lines} == set(DECODINGS.values())
        for row in suite["rows"]:
            cell = row["sets"][one["key"]]
            keys = [key for key in ("accuracy", "local_accuracy", "call_fraction") if key in cell]
            assert len(keys) == (1 if row["name"] == "alone, greedy" else 3)
            for key in keys:
                again = figures(lines, key, DECODINGS[row["name"]])
                assert {k: cell[k] for k in again} == pytest.approx(again)
        masked = [line for line in lines if line["decoding"] == "greedy, help masked"]
        score, right = (np.array([float(line[key]) for line in masked]) for key in ("answer_chance", "local_correct"))
        decision = suite["decision"][one["key"]]
        assert (decision["brier"], decision["ece"]) == pytest.approx((brier(score, right), ece(score, right)))
        assert decision["auroc"] == pytest.approx(auroc(score, right))
        calls += sum(line["outcome"].startswith("cloud") for line in lines)
        assert (out / one["key"] / "reliability.png").stat().st_size > 1000
        assert f"{one['name']}: evaluate sampled, T=1 {one['n']}/{one['n']}" in captured.err
    assert suite["oracle_usage"]["requests"] == calls > 0, "what all sets asked"
    for row in suite["rows"]:
        for key, value in row["mean"].items():
            assert value == pytest.approx((row["sets"]["minus"][key] + row["sets"]["times"][key]) / 2)
    assert_table(suite, captured.out)
    main([*both, "--output-dir", str(tmp_path / "plain")])
    plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
    in_domain = json.loads((out / OWN / "summary.json").read_text())
    assert {k: in_domain[k] for k in plain if k != "overrides"} == {k: plain[k] for k in plain if k != "overrides"}
    assert plain["rows"] == [{"name": r["name"], **r["sets"][OWN]} for r in suite["rows"][:3]]
    predicted = (tmp_path / "plain" / "predictions.jsonl").read_bytes()
    assert predicted == (out / OWN / "predictions.jsonl").read_bytes()


def assert_table(suite: dict[str, Any], printed: str) -> None:
    """One table and nothing else, not wider than its console, with each figure in its column."""
    lines = printed.splitlines()
    assert printed.count("┏") == printed.count("└") == 1 and lines[-1].startswith("└")
    assert max(map(len, lines)) <= 100
    assert "(in domain)" in printed
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    rows = [row for row in cells if row]
    keys = [one["key"] for one in suite["sets"]]
    group = ""
    found = 0
    for row in rows:
        group = row[0] if not any(row[1:]) else group
        named = [r for r in suite["rows"] if r["name"] == row[0]]
        if named and any(row[1:]):
            key = {"together": "accuracy", "called": "call_fraction", "right": "local_accuracy"}[group]
            assert row[1:] == [f"{v:.3f}" for v in (*(named[0]["sets"][k][key] for k in keys), named[0]["mean"][key])]
            found += 1
    assert found == 2 * 3 + 1
    assert rows[-1] == ["problems", *(str(one["n"]) for one in suite["sets"]), ""]


@pytest.mark.parametrize("more", [0, 8])
def test_the_shipped_sets_fit_and_more_lose_no_digits(more: int, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["countdown", "gsm8k", "math500", "amc23", "minerva", "agieval-math", "svamp", *map(str, range(more))]
    cell = {"accuracy": 0.125, "call_fraction": math.nan, "unknown": 0}
    rows = [{"name": name, "sets": dict.fromkeys(names, cell), "mean": cell} for name in list(DECODINGS)[:3]]
    sets: list[dict[str, Any]] = [
        {"key": name, "name": name, "in_domain": name == "countdown", "n": 1319, "too_long": 0} for name in names
    ]
    print_suite({"sets": sets, "averaged": names[1:], "rows": rows})
    printed = capsys.readouterr().out
    sets[2]["too_long"] = 272
    print_suite({"sets": sets, "averaged": names[1:], "rows": rows})
    assert "too long, left out" not in printed and capsys.readouterr().out.count("272 ") == 1
    assert (max(map(len, printed.splitlines())) <= 100) == (not more)
    assert printed.count("0.125 │") == printed.count(" ? │") == (8 + more) * 3
    assert printed.count("1319") == 7 + more
    assert "agieval-" in printed and "(in domain)" in printed and "…" not in printed


CLOUD = ["--oracle.kind", "openai", "--oracle.max-tokens", "5", "--oracle.concurrency", "1", "--eval.heldout", "6"]
PAID = ["--oracle.price-per-million-prompt", "0", "--oracle.price-per-million-completion", "1000000"]
"""An answer costs 5, and so does the worst one."""


def test_a_cloud_s_cap_holds_over_all_sets(
    run: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], server: FaultServer
) -> None:
    """What it did not answer is unknown, and is counted in the table."""
    argv = ["eval", str(run), "--suite", str(mine), *CLOUD, "--oracle.base-url", server.url, "--output-dir"]
    main([*argv, str(tmp_path / "free"), "--oracle.model", "free"])
    (out := tmp_path / "eval").mkdir()
    asked = [
        json.loads((tmp_path / "free" / key / "summary.json").read_text())["oracle_usage"]["requests"]
        for key in (OWN, "minus", "times")
    ]
    most = sum(asked[:2]) + 1
    assert asked[2] > 1
    capsys.readouterr()
    book = ["--oracle.cache", str(tmp_path / "book.sqlite"), "--oracle.spending-cap", str(5 * most)]
    main([*argv, str(out), *PAID, "--oracle.model", "capped", *book])
    suite = json.loads((out / "suite.json").read_text())
    assert server.seen("capped")["requests"] == suite["oracle_usage"]["requests"] == most
    assert suite["oracle_usage"]["cost"] == pytest.approx(5 * most)
    shares = [json.loads((out / s["key"] / "summary.json").read_text()) for s in suite["sets"]]
    assert [s["oracle_usage"]["requests"] for s in shares] == [*asked[:2], 1]
    captured = capsys.readouterr()
    (row,) = [row for row in suite["rows"] if row["name"] == "greedy, calibrated to 50%"]
    lost = [row["sets"][s["key"]]["unknown"] for s in suite["sets"]]
    assert lost[-1] > 0
    counted = captured.out[captured.out.index("│ unknown ") :].splitlines()[3]
    assert [cell.strip() for cell in counted.split("│")[1:-1]] == [row["name"], *map(str, lost), ""]
    assert f"spending cap of {5 * most} reached" in captured.err
    assert "questions: those problems are left out of the accuracy" in captured.err


FLAGGED = {"status": 400, "message": "flagged by moderation"}


@pytest.mark.parametrize(
    ("name", "plan", "cap", "done"),
    [
        ("refuses", [{"status": 401}], None, [OWN]),
        ("runs-out", [{}], "5", [OWN, "minus"]),
        ("odd", [FLAGGED], None, [OWN, "minus", "times"]),
        ("overloaded", [{"status": 503}], None, [OWN, "minus"]),
    ],
)
def test_a_cloud_that_answers_nothing_ends_the_suite_after_the_set(
    name: str,
    plan: list[dict[str, Any]],
    cap: str | None,
    done: list[str],
    run: Path,
    mine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server: FaultServer,
) -> None:
    """All so far is written and shown. Questions that fail for what is in them say nothing of the next set's."""
    server.plan(name, *plan)
    cloud = [*CLOUD, "--oracle.model", name, "--oracle.base-url", server.url, "--oracle.max-retries", "0"]
    cloud += [*PAID, "--oracle.spending-cap", cap, "--oracle.cache", str(tmp_path / "book.sqlite")] if cap else []
    out = tmp_path / "eval"
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), "--suite", str(mine), *cloud, "--output-dir", str(out)])
    assert exit.value.code == 3
    captured = capsys.readouterr()
    lines, left = captured.err.splitlines(), [key for key in (OWN, "minus", "times") if key not in done]
    assert lines[-1].startswith("gapg: the oracle failed all ")
    stopped = f"warning: stopped after {done[-1].replace(OWN, 'maths')}, as the cloud answers nothing; not evaluated: "
    assert [line for line in lines if line.startswith("warning: stopped")] == ([stopped + ", ".join(left)] * bool(left))
    suite = json.loads((out / "suite.json").read_text())
    assert (suite["complete"], suite["not_evaluated"]) == (not left, left)
    assert [s["key"] for s in suite["sets"]] == done and suite["averaged"] == done[1:]
    assert sorted(path.parent.name for path in out.glob("*/summary.json")) == sorted(done)
    assert all(sum(row["sets"][key]["unknown"] for row in suite["rows"][:3]) > 0 for key in done)
    assert "│ unknown " in captured.out and ("out of" in captured.out) == (len(done) > 1)


def test_the_task_that_was_trained_is_in_domain_and_left_out_whatever_the_command_line_names(
    run: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what was trained on is: the same problems, as the config's own and as a set, from a folder."""
    write(tmp_path / "seen" / "test.jsonl", *sums(range(6), "+"), *sums(range(6), "-"))
    write(tmp_path / "other.jsonl", *sums(range(9), "*"))
    mine.write_text("minus: {path: x, answer_pattern: '#### (.+)'}\nseen: {path: x, answer_pattern: '#### (.+)'}\n")
    argv = ["--eval.heldout", "none", "--suite", str(mine), "--suite-data", str(tmp_path)]
    other = f"{{train: null, heldout: {{path: {tmp_path / 'other.jsonl'}, answer_pattern: '#### (.+)'}}}}"
    main(["eval", str(run), *argv, "--task.args", other, "--output-dir", str(tmp_path / "eval")])
    suite = json.loads((tmp_path / "eval" / "suite.json").read_text())
    assert [(s["key"], s["in_domain"], s["n"], s["trained_on"]) for s in suite["sets"]] == [
        (OWN, False, 9, 0),
        ("minus", False, 12, 0),
        ("seen", True, 6, 6),
    ]
    assert suite["averaged"] == [OWN, "minus"] and suite["suite_data"] == str(tmp_path)
    assert suite["sets"][2]["source"]["path"] == str(tmp_path / "seen")
    captured = capsys.readouterr()
    assert "warning: seen: the model was trained on 6 of 12 problems: left out\n" in captured.err
    assert captured.out.count("(in domain)") == 1


# The real sets are not shipped; the rows above keep every path tested where they are absent.
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real sets, in ../shared/data")
def test_the_shipped_suite_on_the_real_sets(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--suite", "maths", "--suite-data", str(DATA), "--eval.heldout", "4", "--output-dir", str(tmp_path)]
    main(["eval", str(run), *argv])
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert [(s["name"], s["n"]) for s in suite["sets"]] == [("maths", 4), ("gsm8k", 4), ("math500", 4)]
    captured = capsys.readouterr()
    assert "left out, not in" in captured.err and "amc23, minerva, agieval-math, svamp" in captured.err
    assert "gsm8k" in captured.out and "math500" in captured.out
