"""One engine a rank, inside the trainer's process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
PROGRAM = """
import os, sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.rollout import test_vllm_engine as helpers
from gapg_rollout.records import Sampling
from gapg_rollout.vllm_engine import VLLMEngine

rank = int(os.environ["RANK"])
old, new = (Path(sys.argv[1]) / f"{name}{rank}" for name in ("old", "new"))
helpers.save_model(old, seed=0)
other = helpers.save_model(new, seed=1)
dist.init_process_group("gloo")
engine = VLLMEngine(old, dtype="float32", max_model_len=400)
helpers.generate(engine, helpers.PROMPTS[: 1 + 3 * rank], 4, Sampling(10, seed=1))  # ranks need not work in step
engine.sync(other.state_dict())
prompts = helpers.PROMPTS[: 4 - 3 * rank]
for prompt, (one,) in zip(prompts, helpers.generate(engine, prompts, 1, Sampling(10, temperature=0.0)), strict=True):
    assert helpers.logits_of(other, prompt, one).argmax(-1).tolist() == list(one.token_ids)
engine.close()
total = torch.ones(1)
dist.all_reduce(total)  # the trainer's group is still there
assert total.item() == 2
dist.destroy_process_group()
"""


def test_two_ranks_generate_and_sync_apart_and_keep_their_group(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
