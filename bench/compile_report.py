"""Compile every kernel for sm_90 without a GPU and write what the machine code is made of.

    python bench/compile_report.py            # writes bench/results/sass/<kernel>.json

The figures are read from ptxas and the disassembly: registers, shared memory, spills, and counts of the instructions
that matter (HGMMA: tensor cores; UTMALDG/UTMASTG: TMA; LDL/STL: local memory; ATOM/RED: atomics).
Run it in its own process with TRITON_INTERPRET unset: an interpreted kernel has no machine code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gapg.kernels import odds_gemm

SHARED_LIMIT = 232_448
"""Bytes of shared memory one block may use on sm_90."""

RESULTS = Path(__file__).parent / "results" / "sass"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is launched: argument types by name, constants, launch options. ``gemm``: expects HGMMA."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    gemm: bool


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one kernel."""

    kernel: str
    triton: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    hgmma: int
    tma_loads: int
    tma_stores: int
    local_memory: int
    arithmetic_atomics: int
    instructions: int


def kernels() -> Iterator[Kernel]:
    """Every kernel in every configuration of the table, as the host code launches it on bfloat16 inputs."""
    common = {"bias_ptr": "constexpr", "target_ptr": "*i64", "logit_ptr": "*fp32", "C": "i32", "V": "i32", "H": "i32"}
    for store, tile in odds_gemm.TILES.items():
        for bias in (False, True):
            name = "odds_gemm" + ("_store" if store else "") + ("_bias" if bias else "")
            part = tile.bn // tile.split
            types = common | {
                "hidden_desc": f"tensordesc<bf16[{tile.bm}, {tile.bk}]>",
                "weight_desc": f"tensordesc<bf16[{tile.bn}, {tile.bk}]>",
                "e_desc": f"tensordesc<bf16[{tile.bm}, {part}]>" if store else "constexpr",
                "bias_ptr": "*bf16" if bias else "constexpr",
                "partial_ptr": "*fp32",
                "scale": "fp32",
            }
            sizes = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "SPLIT": tile.split}
            yield _kernel(name, odds_gemm.odds_gemm_kernel, types, sizes, tile.warps, tile.stages, gemm=True)
    rows = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16"} | common
    outputs = {"logprob_ptr": "*fp32", "odds_ptr": "*fp32", "unit_ptr": "*fp32"}
    sizes = {"BR": odds_gemm.TARGET_ROWS, "BK": odds_gemm.TARGET_K}
    yield _kernel("target_logit", odds_gemm.target_logit_kernel, rows | {"out_ptr": "*fp32"}, sizes)
    types = common | outputs | {"partial_ptr": "*fp32", "tiles": "i32"}
    yield _kernel("row_sum", odds_gemm.row_sum_kernel, types, {"BR": odds_gemm.SUM_ROWS})
    types = rows | outputs | {"e_ptr": "*bf16", "pitch": "i32", "scale": "fp32"}
    yield _kernel("repair", odds_gemm.repair_kernel, types, {"BV": odds_gemm.REPAIR_V, "BK": odds_gemm.REPAIR_K})


def _kernel(
    name: str, function: Any, types: dict[str, str], sizes: dict[str, int], warps: int = 4, stages: int = 3, *,
    gemm: bool = False,
) -> Kernel:  # fmt: skip
    signature = {arg: "constexpr" if arg in sizes else types[arg] for arg in function.arg_names}
    constants = sizes | {arg: None for arg, kind in signature.items() if kind == "constexpr" and arg not in sizes}
    return Kernel(name, function, signature, constants, {"num_warps": warps, "num_stages": stages}, gemm)


def compile_figures(kernel: Kernel) -> Figures:
    """Compile for sm_90, assemble, disassemble and count."""
    # Pointers come from the allocator, 16-byte aligned, and H is a multiple of 16: what the launcher would find out.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kernel.signature.items())
        if kind.startswith("*") or name in ("H", "pitch")
    }
    source = ASTSource(kernel.function, kernel.signature, kernel.constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        log = _run("ptxas", "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(cubin))
        sass = _run("cuobjdump", "-sass", str(cubin))
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(n for operation, n in operations.items() if re.match(pattern, operation))

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas did not report {pattern!r} for {kernel.name}:\n{log}")
        return int(found[1])

    return Figures(
        kernel=kernel.name,
        triton=triton.__version__,
        registers=reported(r"Used (\d+) registers"),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=reported(r"(\d+) bytes stack frame"),
        spill_store_bytes=reported(r"(\d+) bytes spill stores"),
        spill_load_bytes=reported(r"(\d+) bytes spill loads"),
        hgmma=count("HGMMA"),
        tma_loads=count("UTMALDG"),
        tma_stores=count("UTMASTG"),
        local_memory=count(r"(LDL|STL)\b"),
        # ATOM.EXCH and ATOM.CAS do no arithmetic; triton uses them to publish descriptors.
        arithmetic_atomics=count(r"(ATOM|ATOMG|ATOMS)\.(?!EXCH|CAS)") + count(r"U?RED\b(?!UX)"),
        instructions=sum(operations.values()),
    )


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    """Write one JSON file a kernel into bench/results/sass (or the folder given as the only argument)."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in kernels():
        figures = asdict(compile_figures(kernel))
        (folder / f"{kernel.name}.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(" ".join(f"{key}={value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
