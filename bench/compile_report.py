"""Compile every kernel for sm_90 without a GPU and write what the machine code is made of.

    python bench/compile_report.py     # triton-<version>.json

The figures are read from ptxas and the disassembly: registers, shared memory, spills, how many programs one
multiprocessor holds, whether ptxas had to serialize the tensor cores' work, counts of the instructions that matter
(HGMMA: tensor cores; UTMALDG/UTMASTG: TMA; LDL/STL: local memory; ATOM/RED: atomics; MUFU: exponentials), and how many
instructions a thread spends on the end of a tile. Each triton makes code of its own, so it has a file of its own;
"sources" there are hashes of the kernels they are of.
Run it in its own process with TRITON_INTERPRET unset: an interpreted kernel has no machine code. Another triton than
the installed one: `pip install --no-deps --target FOLDER triton==3.6.0`, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import record
from gapg_kernels import cublas_odds, odds_gemm, policy_loss_kernel, row_kernels
from gapg_kernels.policy_loss import STATS

SHARED, RESERVED = 228 << 10, 1 << 10
"""Bytes of shared memory of a multiprocessor of sm_90, and those of them that each program on it takes unasked."""

REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32
"""What a multiprocessor has of registers, and the most warps and programs on it."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is launched: argument types by name, constants, arguments that are multiples of 16, launch
    options. ``gemm``: on tensor cores."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    multiples: list[str]
    options: dict[str, int]
    gemm: bool


TYPES = {
    "target_ptr": "*i64", "logit_ptr": "*fp32", "partial_ptr": "*fp32", "moment_ptr": "*fp32", "out_ptr": "*fp32",
    "logprob_ptr": "*fp32", "odds_ptr": "*fp32", "unit_ptr": "*fp32", "entropy_ptr": "*fp32", "logits_ptr": "*fp32",
    "C": "i32", "V": "i32", "H": "i32", "blocks": "i32", "pitch": "i32", "logits_pitch": "i32", "e_pitch": "i32",
    "scale": "fp32",
}  # fmt: skip
"""Argument types that no variant changes."""


def kernels() -> Iterator[Kernel]:
    """Every kernel, in every configuration of its table and with every optional argument, as the host launches it."""
    yield from gemms()
    bf16 = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "e_ptr": "*bf16"}
    fp32 = dict.fromkeys(bf16, "*fp32")
    sizes = {"BR": row_kernels.TARGET_ROWS, "BK": row_kernels.TARGET_K}
    yield as_launched("target_logit", row_kernels.target_logit_kernel, bf16, sizes)
    yield as_launched("target_logit_float32", row_kernels.target_logit_kernel, fp32, sizes, absent=["bias_ptr"])
    sizes = {"BR": row_kernels.SUM_ROWS, "BB": row_kernels.SUM_BLOCKS}
    yield as_launched("row_sum", row_kernels.row_sum_kernel, {}, sizes, absent=["moment_ptr", "entropy_ptr"])
    yield as_launched("row_sum_entropy", row_kernels.row_sum_kernel, {}, sizes)
    sizes = {"BV": row_kernels.REPAIR_V, "BK": row_kernels.REPAIR_K}
    yield as_launched("repair", row_kernels.repair_kernel, bf16, sizes, absent=["bias_ptr", "e_ptr", "entropy_ptr"])
    yield as_launched("repair_store_entropy_bias", row_kernels.repair_kernel, bf16, sizes)
    yield as_launched(
        "repair_float32_store", row_kernels.repair_kernel, fp32, sizes, absent=["bias_ptr", "entropy_ptr"]
    )
    sizes, warps = {"BLOCK": cublas_odds.BLOCK}, cublas_odds.WARPS
    kernel = cublas_odds.odds_pass_kernel
    yield as_launched("odds_pass", kernel, bf16, sizes, warps, absent=["e_ptr", "bias_ptr", "moment_ptr"])
    yield as_launched("odds_pass_store", kernel, bf16, sizes, warps, absent=["bias_ptr", "moment_ptr"])
    yield as_launched("odds_pass_store_entropy_bias", kernel, bf16, sizes, warps)
    yield as_launched("odds_pass_float32_store", kernel, fp32, sizes, warps, absent=["bias_ptr", "moment_ptr"])
    yield from policy_losses()


def gemms() -> Iterator[Kernel]:
    """The GEMM for each tile, with and without E, entropy and bias; for one row, which triton makes a constant; and for
    a V that 16 does not divide, where every load of a bias, here the widest, is masked by itself."""
    function = odds_gemm.odds_gemm_kernel
    optional = {"store": "e_desc", "entropy": "moment_ptr", "bias": "bias_ptr"}
    for name, tile in odds_gemm.TILES.items():
        sizes = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group}
        types = {
            "hidden_desc": f"tensordesc<bf16[{tile.bm}, {tile.bk}]>",
            "weight_desc": f"tensordesc<bf16[{tile.bn}, {tile.bk}]>",
            "e_desc": f"tensordesc<bf16[{tile.bm}, {tile.bn // 2}]>",
            "bias_ptr": "*bf16",
        }
        launch = functools.partial(as_launched, function=function, types=types, warps=tile.warps, stages=tile.stages)
        for chosen in itertools.product((False, True), repeat=len(optional)):
            present = [option for option, on in zip(optional, chosen, strict=True) if on]
            absent = [argument for option, argument in optional.items() if option not in present]
            kernel = "_".join(["odds_gemm", name, *present])
            yield launch(kernel, constants=sizes, absent=absent, gemm=True)
        one_row = f"odds_gemm_{name}_store_one_row"
        yield launch(one_row, constants=sizes | {"C": 1}, absent=["bias_ptr", "moment_ptr"], gemm=True)
        odd = f"odds_gemm_{name}_store_bias_float32_odd_vocab"
        wide = types | {"bias_ptr": "*fp32"}
        yield launch(odd, types=wide, constants=sizes, absent=["moment_ptr"], gemm=True, odd_vocab=True)


def policy_losses() -> Iterator[Kernel]:
    """The policy loss with every option and with none, and the launch that adds its statistics."""
    source = policy_loss_kernel
    function = source.policy_loss_kernel
    types = {name: "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    types |= {"group_ptr": "*i64", "sample_ptr": "*i64", "mask_ptr": "*i1", "denominator": "fp32"}
    types |= dict.fromkeys(("T", "P", "G"), "i32") | dict.fromkeys(("least", "most", "tis_cap", "kl_coef"), "fp32")
    sizes = {"PITCH": source.PITCH, "BR": source.ROWS, "BG": source.tile_samples(8)}
    optional = ["mask_ptr", "coefficient_ptr", "old_ptr", "rollout_ptr", "reference_ptr", "entropy_ptr"]
    optional += ["least", "most", "tis_cap", "kl_coef"]
    yield as_launched("policy_loss", function, types, sizes | {"GRPO": False, "K2": False}, absent=optional)
    yield as_launched("policy_loss_every_option", function, types, sizes | {"GRPO": True, "K2": True})
    sizes = {"STATS": len(STATS), "PITCH": source.PITCH, "BN": source.PROGRAMS}
    types = {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "N": "i32"}
    yield as_launched("add_statistics", source.add_statistics_kernel, types, sizes)


def as_launched(
    name: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3, *,
    absent: Sequence[str] = (), gemm: bool = False, odd_vocab: bool = False,
) -> Kernel:  # fmt: skip
    """A kernel with what Triton's launcher would find out about its arguments."""
    constants = constants | dict.fromkeys(absent)
    types = TYPES | types
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in function.arg_names}
    # What the launcher would find out: pointers come from the allocator, 16-byte aligned; H is a multiple of 16, and in
    # nearly every model V, pitches with it. C is any number of rows; a multiple would save the GEMM one instruction.
    sizes = ("H",) if odd_vocab else ("H", "V")
    known = [x for x, kind in signature.items() if kind.startswith("*") or x in sizes or x.endswith("pitch")]
    multiples = [x for x in known if x not in function.do_not_specialize]
    return Kernel(name, function, signature, constants, multiples, {"num_warps": warps, "num_stages": stages}, gemm)


def compile_figures(kernel: Kernel) -> dict[str, int | bool | None]:
    """Compile for sm_90, assemble, disassemble and count; by the names that the record has."""
    attrs = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.signature) if x in kernel.multiples}
    source = ASTSource(kernel.function, kernel.signature, kernel.constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        log = _run("ptxas", "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(cubin))
        sass = _run("cuobjdump", "-sass", str(cubin))
    code = [
        Instruction(int(address, 16), bool(predicate), operation, operands)
        for address, predicate, operation, operands in re.findall(
            r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", sass, re.MULTILINE
        )
    ]
    operations = Counter(instruction.operation for instruction in code)

    def count(pattern: str) -> int:
        return sum(n for operation, n in operations.items() if re.match(pattern, operation))

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas did not report {pattern!r} for {kernel.name}:\n{log}")
        return int(found[1])

    registers, shared = reported(r"Used (\d+) registers"), compiled.metadata.shared
    return {
        "registers": registers,
        "shared_bytes": shared,
        "programs_per_multiprocessor": _programs(registers, shared, kernel.options["num_warps"]),
        "stack_bytes": reported(r"(\d+) bytes stack frame"),
        "spill_store_bytes": reported(r"(\d+) bytes spill stores"),
        "spill_load_bytes": reported(r"(\d+) bytes spill loads"),
        "hgmma": count("HGMMA"),
        "hgmma_in_loop": _in_loops(code, "HGMMA"),
        "wgmma_serialized": "wgmma.mma_async instructions are serialized" in log,
        "exponentials": count("MUFU.EX2"),
        "tma_loads": count("UTMALDG"),
        "tma_stores": count("UTMASTG"),
        "local_memory": count(r"(LDL|STL)\b"),
        # ATOM.EXCH and ATOM.CAS do no arithmetic; triton uses them to publish descriptors.
        "arithmetic_atomics": count(r"(ATOM|ATOMG|ATOMS)\.(?!EXCH|CAS)") + count(r"U?RED\b(?!UX)"),
        "instructions": sum(operations.values()),
        "epilogue_instructions": _epilogue(code) if kernel.gemm else None,
    }


class Instruction(NamedTuple):
    """One line of the disassembly. ``predicated``: a predicate decides whether it takes effect."""

    address: int
    predicated: bool
    operation: str
    operands: str

    @property
    def target(self) -> int:
        """Where a branch goes; -1 for what is no branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.operation.startswith("BRA") else None
        return -1 if found is None else int(found[1], 16)


def _programs(registers: int, shared: int, warps: int) -> int:
    """Programs that run on one multiprocessor at the same time. A warp's registers come in units of 8 a thread, from
    one of its four quarters."""
    by_registers = 4 * (REGISTERS // 4 // (32 * 8 * -(-registers // 8))) // warps
    return min(by_registers, SHARED // (shared + RESERVED), WARPS // warps, PROGRAMS)


def _in_loops(code: list[Instruction], prefix: str) -> int:
    """How many instructions that begin with ``prefix`` lie between a backward branch and its target."""
    back = [x for x in code if 0 <= x.target < x.address]
    return sum(any(b.target <= x.address < b.address for b in back) for x in code if x.operation.startswith(prefix))


def _epilogue(code: list[Instruction]) -> int | None:
    """Instructions a thread issues at the end of a tile with no target in it and no end of V, the predicated included.

    They are what the first branch after the last HGMMA skips in every other round of the loop, less what branches
    among them skip: the selects of the other tiles. All exponentials are among them. None where the code has another
    shape than that.
    """
    last = max(x.address for x in code if x.operation.startswith("HGMMA"))
    skip = next(x for x in code if x.address > last and x.target >= 0)
    ending = [x for x in code if skip.address < x.address < skip.target]
    branches = [x for x in ending if x.target >= 0]
    if not (ending and skip.predicated and all(x.predicated and x.address < x.target <= skip.target for x in branches)):
        return None
    run = [x for x in ending if not any(b.address < x.address < b.target for b in branches)]
    exponentials = [sum(x.operation == "MUFU.EX2" for x in part) for part in (code, run)]
    return len(run) if exponentials[0] == exponentials[1] else None


def sources() -> dict[str, str]:
    """A hash of every triton function's text, by name, and one of all that is compiled of them. Figures with other
    hashes are of other kernels."""
    modules = (odds_gemm, cublas_odds, row_kernels, policy_loss_kernel)
    functions = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    launches = [[x.name, x.signature, x.constants, x.multiples, x.options] for x in kernels()]
    texts = {f"{x.__module__}.{x.__name__}": x.src for x in functions} | {"launches": json.dumps(launches)}
    return {name: hashlib.sha256(texts[name].encode()).hexdigest()[:16] for name in sorted(texts)}


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    path = record.parser(__doc__, "sass").parse_args().output / f"triton-{triton.__version__}.json"
    figures: dict[str, dict[str, Any]] = {"sources": sources()}
    for kernel in kernels():
        figures[kernel.name] = compile_figures(kernel)
        print(kernel.name, *(f"{key}={value}" for key, value in figures[kernel.name].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
