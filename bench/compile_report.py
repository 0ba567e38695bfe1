"""Compile every kernel for every card of `gapg_kernels.tiles` without a GPU; write what the machine code is made of.

    python bench/compile_report.py     # triton-<version>.json

The figures are read from ptxas and the disassembly: registers, shared memory, spills, how many programs one
multiprocessor holds, whether ptxas had to serialize the tensor cores' work, counts of the instructions that matter
(HGMMA, HMMA, UTCHMMA: tensor cores of sm_90, of sm_80 to 89 and 120, and of sm_100; UTMALDG/UTMASTG: TMA; LDGSTS:
cp.async; LDL/STL: local memory; ATOM/RED: atomics; MUFU: exponentials), and, for sm_90, how many instructions a thread
spends on the end of a tile. For sm_90 all kernels are compiled with their options and without, for the other cards the
largest variants, whose names begin with the card's. Each triton makes code of its own, so it has a file of its own;
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import record
from gapg_kernels import cublas_odds, elementwise, entropy_gradient, odds_gemm, policy_loss_kernel, repair, row_kernels
from gapg_kernels.policy_loss import STATS
from gapg_kernels.tiles import TILES, Capability, Tile, part_of


class Card(NamedTuple):
    """What one multiprocessor holds at a time: bytes of shared memory, warps and programs."""

    shared: int
    warps: int
    programs: int


CARDS: dict[Capability, Card] = {
    (8, 0): Card(164 << 10, 64, 32),
    (8, 6): Card(100 << 10, 48, 16),
    (8, 9): Card(100 << 10, 48, 24),
    (9, 0): Card(228 << 10, 64, 32),
    (10, 0): Card(228 << 10, 64, 32),
    (12, 0): Card(100 << 10, 48, 24),
}
"""The CUDA programming guide's table of compute capabilities."""

HOPPER: Capability = (9, 0)
RESERVED = 1 << 10
"""Bytes of a multiprocessor's shared memory that each program on it takes unasked. One program may have the rest."""

REGISTERS = 65_536
"""What a multiprocessor of any of them has."""

TENSOR_CORES = r"HGMMA|HMMA|UTCHMMA"

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
    capability: Capability


TYPES = {
    "target_ptr": "*i64", "logit_ptr": "*fp32", "slope_ptr": "*fp32", "partial_ptr": "*fp32", "moment_ptr": "*fp32",
    "out_ptr": "*fp32", "logprob_ptr": "*fp32", "odds_ptr": "*fp32", "unit_ptr": "*fp32", "entropy_ptr": "*fp32",
    "logits_ptr": "*fp32", "C": "i32", "V": "i32", "H": "i32", "blocks": "i32", "pitch": "i32", "logits_pitch": "i32",
    "e_pitch": "i32", "out_pitch": "i32", "scale": "fp32", "cap": "fp32", "far_ptr": "*i32", "largest_ptr": "*fp32",
    "top_ptr": "*fp32", "spans": "i32", "width": "i32", "c_ptr": "*fp32", "k_ptr": "*fp32", "total_ptr": "*fp32",
    "own_ptr": "*fp32",
}  # fmt: skip
"""Argument types that no variant changes."""


def kernels() -> Iterator[Kernel]:
    """Every kernel, in every configuration of its table and with every optional argument, as the host launches it; for
    the cards beside sm_90 the largest variant of each, the GEMM's also without a softcap and for an odd V."""
    largest = [(True, True, True, False), (True,) * 4]
    without = [(*chosen, False) for chosen in itertools.product((False, True), repeat=3)]
    yield from gemms(HOPPER, [*without, (False, False, False, True), (True, False, False, True), (True,) * 4])
    yield from odd_vocabularies(HOPPER)
    yield from row_launches(HOPPER)
    for capability in sorted(TILES.keys() - {HOPPER}):
        yield from gemms(capability, largest)
        yield from odd_vocabularies(capability)
        yield from (kernel for kernel in row_launches(capability) if kernel.name.partition(" ")[2] in EVERYTHING)


def gemms(capability: Capability, variants: Sequence[Sequence[bool]]) -> Iterator[Kernel]:
    """The GEMM for each tile of a card, with or without E, entropy, bias and softcap."""
    optional = {"store": "e", "entropy": "moment_ptr", "bias": "bias_ptr", "softcap": "cap"}
    for (name, tile), chosen in itertools.product(TILES[capability].items(), variants):
        present = [option for option, on in zip(optional, chosen, strict=True) if on]
        absent = [argument for option, argument in optional.items() if option not in present]
        yield gemm(["odds_gemm", name, *present], tile, capability, absent)


def odd_vocabularies(capability: Capability) -> Iterator[Kernel]:
    """The GEMM for a V that 16 does not divide, where every load of a bias, here the widest, is masked by itself."""
    for name, tile in TILES[capability].items():
        words = ["odds_gemm", name, "store_bias_float32_odd_vocab"]
        yield gemm(words, tile, capability, ["moment_ptr", "cap"], bias="*fp32", odd_vocab=True)


def gemm(
    words: list[str],
    tile: Tile,
    capability: Capability,
    absent: list[str],
    bias: str = "*bf16",
    odd_vocab: bool = False,
) -> Kernel:
    """One variant of it."""
    part = part_of(tile, None if "cap" in absent else 1.0)
    blocks = {"hidden": (tile.bm, tile.bk), "weight": (tile.bn, tile.bk), "e": (tile.bm, part)}
    types = {x: f"tensordesc<bf16[{m}, {n}]>" if tile.tma else "*bf16" for x, (m, n) in blocks.items()}
    sizes = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "PART": part, "TMA": tile.tma}
    return as_launched(
        "_".join(words), odds_gemm.odds_gemm_kernel, types | {"bias_ptr": bias}, sizes, tile.warps, tile.stages,
        absent=absent, gemm=True, odd_vocab=odd_vocab, capability=capability,
    )  # fmt: skip


EVERYTHING = {
    "target_logit_softcap", "row_sum_entropy", "odds_pass_store_entropy_bias_softcap", "policy_loss_every_option",
    "add_statistics", "which_rows", "repair_finish_entropy", "repair_sums_entropy_bias_softcap",
    "repair_store_bias_softcap", "repair_sums_float32_entropy_bias_softcap", "repair_store_float32_bias_softcap",
    "spread_entropy",
}  # fmt: skip
"""The largest variants of the launches over rows."""


def row_launches(capability: Capability) -> Iterator[Kernel]:
    """The launches over rows, and the pass over logits."""
    launch = functools.partial(as_launched, capability=capability)
    bf16 = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "e_ptr": "*bf16"}
    fp32 = dict.fromkeys(bf16, "*fp32")
    sizes, function = {"BR": row_kernels.TARGET_ROWS, "BK": row_kernels.TARGET_K}, row_kernels.target_logit_kernel
    yield launch("target_logit", function, bf16, sizes, absent=["slope_ptr", "cap"])
    yield launch("target_logit_softcap", function, bf16, sizes)
    yield launch("target_logit_float32", function, fp32, sizes, absent=["bias_ptr", "slope_ptr", "cap"])
    sizes, function = {"BR": row_kernels.SUM_ROWS, "BB": row_kernels.SUM_BLOCKS}, row_kernels.row_sum_kernel
    yield launch("row_sum", function, {}, sizes, absent=["moment_ptr", "entropy_ptr"])
    yield launch("row_sum_entropy", function, {}, sizes)
    sizes, warps, function = {"BLOCK": cublas_odds.BLOCK}, cublas_odds.WARPS, cublas_odds.odds_pass_kernel
    yield launch("odds_pass", function, bf16, sizes, warps, absent=["e_ptr", "bias_ptr", "moment_ptr", "cap"])
    yield launch("odds_pass_store", function, bf16, sizes, warps, absent=["bias_ptr", "moment_ptr", "cap"])
    yield launch("odds_pass_store_entropy_bias", function, bf16, sizes, warps, absent=["cap"])
    yield launch("odds_pass_store_entropy_bias_softcap", function, bf16, sizes, warps)
    yield launch("odds_pass_float32_store", function, fp32, sizes, warps, absent=["bias_ptr", "moment_ptr", "cap"])
    yield from repairs(launch, bf16, fp32)
    yield from policy_losses(launch)


def repairs(launch: Callable[..., Kernel], bf16: dict[str, str], fp32: dict[str, str]) -> Iterator[Kernel]:
    """The repair of far rows, and the pass that makes the entropy's gradient of E."""
    yield launch("which_rows", repair.which_rows_kernel, {}, {"BC": repair.WHICH_ROWS})
    sizes, function = {"BR": repair.FINISH_ROWS, "BS": repair.SPANS}, repair.repair_finish_kernel
    yield launch("repair_finish", function, {}, sizes, absent=["moment_ptr", "entropy_ptr"])
    yield launch("repair_finish_entropy", function, {}, sizes)
    sums, store = repair.repair_sums_kernel, repair.repair_store_kernel
    for kind, types in (("", bf16), ("_float32", fp32)):
        tile = repair.TILES[torch.float32 if kind else torch.bfloat16]
        last = ({"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}, tile.warps, tile.stages)
        yield launch(f"repair_sums{kind}", sums, types, *last, absent=["bias_ptr", "moment_ptr", "cap"])
        yield launch(f"repair_sums{kind}_entropy_bias_softcap", sums, types, *last)
        yield launch(f"repair_store{kind}", store, types, *last, absent=["bias_ptr", "cap"])
        yield launch(f"repair_store{kind}_bias_softcap", store, types, *last)
    spread = {"BLOCK": entropy_gradient.BLOCK, "CERTAIN": entropy_gradient.CERTAIN}
    for name, kind in (("spread_entropy", "*bf16"), ("spread_entropy_float32", "*fp32")):
        types = {"e_ptr": kind, "out_ptr": kind}
        yield launch(name, entropy_gradient.spread_entropy_kernel, types, spread, entropy_gradient.WARPS)


def policy_losses(launch: Callable[..., Kernel]) -> Iterator[Kernel]:
    """The policy loss with every option and with none, and the launch that adds its statistics."""
    source = policy_loss_kernel
    function = source.policy_loss_kernel
    types = {name: "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    types |= {"group_ptr": "*i64", "sample_ptr": "*i64", "mask_ptr": "*i1", "denominator": "fp32"}
    types |= dict.fromkeys(("T", "P", "G"), "i32") | dict.fromkeys(("least", "most", "tis_cap", "kl_coef"), "fp32")
    sizes = {"PITCH": source.PITCH, "BR": source.ROWS, "BG": source.tile_samples(8)}
    optional = ["mask_ptr", "coefficient_ptr", "old_ptr", "rollout_ptr", "reference_ptr", "entropy_ptr"]
    optional += ["advantage_ptr", "least", "most", "tis_cap", "kl_coef"]
    yield launch("policy_loss", function, types, sizes | {"GRPO": False, "K2": False}, absent=optional)
    yield launch("policy_loss_every_option", function, types, sizes | {"GRPO": True, "K2": True})
    sizes = {"STATS": len(STATS), "PITCH": source.PITCH, "BN": source.PROGRAMS}
    types = {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "N": "i32"}
    yield launch("add_statistics", source.add_statistics_kernel, types, sizes)


def as_launched(
    name: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3, *,
    absent: Sequence[str] = (), gemm: bool = False, odd_vocab: bool = False, capability: Capability = HOPPER,
) -> Kernel:  # fmt: skip
    """A kernel with what Triton's launcher would find out about its arguments."""
    constants = constants | dict.fromkeys(absent)
    types = TYPES | types
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in function.arg_names}
    # What the launcher would find out: pointers come from the allocator, 16-byte aligned; H is a multiple of 16, and in
    # nearly every model V, pitches with it. C is any number of rows.
    sizes = ("H",) if odd_vocab else ("H", "V")
    known = [x for x, kind in signature.items() if kind.startswith("*") or x in sizes or x.endswith("pitch")]
    multiples = [x for x in known if x not in function.do_not_specialize]
    options = {"num_warps": warps, "num_stages": stages}
    if capability != HOPPER:
        name = f"sm_{capability[0]}{capability[1]} {name}"
    return Kernel(name, function, signature, constants, multiples, options, gemm, capability)


def compile_figures(kernel: Kernel) -> dict[str, int | bool | None]:
    """Compile for its card, assemble, disassemble and count; by the names that the record has."""
    major, minor = kernel.capability
    arch = (
        f"sm_{major}{minor}{'a' if major >= 9 else ''}"  # a: with what only that architecture has, TMA and tensor cores
    )
    assembler = "ptxas-blackwell" if major >= 10 else "ptxas"  # as triton chooses
    attrs = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.signature) if x in kernel.multiples}
    source = ASTSource(kernel.function, kernel.signature, kernel.constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=kernel.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        log = _run(assembler, "-v", f"--gpu-name={arch}", str(ptx), "-o", str(cubin))
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
        "programs_per_multiprocessor": _programs(
            CARDS[kernel.capability], registers, shared, kernel.options["num_warps"]
        ),
        "stack_bytes": reported(r"(\d+) bytes stack frame"),
        "spill_store_bytes": reported(r"(\d+) bytes spill stores"),
        "spill_load_bytes": reported(r"(\d+) bytes spill loads"),
        "tensor_core": count(TENSOR_CORES),
        "tensor_core_in_loop": _in_loops(code, TENSOR_CORES),
        "wgmma_serialized": "wgmma.mma_async instructions are serialized" in log,
        "exponentials": count("MUFU.EX2"),
        "tma_loads": count("UTMALDG"),
        "tma_stores": count("UTMASTG"),
        "async_copies": count("LDGSTS"),
        "local_memory": count(r"(LDL|STL)\b"),
        # EXCH, CAS, OR and AND do no arithmetic: by them triton publishes descriptors, and sm_100 hands out its tensor
        # cores' memory.
        "arithmetic_atomics": count(r"(ATOM|ATOMG|ATOMS)\.(?!EXCH|CAS|OR|AND)") + count(r"U?RED\b(?!UX)"),
        "instructions": sum(operations.values()),
        "epilogue_instructions": _epilogue(code) if kernel.gemm and kernel.capability == HOPPER else None,
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


def _programs(card: Card, registers: int, shared: int, warps: int) -> int:
    """Programs that run on one multiprocessor at the same time. A warp's registers come in units of 8 a thread, from
    one of its four quarters."""
    by_registers = 4 * (REGISTERS // 4 // (32 * 8 * -(-registers // 8))) // warps
    return min(by_registers, card.shared // (shared + RESERVED), card.warps // warps, card.programs)


def _in_loops(code: list[Instruction], pattern: str) -> int:
    """How many instructions of this kind lie between a backward branch and its target."""
    back = [x for x in code if 0 <= x.target < x.address]
    found = [x for x in code if re.match(pattern, x.operation)]
    return sum(any(b.target <= x.address < b.address for b in back) for x in found)


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
    modules = (odds_gemm, elementwise, cublas_odds, row_kernels, repair, entropy_gradient, policy_loss_kernel)
    functions = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    launches = [[x.name, x.signature, x.constants, x.multiples, x.options, x.capability] for x in kernels()]
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
        print(kernel.name, *(f"{key}={value}" for key, value in figures[kernel.name].items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in figures.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
