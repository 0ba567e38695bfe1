"""The counted traffic of a layer is what its operators read and write, and less of it with bfloat16 parameters."""

from pathlib import Path

import torch
from transformers import Qwen2Config

import record
import update_plan
from gapg.model import attention

attention.register()
SMALL = Qwen2Config(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def test_views_and_products_move_nothing_and_a_cast_its_two_sides() -> None:
    x = torch.ones(4, 8)
    with update_plan._Traffic() as traffic:
        _ = x.t() @ x
        y = x.view(8, 4)
        z = y.bfloat16()
        z.mul_(2)
    assert traffic.operators == 2
    assert traffic.bytes == 32 * (4 + 2) + 2 * 32 * 2


def test_bfloat16_parameters_move_fewer_bytes(tmp_path: Path) -> None:
    rows = update_plan.layer_rows("small", SMALL)
    record.write("update_plan", rows, tmp_path / "plan.json")
    found = {(row["impl"], row["metric"]): row["median"] for row in record.read(tmp_path / "plan.json")["rows"]}
    for metric in ("operators", "bytes moved"):
        wide, rounded = (found[f"{kind} parameters", metric] for kind in ("float32", "bfloat16"))
        assert 0.6 * wide < rounded < 0.95 * wide, metric
    assert "| small | bfloat16 parameters |" in update_plan.tables(rows)
