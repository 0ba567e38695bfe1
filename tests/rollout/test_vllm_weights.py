"""A state dict in the layout of the files that the model was loaded from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gapg_rollout.engines.vllm_weights import FileLayout

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4},
    "qwen3_5_text": {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
}


def save(folder: Path, kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZE, **KINDS[kind], **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", list(KINDS))
def test_names_and_shapes_are_those_that_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    save(tmp_path / "old", kind)
    layout = FileLayout(tmp_path / "old")
    new = save(tmp_path / "new", kind, seed=1)
    assert_same(layout(new.state_dict()), files(tmp_path / "new"))


def test_a_model_that_is_saved_as_it_is_in_memory_is_not_copied(tmp_path: Path) -> None:
    weights = save(tmp_path, "llama").state_dict()
    found = FileLayout(tmp_path)(weights)
    assert {name: t.data_ptr() for name, t in found.items()} == {name: t.data_ptr() for name, t in weights.items()}


def test_a_tied_head_is_sent_though_no_file_has_it(tmp_path: Path) -> None:
    model = save(tmp_path, "llama", tie_word_embeddings=True)
    layout = FileLayout(tmp_path)
    assert layout(model.state_dict()).keys() - layout.names == {"lm_head.weight"}


def test_what_else_the_files_hold_is_left_alone(tmp_path: Path) -> None:
    """An old buffer, and a text model inside a multimodal one's files, the names of which it keeps."""
    model = save(tmp_path, "qwen3_5_text")
    inside = {name.replace("model.", "model.language_model.", 1): t for name, t in files(tmp_path).items()}
    others = {"model.visual.patch.weight": torch.ones(2, 2), "model.language_model.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**inside, **others}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(FileLayout(tmp_path)(model.state_dict()), inside)


def test_files_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = save(tmp_path, "gpt2", tie_word_embeddings=True)
    bare = {name.removeprefix("transformer."): t for name, t in files(tmp_path).items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = FileLayout(tmp_path)(model.state_dict())
    assert_same({name: t for name, t in found.items() if name != "lm_head.weight"}, bare)
