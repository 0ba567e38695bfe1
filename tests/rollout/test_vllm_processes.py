"""vLLM in processes of their own: mixtures of experts (none starts after another model's engine), one engine a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

EXPERTS = """
import math, sys
from pathlib import Path

import pytest
import torch

from tests.rollout import test_vllm_engine as helpers
from gapg_rollout.records import Sampling
from gapg_rollout.engines.vllm import VLLMEngine

# experts are stacked in memory and apart in the files, and vLLM's CPU kernels want them packed after every sync
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
old, new = (Path(sys.argv[1]) / name for name in ("old", "new"))
model, other = (helpers.save_variant(path, "qwen3_moe", seed, **experts) for seed, path in enumerate((old, new)))
engine = VLLMEngine(old, dtype="float32", max_model_len=400)
for current in (model, other, model):
    engine.sync(current.state_dict())
    helpers.assert_logprobs(engine, current)
# ruined weights are not hidden
engine.sync({name: torch.full_like(tensor, math.nan) for name, tensor in model.state_dict().items()})
for temperature in (0.0, 1.0):
    ((one,),) = helpers.generate(engine, helpers.PROMPTS[:1], 1, Sampling(3, temperature=temperature))
    assert all(math.isnan(x) for x in one.logprobs)
engine.close()

# vLLM loads the experts of gpt-oss once, and would keep them whatever is sent
folder = Path(sys.argv[1]) / "gpt_oss"
model = helpers.save_variant(folder, "gpt_oss", 0, num_local_experts=4, num_experts_per_tok=2)
engine = VLLMEngine(folder, dtype="float32", max_model_len=400)
with pytest.raises(ValueError, match=r"old weights of model\\.layers\\.0\\.mlp\\.experts.*choose") as error:
    engine.sync(model.state_dict())
assert len(str(error.value).splitlines()) == 1
engine.close()
"""

RANKS = """
import os, sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.rollout import test_vllm_engine as helpers
from gapg_rollout.records import Sampling
from gapg_rollout.engines.vllm import VLLMEngine

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


def run(folder: Path, program: str, *launcher: str) -> None:
    (folder / "program.py").write_text(program)
    command = [sys.executable, *launcher, str(folder / "program.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_experts_are_synced_or_the_sync_is_refused(tmp_path: Path) -> None:
    run(tmp_path, EXPERTS)


@pytest.mark.slow
def test_two_ranks_generate_and_sync_apart_and_keep_their_group(tmp_path: Path) -> None:
    run(tmp_path, RANKS, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
