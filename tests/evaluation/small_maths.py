"""A small run on maths problems in few words, for the tests of `gapg eval --suite`."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from gapg.config import RunConfig, load_config
from gapg.tasks.vocabulary import word_tokenizer


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(numbers: range, sign: str) -> list[dict[str, str]]:
    """GSM8K's columns; two answers of three are 5."""
    return [{"question": f"What is {n} {sign} {n} ?", "answer": f"It is\n#### {5 if n % 3 else 7}"} for n in numbers]


def make_config(folder: Path) -> RunConfig:
    """Of a run on such data, in `folder/config.yaml`, with a model for their words."""
    tokenizer = word_tokenizer(["What", "It", "is", "+", "-", "*", "=", "?", *map(str, range(60))])
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "data" / "train.jsonl", *sums(range(40), "+"))
    write(folder / "data" / "test.jsonl", *sums(range(40, 60), "+"))
    data = {"train": {"path": str(folder / "data"), "answer_pattern": "#### (.+)"}, "heldout": {"split": "test"}}
    tree = {
        "output_dir": str(folder / "run"),
        "steps": 0,
        "task": {"name": "maths", "args": data},
        "model": {"path": str(folder / "model")},
        "warm_start": {"steps": 40, "batch_size": 16, "optim": {"lr": 1e-2}},
        "rollout": {"max_prompt_tokens": 900, "max_new_tokens": 12},
        "oracle": {"kind": "solver", "accuracy": 0.5},
        "eval": {"heldout": 0, "problems": 4, "every": 0},
        "tensorboard": False,
        "threads": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(str(folder / "config.yaml"))
