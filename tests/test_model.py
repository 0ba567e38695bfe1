"""A model folder is this model, whole, or refused in one line; and what a run needs of it is known at its start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DbrxConfig,
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedTokenizerBase,
)

from gapg import checkpoint, tracking
from gapg.cli import main
from gapg.config import ConfigError, ModelConfig, RunConfig
from gapg.model import end_ids, load_model, load_tokenizer
from gapg.model_folder import FILE, load_shape
from gapg.optim import make_optimizer
from gapg.parts import check_run, fitting_prompts, make_task, render
from gapg.policy import choose_route
from gapg.rollout.transformers_engine import TransformersEngine
from gapg.tasks.countdown import Countdown
from gapg.tracking import read_jsonl

Folder = Callable[..., Path]
DBRX_ATTENTION = {"kv_n_heads": 2, "attn_pdrop": 0.5, "rope_theta": 1e4, "clip_qkv": 8.0}
DBRX_EXPERTS = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.5}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Folder:
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
    monkeypatch.setattr(tracking, "_SAID", set())


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
    from gapg.config import OptimConfig

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
        (PhimoeConfig, {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5}),
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


# --- what hangs on the longest sequence ------------------------------------------------------------------------------


def test_learned_positions_end(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder(GPT2Config, max_position_embeddings=40)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert choose_route(model, longest=40)
    with pytest.raises(ConfigError, match=r"= 41 tokens, and this gpt2 model has positions for 40: lower one"):
        choose_route(model, longest=41)


def test_opts_positions_end_too(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its table is a module of another name, with two rows more."""
    path = folder(OPTConfig, max_position_embeddings=24, ffn_dim=64, word_embed_proj_dim=32)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert choose_route(model, longest=24)
    with pytest.raises(ConfigError, match="this opt model has positions for 24"):
        choose_route(model, longest=48)


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


@pytest.mark.usefixtures("nothing_said")
def test_rotary_positions_go_on(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(ModelConfig(path=str(folder(max_position_embeddings=48))), tokenizer, seed=0)
    assert choose_route(model, longest=49)
    assert "= 49 tokens, and this llama model was made for 48" in capsys.readouterr().err


@pytest.mark.parametrize(("longest", "packed"), [(16, True), (17, False), (64, False)])
def test_a_window_shorter_than_the_longest_sequence_is_padded(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, longest: int, packed: bool
) -> None:
    """Whose own attention then cuts it, as the policy samples."""
    path = folder(MistralConfig, sliding_window=16)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert choose_route(model, longest=longest) is packed
    if not packed:
        with pytest.raises(ConfigError, match=r"^update\.pack=true: .* window of 16.*; set update\.pack=auto"):
            choose_route(model, True, longest)


@pytest.mark.parametrize("pack", ["auto", False])
@pytest.mark.usefixtures("nothing_said")
def test_it_says_once_why_it_pads(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], pack: Any
) -> None:
    model = load_model(
        ModelConfig(path=str(folder(Lfm2Config, layer_types=["conv", "full_attention"]))), tokenizer, seed=0
    )
    assert choose_route(model, pack) is False
    assert choose_route(model, pack) is False
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "pad their sequences" in line]
    assert ("layers carry state along a row" if pack else "update.pack=false") in said


def test_vllms_own_limit_is_known_before_it_starts(
    folder: Folder, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = {"model__path": str(folder()), "rollout__engine": "vllm", "compare": "false"}
    config = small_config(tmp_path, **settings, rollout__max_prompt_tokens="24", rollout__max_new_tokens="41")
    task = make_task(config)
    with pytest.raises(ConfigError, match=r"= 65 tokens, and vLLM takes no more than the model's 64 positions"):
        check_run(config, task, load_tokenizer(config.model, task))
    config = small_config(tmp_path, **settings, rollout__vllm_args="{max_model_len: 20}")
    with pytest.raises(ConfigError, match=r"max_model_len=20 is below .* leave it out"):
        check_run(config, task, load_tokenizer(config.model, task))


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), AttributeError("no such thing"), TypeError()])
def test_a_task_that_cannot_render_is_one_line(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, small_config: Callable[..., RunConfig], tmp_path: Path,
    error: Exception, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def render(*_: object) -> list[int]:
        raise error

    monkeypatch.setattr(countdown, "render", render, raising=True)
    with pytest.raises(ConfigError, match=f"cannot be rendered: {type(error).__name__}") as refusal:
        fitting_prompts(small_config(tmp_path), countdown, tokenizer, "train")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "ids", [[], None, "abc", [1.5], [-1], [[1, 2]], {"input_ids": [1]}, torch.tensor([1]), [torch.tensor(1)]]
)
def test_a_task_that_renders_something_else_is_one_line(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(countdown, "render", lambda *_: ids)
    with pytest.raises(ConfigError, match=r"render\(\) of prompt .* returned .*, not a list of one token id or more"):
        render(countdown, countdown.prompts("train")[0], tokenizer)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_said")
def test_a_whole_run_of_a_hybrid(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LFM2: warm start, three steps on padded rows, a resume with the same bits, an evaluation."""
    options = [
        *("--model.path", str(folder(Lfm2Config, layer_types=["conv", "full_attention"]))),
        *(
            "--task.args",
            "{max_number: 4, max_target: 12}",
            "--warm-start.steps",
            "150",
            "--warm-start.batch-size",
            "16",
        ),
        *("--rollout.prompts-per-step", "6", "--rollout.samples-per-prompt", "4", "--budget.filter", "false"),
        *("--rollout.max-prompt-tokens", "24", "--rollout.max-new-tokens", "30", "--eval.every", "0"),
        *("--steps", "3", "--checkpoint-every", "1", "--keep-checkpoints", "3", "--eval.problems", "4"),
        *("--eval.heldout", "4", "--compare", "false", "--tensorboard", "false", "--threads", "1"),
    ]
    run, again = tmp_path / "run", tmp_path / "again"
    main(["train", "quickstart", *options, "--output-dir", str(run)])
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["grad_norm"] > 0 and row["groups/with_gradient"] and row["logprob_gap"] < 1e-4
        assert row["tokens/saved_padding"] == row["sharing/on"] == 0 and row["tokens/computed"] > 0
    shutil.copytree(run, again, symlinks=True)
    for step in (2, 3):
        shutil.rmtree(again / f"checkpoints/step-{step}")
    main(["train", "quickstart", *options, "--output-dir", str(again), "--resume"])
    name = "checkpoints/step-3/model/model.safetensors"
    want, got = load_file(run / name), load_file(again / name)
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    main(["eval", str(again)])
    summary = json.loads((again / "eval/step-3/summary.json").read_text())
    assert [row["n"] for row in summary["rows"]] == [4, 4]
    assert capsys.readouterr().err.count("updates pad their sequences") == 1
