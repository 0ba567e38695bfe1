"""A model folder is this model, whole, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    DbrxConfig,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from gapg.config_sections import ModelConfig
from gapg.errors import ConfigError
from gapg.model.folder import FILE, generation_config, load_shape
from gapg.model.load import end_ids, load_model, load_tokenizer
from gapg.model.route import choose_route
from gapg.optim import make_optimizer
from gapg.runs import checkpoint
from gapg.tasks.countdown import Countdown
from gapg_rollout.engines.transformers import TransformersEngine

Folder = Callable[..., Path]
DBRX_ATTENTION = {"kv_n_heads": 2, "attn_pdrop": 0.5, "rope_theta": 1e4, "clip_qkv": 8.0}
DBRX_EXPERTS = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.5}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def refused(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_weights_under_other_names_are_refused(folder: Folder, tokenizer: PreTrainedTokenizerBase, prefix: str) -> None:
    """They would be random: a wrapper's prefix is all that a training run of tens of hours may leave of its model."""
    path = folder()
    rewrite(path, lambda weights: {f"{prefix}{name}": x for name, x in weights.items()})
    assert f"{prefix}lm_head.weight" in refused(path, tokenizer)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_weight_is_refused(folder: Folder, tokenizer: PreTrainedTokenizerBase, lost: str) -> None:
    path = folder()
    rewrite(path, lambda weights: {name: x for name, x in weights.items() if name != lost})
    assert f"such as {lost};" in refused(path, tokenizer)


def test_weights_of_another_shape_are_refused(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "layers.0.mlp.down_proj.weight has [32, 64], not [32, 48]" in refused(path, tokenizer)


@pytest.mark.parametrize("more", ["q_proj.bias", "q_proj.lora_A.weight", "q_proj.weight_scale_inv"])
@pytest.mark.parametrize("prefix", ["model.", ""])  # the second is that of files without a head
def test_what_would_change_a_layer_and_has_no_place_in_it_is_refused(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, more: str, prefix: str
) -> None:
    path = folder(tie_word_embeddings=True)
    name = f"{prefix}layers.1.self_attn.{more}"
    rewrite(path, lambda w: {n.replace("model.", prefix): x for n, x in w.items()} | {name: torch.ones(32)})
    assert f"its files hold {name}, " in refused(path, tokenizer)


def test_what_else_has_no_place_is_said(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, without the report of transformers."""
    path = folder()
    rewrite(path, lambda weights: weights | {"score.weight": torch.ones(2, 32)})
    load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    said = f"model.path={path}: 1 weights of its files are not the model's, such as score.weight"
    assert "".join(capfd.readouterr()).split("\n") == [said, ""]


def test_a_head_of_its_own_in_files_of_a_tied_model_is_refused(
    folder: Folder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """transformers would train that head, and an engine would tie it and sample from another model."""
    path = folder(tie_word_embeddings=True)
    rewrite(path, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    assert "config.json ties lm_head.weight" in refused(path, tokenizer)


def test_old_buffers_and_a_tied_head_are_not_missed(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    rewrite(path, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder: Folder, tokenizer: PreTrainedTokenizerBase, bad: float) -> None:
    """One that no probe would show: of a token which is in no prompt."""
    path = folder()

    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.embed_tokens.weight"][0, 3] = bad
        return weights

    rewrite(path, spoil)
    with pytest.raises(ConfigError, match=r"weight model\.embed_tokens\.weight holds NaN or infinity"):
        choose_route(load_model(ModelConfig(path=str(path)), tokenizer, seed=0))


def test_more_tokens_than_embeddings_are_refused(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder(vocab_size=len(tokenizer) - 2)
    assert f"{len(tokenizer)} tokens and the model embeddings for {len(tokenizer) - 2}" in refused(path, tokenizer)
    shutil.rmtree(path)
    path = folder(vocab_size=len(tokenizer) + 64)  # padded to a round number, as most are
    load_model(ModelConfig(path=str(path)), tokenizer, seed=0)


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "weights as a git-lfs pointer": lambda p: (p / "model.safetensors").write_text(LFS),
    "tokenizer as a git-lfs pointer": lambda p: (p / "tokenizer.json").write_text(LFS),
    "weights cut short": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:900]),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "config.json is a list": lambda p: (p / "config.json").write_text("[]"),
    "config.json cut short": lambda p: (p / "config.json").write_text('{"model_type": "lla'),
    "no model type": lambda p: (p / "config.json").write_text("{}"),
    "an unknown model type": lambda p: (p / "config.json").write_text('{"model_type": "gpt17"}'),
    "an activation that does not exist": lambda p: _edit(p / "config.json", hidden_act="gelu_of_tomorrow"),
    "a head size that is no number": lambda p: _edit(p / "config.json", num_attention_heads="two"),
    "tokenizer.json cut short": lambda p: (p / "tokenizer.json").write_text('{"version": "1.0", "mod'),
    "tokenizer.json of another kind": lambda p: (p / "tokenizer.json").write_text('{"model": {"type": "Magic"}}'),
    "an unknown tokenizer class": lambda p: (
        (p / "tokenizer.json").unlink(),
        _edit(p / "tokenizer_config.json", tokenizer_class="MagicTokenizer"),
    ),
    "weights in pickles": lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
    "adapters": lambda p: (p / "adapter_config.json").write_text("{}"),
    "a shard that is not there": lambda p: (
        (p / "model.safetensors").rename(p / "model-00001-of-00002.safetensors"),
        (p / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'
        ),
    ),
    "quantized weights": lambda p: _edit(p / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "no causal language model": lambda p: (p / "config.json").write_text('{"model_type": "t5"}'),
    "generation config cut short": lambda p: (p / FILE).write_text('{"eos_token_id": 1'),
    "an end token in words": lambda p: (p / FILE).write_text('{"eos_token_id": "</s>"}'),
    "end tokens in lists": lambda p: (p / FILE).write_text('{"eos_token_id": [[1]]}'),
    "an end token that is true": lambda p: (p / FILE).write_text('{"eos_token_id": true}'),
    "a generation config that cannot be read": lambda p: ((p / FILE).unlink(), (p / FILE).mkdir()),
    "code of its own": lambda p: _edit(p / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
}


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_whatever_a_folder_makes_transformers_raise_is_one_line(
    folder: Folder, breakage: str, countdown: Countdown
) -> None:
    path = folder()
    BREAKAGES[breakage](path)
    config = ModelConfig(path=str(path))
    with pytest.raises(ConfigError) as error:
        load_model(config, load_tokenizer(config, countdown), seed=0)
    assert "\n" not in str(error.value) and f"model.path={path}" in str(error.value)
    if "pointer" in breakage:
        assert "git lfs pull" in str(error.value)


def test_a_path_that_is_no_folder_is_one_line(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    assert "this is a file" in refused(folder() / "config.json", tokenizer)
    for path, why in (("~nobody_such/model", "home directory"), ("/" + "x" * 5000, "File name too long")):
        with pytest.raises(ConfigError, match=why):
            load_shape(path)


def test_end_tokens_without_embedding_are_dropped(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Some folders have -1, or one of another tokenizer. A folder without a generation config has its config's."""
    path, end = folder(), tokenizer.eos_token_id
    config = ModelConfig(path=str(path))
    for given, left in (([end, 3, -1, 9999], {end, 3}), (-1, {end}), ([], {end}), (None, {end}), (3, {end, 3})):
        (path / FILE).write_text(json.dumps({"eos_token_id": given}))
        assert end_ids(config, tokenizer) == left
        assert TransformersEngine(load_model(config, tokenizer, seed=0), tokenizer).eos_ids == tuple(sorted(left))
    (path / FILE).unlink()
    _edit(path / "config.json", eos_token_id=[3, 4])
    assert end_ids(config, tokenizer) == {end, 3, 4}


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1},
        {"do_sample": False, "top_k": 5, "min_p": 0.1, "eos_token_id": [1, 2]},
        {"num_beams": 1, "num_return_sequences": 4, "do_sample": False, "eos_token_id": 1},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 1},
        {"do_sample": True, "temperature": float("nan"), "pad_token_id": "none", "eos_token_id": 1},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1},
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any], tmp_path: Path
) -> None:
    """The first save of a run would refuse it, after all the steps before; what is valid stays."""
    path = folder()
    (path / "generation_config.json").write_text(json.dumps(generation))
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    checkpoint.check_saves(tmp_path / "trial", model, tokenizer)
    saved = checkpoint.save(tmp_path, 1, model, tokenizer, make_optimizer(model, _optim()), {"step": 1})
    kept = GenerationConfig.from_pretrained(saved / "model")
    assert kept.eos_token_id == generation["eos_token_id"]
    assert "NaN" not in (saved / "model" / FILE).read_text()
    if "top_p" in generation and generation["do_sample"]:
        assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.9)


def _optim() -> Any:
    from gapg.config_sections import OptimConfig

    return OptimConfig(lr=1e-3)


def test_what_cannot_be_saved_is_known_before_the_first_step(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(path=str(folder())), tokenizer, seed=0)
    broken = AutoTokenizer.from_pretrained(tmp_path / "model")
    broken.init_kwargs["made_of"] = object()
    with pytest.raises(ConfigError, match="no checkpoint could be written: TypeError"):
        checkpoint.check_saves(tmp_path / "run", model, broken)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GPT2Config, {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3, "n_positions": 64}),
        (OPTConfig, {"dropout": 0.3, "layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        (DbrxConfig, {"d_model": 32, "attn_config": DBRX_ATTENTION, "ffn_config": DBRX_EXPERTS}),
    ],
)
def test_what_is_trained_is_what_sampled(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, kind: Any, settings: dict[str, Any]
) -> None:
    """No dropout, no dropped layers, no noise in a router: in training mode twice the same."""
    path = folder(kind, **settings)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert model.training
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_a_config_asks_to_return_does_not_matter(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder()
    _edit(path / "config.json", return_dict=False, output_attentions=True, output_hidden_states=True)
    assert choose_route(load_model(ModelConfig(path=str(path)), tokenizer, seed=0))


@pytest.mark.parametrize(
    "name_and_factor", [("lm_head", 1e30), ("model.layers.0.mlp.down_proj", 1e30), ("model.norm", 0.0)]
)
def test_a_model_that_overflows_or_is_nothing_is_refused_for_that(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, name_and_factor: tuple[str, float]
) -> None:
    name, factor = name_and_factor
    path = folder()
    rewrite(path, lambda weights: weights | {f"{name}.weight": weights[f"{name}.weight"] * factor})
    with pytest.raises(ConfigError, match=r"overflow float32, or are all 0, so the file is damaged"):
        choose_route(load_model(ModelConfig(path=str(path)), tokenizer, seed=0))


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_of_fewer_layers_than_its_files_is_refused(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, layers: int
) -> None:
    path = folder()
    _edit(path / "config.json", num_hidden_layers=layers)
    assert f"its files hold model.layers.{layers}." in refused(path, tokenizer)


def test_the_hub_is_asked_once_for_a_model(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start looks at a model's config half a dozen times. What one of them makes of it is not the others'."""
    revision = tmp_path / "hub" / "models--who--once" / "snapshots" / "abc"
    revision.parent.mkdir(parents=True)
    folder().rename(revision)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("abc")
    for where in ("huggingface_hub", "transformers.utils.hub"):
        monkeypatch.setattr(f"{where}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shape, ends = load_shape("who/once"), generation_config("who/once").eos_token_id
    layers, shape.num_hidden_layers = shape.num_hidden_layers, 99
    for file in revision.iterdir():
        file.unlink()
    assert load_shape("who/once").num_hidden_layers == layers
    assert generation_config("who/once").eos_token_id == ends
