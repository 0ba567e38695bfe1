"""Shared by all tests: one thread, no hub, a real model small enough to be made anew for every test, and a real HTTP
server, in a process of its own, that injects real faults."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gapg import console
from gapg.build import make_task
from gapg.config import RunConfig, load_config
from gapg.model.load import load_tokenizer
from gapg.runs.run import Run, build_run
from gapg.tasks.countdown import Countdown
from gapg.warm_start import warm_start

torch.set_num_threads(1)
# a busy machine is slow, not wrong; and CI has the same examples each time, so that a change is refused for what it did
settings.register_profile("gapg", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("gapg")


def pytest_collection_finish() -> None:
    """What all tests are made of stays: the collector of cycles need not look at its million objects, a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def countdown() -> Countdown:
    """A small Countdown task: 3 numbers of 1..8."""
    return Countdown(max_number=8, max_target=30)


@pytest.fixture(scope="session")
def tokenizer(countdown: Countdown) -> PreTrainedTokenizerBase:
    return countdown.tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """`make_model(seed, **LlamaConfig settings)`: a random Llama of two layers, packed attention, ready for training.

    Weights are four times the usual size, so that its distributions are far from uniform.
    """
    from gapg.model import attention

    def make(seed: int = 0, **settings: object) -> PreTrainedModel:
        attention.register()
        torch.manual_seed(seed)
        defaults = dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config = LlamaConfig(**{**defaults, **settings})
        return LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).train()

    return make


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Path]:
    """`folder(kind=LlamaConfig, **settings)`: a tiny random model saved with the tokenizer of Countdown."""

    def make(kind: Any = LlamaConfig, **settings: Any) -> Path:
        path = tmp_path / "model"
        size: dict[str, Any] = dict(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(kind(**{**size, **settings})).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SAID", set())


SMALL_RUN = {
    "task.args": "{max_number: 4, max_target: 12}",
    "model.llama": "{hidden_size: 48, num_layers: 2, num_heads: 2, intermediate_size: 96}",
    "warm_start.steps": "150",
    "warm_start.batch_size": "32",
    "warm_start.checkpoint_every": "200",
    "warm_start.optim.lr": "6e-3",
    "rollout.prompts_per_step": "8",
    "rollout.samples_per_prompt": "4",
    "steps": "3",
    "checkpoint_every": "2",
    "eval.every": "2",
    "eval.problems": "12",
    "tensorboard": "false",
    "threads": "1",
}
"""The quickstart on easier problems, with a smaller model and three steps."""


@pytest.fixture(scope="session")
def small_config() -> Callable[..., RunConfig]:
    """`small_config(folder, **overrides)`, the overrides' dots written as two underscores."""

    def make(folder: Path, **overrides: str) -> RunConfig:
        changed = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_config("quickstart", {**SMALL_RUN, "output_dir": str(folder), **changed})

    return make


@pytest.fixture(scope="session")
def warm_model(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a short warm start, real but far from good."""
    folder = tmp_path_factory.mktemp("warm")
    config = small_config(folder)
    task = make_task(config)
    return warm_start(config, folder / "checkpoints", task, load_tokenizer(config.model, task))


@pytest.fixture
def start(small_config: Callable[..., RunConfig], warm_model: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`start(name, **overrides)`: a run from the warm start, or from its last checkpoint, in the test's own folder."""
    opened: list[Run] = []

    def make(name: str = "run", **overrides: str) -> Run:
        config = small_config(tmp_path / name, **overrides)
        config.output_dir.mkdir(exist_ok=True)
        opened.append(build_run(config, config.output_dir, make_task(config), warm_model))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


class FaultServer:
    """A running fault_server.py. Tests keep apart by using a model name each."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, str(Path(__file__).parent / "rollout" / "fault_server.py"), str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def plan(self, model: str, *steps: dict[str, Any]) -> None:
        """Sets what the chat requests for `model` get, one after another; the last step repeats."""
        self._call("PUT", f"/plan/{model}", json.dumps(steps).encode())

    def seen(self, model: str) -> dict[str, Any]:
        """What the server saw of `model`: requests, most_open, times, auth, last."""
        seen: dict[str, Any] = self._call("GET", f"/seen/{model}", None)
        return seen

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, method=method)
        with self._opener.open(request, timeout=5) as reply:
            return json.load(reply)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.kill()


@pytest.fixture
def make_server() -> Iterator[type[FaultServer]]:
    """For tests that kill their server, or start one on a chosen port."""
    made: list[FaultServer] = []

    class Tracked(FaultServer):
        def __init__(self, port: int = 0) -> None:
            super().__init__(port)
            made.append(self)

    yield Tracked
    for one in made:
        one.kill()


@pytest.fixture
def trl_settings(tmp_path: Path) -> dict[str, Any]:
    """Arguments with which a trainer of TRL's takes a float32 step on this CPU and says nothing to anyone."""
    return {
        "output_dir": str(tmp_path / "trl"),
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "seed": 1,
        "model_init_kwargs": {"dtype": torch.float32},
    }
