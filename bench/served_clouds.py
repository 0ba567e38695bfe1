"""A trained model with real clouds that are often wrong: other models, served by vLLM on this machine's loopback.

    python bench/served_clouds.py runs/arithmetic-smollm2 --problems 200

The clouds are the trained model itself at a higher temperature, and a model of its shape with random weights. For each
one `gapg eval` decodes the run's held-out problems as trained and as every calibration beside the model says (make some
with `gapg calibrate`), and asks the cloud where the model calls. Whoever calls a cloud that is worse than itself loses.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import record
from gapg.commands.cli import main as gapg
from gapg.commands.target import find_model
from gapg.config import load_config
from gapg.files import write_whole

START_S = 300.0
"""What a server may take to start."""
HOT = 1.5
"""The temperature at which a model is its own worse cloud."""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **os.environ}
"""Of every server, as it was when this began: the engine that evaluates sets some of these for its own process."""
Row = dict[str, Any]


@contextmanager
def served(model: Path, name: str, longest: int, log: Path) -> Iterator[str]:
    """The base URL of a vLLM server of this model; it ends with the block. Raises RuntimeError with its last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(longest), "--dtype", "float32",
        "--enforce-eager",
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise RuntimeError(f"vLLM's server did not start: {said[-1] if said else 'it said nothing'} ({log})")


def random_twin(model: Path, folder: Path) -> Path:
    """A model of the same shape and tokenizer, with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def with_cloud(run: Path, cloud: Path, name: str, temperature: float, problems: int, folder: Path) -> list[Row]:
    """A row a decoding of the run's model, with this cloud."""
    model, found = find_model(run)
    assert found is not None
    rollout = load_config(str(found / "config.yaml")).rollout
    folder.mkdir(parents=True, exist_ok=True)
    with served(cloud, name, rollout.longest, folder / "server.txt") as url:
        gapg([
            "eval", str(model.parent), "--oracle.kind", "openai", "--oracle.base-url", url, "--oracle.model", name,
            "--oracle.temperature", str(temperature), "--oracle.max-tokens", str(rollout.max_new_tokens),
            "--oracle.cache", str(folder / "answers.sqlite"), "--eval.heldout", str(problems),
            "--output-dir", str(folder),
        ])  # fmt: skip
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    return [{"cloud": name, "temperature": temperature, **row, "call_right": call_right(row)} for row in rows]


def call_right(row: Row) -> float | None:
    """How often an answered call brought a right answer; None where no call was answered."""
    right, wrong = (row["outcomes"].get(f"cloud_{how}", 0) for how in ("correct", "wrong"))
    return right / (right + wrong) if right + wrong else None


def table(rows: Sequence[Row]) -> str:
    def part(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    lines = []
    for row in rows:
        together = f"{part(row['accuracy'])} ({part(row['accuracy_low'])} to {part(row['accuracy_high'])})"
        others = map(part, (row["local_accuracy"], row["call_fraction"], row["call_right"]))
        lines.append((row["cloud"], row["name"], together, *others, str(row["unknown"])))
    head = ("cloud", "decoding", "together (95%)", "answered and right", "called", "a call is right", "unanswered")
    return record.markdown(head, lines, right=(3, 4, 5, 6))


def main() -> None:
    parser = record.parser(__doc__, "served_clouds")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--problems", type=record.positive, default=200, help="held-out problems")
    args = parser.parse_args()
    model, run = find_model(args.run)
    if run is None:
        parser.error(f"{args.run} belongs to no run")
    twin = random_twin(model, args.output / "random")
    about: Row = {"revision": record.revision(), "machine": record.machine(), "run": str(args.run), "rows": []}
    for cloud, name, temperature, folder in (
        (model, "itself, hotter", HOT, "hotter"), (twin, "random weights", 1.0, "untrained")
    ):  # fmt: skip
        about["rows"] += with_cloud(args.run, cloud, name, temperature, args.problems, args.output / folder)
        write_whole(args.output / "clouds.json", json.dumps(about, indent=1) + "\n")
    print(table(about["rows"]))


if __name__ == "__main__":
    main()
