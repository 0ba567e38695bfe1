"""Run the policy loss's Triton kernels through the interpreter, or compile them, and save what comes out.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_policy_loss results.pt   # what the kernels return
    PYTHONPATH=bench python -m tests.kernels.interpreted_policy_loss figures.json   # their machine code for sm_90

A script of its own, because the variable must be set, or not, before triton is first imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.kernels.policy_loss_oracle import DENOMINATOR, cases, edges, part


def interpreted(path: Path) -> None:
    from gapg_kernels.policy_loss_kernel import fused_row_losses

    results = {}
    for name, (rows, options) in cases().items():
        results[name] = fused_row_losses(rows, DENOMINATOR, options)._asdict()
    for name, (rows, options) in edges().items():
        last = fused_row_losses(part(rows, slice(-3, None)), DENOMINATOR, options)
        results[f"last rows of {name}"] = last._asdict()
    torch.save(results, path)


def compiled(path: Path) -> None:
    """Figures of every kind of launch, the sizes of 1 that triton makes constants included."""
    from compile_report import as_launched, compile_figures
    from gapg_kernels import policy_loss_kernel as source

    pointers = {name: "*fp32" for name in source.policy_loss_kernel.arg_names if name.endswith("_ptr")}
    types = pointers | {"group_ptr": "*i64", "sample_ptr": "*i64", "mask_ptr": "*i1", "denominator": "fp32"}
    types |= dict.fromkeys(("T", "P", "G"), "i32") | dict.fromkeys(("least", "most", "tis_cap", "kl_coef"), "fp32")
    optional = (
        "mask_ptr", "coefficient_ptr", "old_ptr", "rollout_ptr", "reference_ptr", "entropy_ptr", "advantage_ptr",
        "least", "most", "tis_cap", "kl_coef",
    )  # fmt: skip
    figures = {}

    def add(name: str, function: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
        figures[name] = compile_figures(as_launched(name, function, types, constants))

    for grpo, absent, samples in [(True, False, 8), (False, True, 8), (False, False, 2), (True, False, 64)]:
        constants = {"GRPO": grpo, "K2": grpo, "PITCH": source.PITCH, "BR": source.ROWS}
        constants |= {"BG": source.tile_samples(samples)} | (dict.fromkeys(optional) if absent else {})
        add(f"policy_loss {grpo} {absent} {samples}", source.policy_loss_kernel, types, constants)
    ones = {"GRPO": True, "K2": False, "PITCH": source.PITCH, "BR": source.ROWS, "BG": 1, "T": 1, "P": 1, "G": 1}
    add("policy_loss of ones", source.policy_loss_kernel, types, ones)
    other = types | {"rewards_ptr": "*fp64", "group_ptr": "*i32", "sample_ptr": "*i32"}
    add("policy_loss of other types", source.policy_loss_kernel, other, constants)
    sizes = {"STATS": len(source.STATS), "PITCH": source.PITCH, "BN": source.PROGRAMS}
    sums = {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "N": "i32"}
    add("add_statistics", source.add_statistics_kernel, sums, sizes)
    add("add_statistics of one", source.add_statistics_kernel, sums, sizes | {"N": 1})
    path.write_text(json.dumps(figures))


if __name__ == "__main__":
    (interpreted if os.environ.get("TRITON_INTERPRET") == "1" else compiled)(Path(sys.argv[1]))
