"""Mixtures of experts in vLLM. In a process of their own: vLLM starts none after another model's engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
PROGRAM = """
import math, sys
from pathlib import Path

import pytest
import torch

from tests.rollout import test_vllm_engine as helpers
from gapg_rollout.records import Sampling
from gapg_rollout.vllm_engine import VLLMEngine

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


def test_experts_are_synced_or_the_sync_is_refused(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
