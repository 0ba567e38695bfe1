"""bench/gpu.sh without a GPU: it refuses; with stand-ins for its tools, what it starts and reports; a dry run."""

import csv
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import gpu_report
import record

SCRIPT = record.ROOT / "bench" / "gpu.sh"
MINUTES = {"A": 7, "B": 7, "C": 7}


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def stand_ins(folder: Path, python: str) -> dict[str, str]:
    """The environment of a card whose tools say little, with a Python that notes how it is called."""
    tools = folder / "tools"
    tools.mkdir()
    executable(tools / "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3"')
    executable(tools / "compute-sanitizer", 'shift 6; exec "$@"')
    executable(tools / "ncu", 'while [ "$1" != --log-file ]; do shift; done; shift 2; exec "$@"')
    executable(tools / "python", f'echo "$*" >> {folder}/calls\nout={folder}/out\n{python}')
    (folder / "wheels").mkdir()
    (folder / "wheels" / "manifest.json").write_text("{}")
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "OUT": str(folder / "out"),
        "WHEELS": str(folder / "wheels"),
    }  # fmt: skip


def run(folder: Path, stage: str, python: str = "exit 0") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    environment = stand_ins(folder, python)
    done = subprocess.run([SCRIPT, stage], capture_output=True, text=True, env=environment, timeout=60)
    asked, *calls = (folder / "calls").read_text().splitlines()
    assert "torch.cuda.is_available()" in asked
    return done, calls


def steps(out: Path, stage: str) -> dict[str, dict[str, str]]:
    with (out / f"steps-{stage}.tsv").open() as file:
        return {row["step"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_its_syntax_is_right_and_it_wants_a_stage() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    for wrong in ([], ["D"], ["AB"], ["A", "--dry"], ["A", "--dry-run", "B"]):
        done = subprocess.run([SCRIPT, *wrong], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "usage: bench/gpu.sh A|B|C [--dry-run]\n")


@pytest.mark.skipif(Path("/usr/bin/nvidia-smi").exists(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([SCRIPT, "A"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "bench/gpu.sh: nvidia-smi finds no GPU on this machine (--dry-run needs none)\n"


def test_a_python_whose_torch_does_not_see_the_card_is_refused(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path, "exit 1")
    done = subprocess.run([SCRIPT, "A"], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "out").exists()
    said = "does not see the NVIDIA H100 80GB HBM3 (PYTHON names another)\n"
    assert done.stderr == f"bench/gpu.sh: the torch of {environment['PYTHON']} {said}"


def test_every_step_of_a_runs_and_a_failure_stops_none(tmp_path: Path) -> None:
    python = """case "$*" in
      *only-errors*) echo "no such peer"; exit 3;;
      *heads.py*) mkdir -p $out/kernels; touch $out/kernels/kernels-cuda.json;;
    esac"""
    done, calls = run(tmp_path, "A", python)
    assert done.returncode == 1
    assert [call.split(" --")[0] for call in calls] == [
        "setup.py build_ext", "-m pytest tests/gpu -m gpu", "bench/heads.py", "bench/tiles.py", "bench/heads.py",
        "bench/roofline.py", "-m pytest tests/gpu",
    ]  # fmt: skip
    found = steps(tmp_path / "out", "A")
    assert list(found) == ["build", "tests", "errors", "tiles", "head", "roofline", "memcheck"]
    assert found["errors"]["verdict"] == "exit code 3" and "no such peer" in done.stdout
    assert {row["verdict"] for name, row in found.items() if name != "errors"} == {"ok"}
    with tarfile.open(tmp_path / "out" / "logs-A.tar.gz") as logs:
        assert {Path(name).stem for name in logs.getnames() if name != "."} == set(found)
    assert "NVIDIA H100 80GB HBM3, stage A, results in" in done.stdout


@pytest.mark.parametrize("stage", MINUTES)
def test_the_limits_of_a_stage_add_up_to_its_minutes(tmp_path: Path, stage: str) -> None:
    done, calls = run(tmp_path, stage, "mkdir -p $out/kernels; touch $out/kernels/kernels-cuda.json")
    found = steps(tmp_path / "out", stage)
    assert done.returncode == 0 and len(calls) == len(found)
    assert {row["verdict"] for row in found.values()} == {"ok"}
    assert 60 * (MINUTES[stage] - 1) < sum(int(row["limit"]) for row in found.values()) <= 60 * MINUTES[stage]


def test_wheels_are_seen_by_the_steps_after_them_and_only_if_this_stage_installed_them(tmp_path: Path) -> None:
    """What lies there from another day may be another Python's."""
    for name, code in (("installed", 0), ("refused", 1)):
        folder = tmp_path / name
        folder.mkdir()
        python = f'echo "PATH $PYTHONPATH" >> {folder}/calls; case "$*" in *gpu_wheels*) exit {code};; esac'
        environment = stand_ins(folder, python) | {"SITE": str(folder / "site-packages")}
        done = subprocess.run([SCRIPT, "B"], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == code
        paths = [line for line in (folder / "calls").read_text().splitlines() if line.startswith("PATH")]
        assert [environment["SITE"] in path for path in paths] == [False, False, *[code == 0] * 3]


def test_what_cannot_run_says_why_in_one_line_and_the_rest_runs(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path, "exit 0")
    (tmp_path / "wheels" / "manifest.json").unlink()
    done = subprocess.run([SCRIPT, "B"], capture_output=True, text=True, env=environment, timeout=60)
    found = steps(tmp_path / "out", "B")
    assert done.returncode == 0 and list(found) == ["wheels", "build", "update", "shared"]
    wheels = environment["WHEELS"]
    assert found["wheels"]["verdict"] == f"not run: there is no {wheels}/manifest.json (make gpu-wheels)"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("touch $out/{1..9}.json", "11 files: at most 8 come back"),
        ("truncate -s 17M $out/large.json", "large.json is over 16 MiB"),
        ("mkdir -p $out/a/b/c; touch $out/a/b/c/deep.json", "a/b/c/deep.json has an odd name or depth"),
        ("touch '$out/odd name.json'", "odd name.json has an odd name or depth"),
    ],
)
def test_what_would_not_come_back_is_said(tmp_path: Path, made: str, said: str) -> None:
    made = made.replace("'$out/", "$out/'")
    done, _ = run(tmp_path, "B", f'case "$*" in *shared*) {made};; esac')
    assert done.returncode == 1 and said in done.stdout


def test_stopped_from_outside_it_leaves_what_there_was(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path, 'case "$*" in *pytest*) trap "echo saved; exit 1" TERM; sleep 60 & wait;; esac')
    with subprocess.Popen([SCRIPT, "A"], env=environment, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "calls").exists() or "pytest" not in (tmp_path / "calls").read_text():
            time.sleep(0.05)
        time.sleep(0.2)  # until the stand-in has set its trap
        process.terminate()
        assert process.wait(timeout=30) == 1
    found = steps(tmp_path / "out", "A")
    assert {name: row["verdict"] for name, row in found.items()} == {"build": "ok", "tests": "stopped from outside"}
    with tarfile.open(tmp_path / "out" / "logs-A.tar.gz") as logs:
        log = logs.extractfile("./tests.log")
        assert log is not None and log.read() == b"saved\n"


LEFT = {
    "A": {"kernels/errors-cpu.json", "kernels/kernels-cpu.json", "kernels/kernels-cpu.png", "tiles/tiles-cpu.json"},
    "B": {"update_step/cpu.json", "update_step/cpu.png", "shared_prompt/cpu.json"},
    "C": {f"{name}/kernels-cpu.{kind}" for name in ("peers", "cutlass") for kind in ("json", "png")}
    | {"attention/cpu.json"},
}


def test_a_dry_run_leaves_every_file_and_a_page_that_claims_nothing(tmp_path: Path) -> None:
    """For real, at the smallest shapes; `OUT` holds what all three leave, as a card's folder does."""
    environment = os.environ | {
        "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "WHEELS": str(tmp_path / "none"),
        "SITE": str(tmp_path / "none"), "DRY_SHAPE": "32,32,300", "DRY_UPDATE": "12,6,4",
    }  # fmt: skip
    for stage, left in LEFT.items():
        before = set(tmp_path.rglob("*"))
        command = [SCRIPT, stage, "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stdout
        files = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before if p.is_file()}
        assert files == left | {f"steps-{stage}.tsv", f"logs-{stage}.tar.gz"}
        verdicts = {row["verdict"] for row in steps(tmp_path, stage).values()}
        assert "ok" in verdicts and all(v == "ok" or v.startswith("not run: ") for v in verdicts)
    gpu_report.main([str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# A dry run on a CPU: no measurement of any GPU\n")
    for heading in (
        "The head",
        "Tiles",
        "The head's peers",
        "Errors",
        "One update",
        "One prompt for its responses",
        "Attention",
    ):
        assert f"\n## {heading}\n" in page
    assert page.count("![") == 4  # the pictures that the stages leave
