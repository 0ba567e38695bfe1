"""Checkpoints appear whole or not at all, however the process dies, and hold every bit of the optimizer."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gapg.config_sections import ModelConfig, OptimConfig
from gapg.files import partial_name
from gapg.model.load import load_model
from gapg.optim import clip_and_step, make_optimizer
from gapg.runs import checkpoint, manifest
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Sampling

MakeModel = Callable[..., PreTrainedModel]


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    clip_and_step(optimizer, 1e-3, 1.0)


@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_with_the_same_bits(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, tied: bool
) -> None:
    config = OptimConfig(lr=1e-3)
    model = make_model(seed=1, tie_word_embeddings=tied)
    optimizer = make_optimizer(model, config)
    for i in range(3):
        step(model, optimizer, i)
    state = {"step": 3, "ema": 0.1 + 0.2, "nested": {"returned": ["a"]}, "worst": None}
    path = checkpoint.save(tmp_path, 3, model, tokenizer, optimizer, state)

    again = load_model(ModelConfig(path=str(path / "model")), tokenizer, seed=0)
    resumed = make_optimizer(again, config)
    assert checkpoint.restore_optimizer(path, again, resumed) == state
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == set(resumed.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
        for slot, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][slot].dtype
            assert torch.equal(value, resumed.state[q][slot])
    for i in range(3, 6):
        step(model, optimizer, i)
        step(again, resumed, i)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_restored_optimizer_has_what_pytorch_would_restore(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, device: str
) -> None:
    """load_state_dict puts every state where the optimizer wants it; of a fused one, the step counter beside the rest.

    The meta device stands in for a GPU.
    """
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    step(model, optimizer, 0)
    path = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {})
    saved = optimizer.state_dict()
    model.to(device)
    ours, theirs = (make_optimizer(model, OptimConfig(lr=1e-3)) for _ in range(2))
    theirs.load_state_dict(saved)
    checkpoint.restore_optimizer(path, model, ours)
    for p in model.parameters():
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            assert ours.state[p][slot].device == theirs.state[p][slot].device, slot
            if device == "cpu":
                assert torch.equal(ours.state[p][slot], theirs.state[p][slot])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_restored_optimizer_steps_on_a_gpu(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_model().cuda()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    for i in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * i + 0.1)
        clip_and_step(optimizer, 1e-3, 1.0)
        if i == 0:
            path = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {})
            resumed = make_optimizer(model, OptimConfig(lr=1e-3))
            checkpoint.restore_optimizer(path, model, resumed)
            assert all(s["step"].device == optimizer.state[p]["step"].device for p, s in resumed.state.items())
            optimizer = resumed


def test_the_model_folder_is_plain_hugging_face(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """It loads in a process that has never heard of this project, with the same greedy continuation."""
    model = make_model(seed=4)
    path = checkpoint.save(tmp_path, 7, model, tokenizer, make_optimizer(model, OptimConfig(lr=1e-3)), {})
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m, t = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = t('3 8 15 = 39 :', return_tensors='pt')\n"
        "out = m.generate(ids['input_ids'], do_sample=False, max_new_tokens=8)\n"
        "assert not any(name.startswith('gapg') for name in sys.modules)\n"
        "print(out[0, ids['input_ids'].shape[1]:].tolist(), m.config._attn_implementation)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path / "model")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    prompt = tokenizer("3 8 15 = 39 :")["input_ids"]
    ((_, (completion,)),) = TransformersEngine(model, tokenizer).generate([prompt], 1, Sampling(8, temperature=0.0))
    assert done.stdout.split(" sdpa")[0] == str(list(completion.token_ids))
    again = AutoTokenizer.from_pretrained(path / "model")
    text = "8 * 3 = 24 ; 24 + 15 = 39 <unknown> I need external assistance </unknown>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_no_pickle(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    step(model, optimizer, 0)
    path = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"step": 1})
    files = [p for p in path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jinja", ".txt"}
    for p in files:
        assert not p.read_bytes().startswith((b"\x80", b"PK"))
    assert {p.name for p in path.iterdir()} == {"model", "optimizer.safetensors", "state.json", "manifest.json"}


def fake(root: Path, *steps: int) -> None:
    for n in steps:
        path = root / f"step-{n}"
        (path / "model").mkdir(parents=True)
        for name in ("state.json", "model/config.json"):
            (path / name).write_text(json.dumps({"step": n}))
        manifest.write(path, {"run": None, "step": n}, ["state.json", "model/config.json"])


@given(st.sets(st.integers(0, 300), max_size=8), st.integers(1, 4), st.sets(st.integers(0, 300), max_size=2))
@settings(deadline=None)
def test_prune_keeps_the_last_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep: int, also: set[int]
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    fake(root, *steps)
    left_behind = partial_name(root / "step-999")
    left_behind.mkdir()
    (left_behind / "half").write_text("x")
    checkpoint.prune(root, keep, also)
    left = sorted(set(sorted(steps)[-keep:]) | (steps & also))
    assert checkpoint.steps(root) == left
    assert sorted(p.name for p in root.iterdir()) == sorted(f"step-{n}" for n in left)
    newest = checkpoint.latest(root)
    assert newest == (root / f"step-{max(steps)}" if steps else None)


def test_the_newest_is_by_number_and_partial_ones_do_not_count(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    fake(tmp_path, 9, 10, 100)
    fake(tmp_path, 1000)
    (tmp_path / "step-1000").rename(partial_name(tmp_path / "step-1000"))
    (tmp_path / "step-2000.bak").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100"


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_is_none(tmp_path: Path) -> None:
    """As by the run that it belongs to, while `gapg eval` looks for the newest."""
    fake(tmp_path, 1, 2, 3)
    whole, ended = (tmp_path / "step-3").rename(tmp_path / "whole"), threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            shutil.copytree(whole, tmp_path / "copy")
            os.replace(tmp_path / "copy", tmp_path / "step-3")
            shutil.rmtree(tmp_path / "step-3")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            assert checkpoint.steps(tmp_path) in ([1, 2], [1, 2, 3])
    finally:
        ended.set()
        thread.join()


def test_an_existing_step_is_kept(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    path = checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"n": 1})
    assert checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"n": 2}) == path
    assert json.loads((path / "state.json").read_text()) == {"n": 1}


SAVER = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from gapg.runs import checkpoint, manifest
from gapg.config_sections import ModelConfig, OptimConfig
from gapg.model.load import load_model
from gapg.optim import make_optimizer
start, root = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(start)
model = load_model(ModelConfig(path=str(start)), tokenizer, 0)
optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
for p in model.parameters():
    p.grad = p.detach().clone()
optimizer.step()
print("ready", flush=True)
n = int(sys.argv[3])
while True:
    n += 1
    for p in model.parameters():
        p.data.fill_(n)  # so that half a save is told from a whole one
    for s in optimizer.state.values():
        s["exp_avg"].fill_(n)
    checkpoint.save(root, n, model, tokenizer, optimizer, {"step": n})
    checkpoint.prune(root, 2, also={1})
"""


def test_kill_9_in_the_middle_of_saving(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Processes that save and prune without pause, killed at random moments: the newest checkpoint is always whole.

    Forked children share one start-up, so that dozens of moments cost seconds.
    """
    start, root = tmp_path / "start", tmp_path / "checkpoints"
    make_model(hidden_size=64, intermediate_size=256).save_pretrained(start)
    tokenizer.save_pretrained(start)
    forks = SAVER.replace('print("ready", flush=True)\n', 'print("ready", flush=True)\n' + FORKING)
    process = subprocess.Popen(
        [sys.executable, "-c", forks, str(start), str(root), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    rng, seen, interrupted = random.Random(1), 0, 0
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(24):
            process.stdin.write(f"{seen}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.4))
            subprocess.run(["kill", "-9", str(child)], check=True)
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"
            interrupted += any(root.glob(".*.partial")) if root.exists() else 0
            newest = checkpoint.latest(root)
            if newest is None:
                continue
            n = json.loads((newest / "state.json").read_text())["step"]
            assert newest.name == f"step-{n}"
            assert n >= seen
            seen = n
            for older in checkpoint.steps(root):
                folder = root / f"step-{older}"
                weights = load_file(folder / "model" / "model.safetensors")
                assert all((t == older).all() for t in weights.values())
                moments = load_file(folder / "optimizer.safetensors")
                assert all((t == older).all() for name, t in moments.items() if name.endswith("/exp_avg"))
        AutoModelForCausalLM.from_pretrained(root / f"step-{seen}" / "model")
        AutoTokenizer.from_pretrained(root / f"step-{seen}" / "model")
    finally:
        process.kill()
        process.wait()
    assert seen > 8
    assert interrupted > 4, "most kills should have come in the middle of a save"


FORKING = """
import os
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv[3] = line
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
"""
