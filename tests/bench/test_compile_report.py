"""How the machine code's figures are read; what they are is in tests/kernels/test_odds_gemm.py."""

from __future__ import annotations

import pytest

from compile_report import CARDS, HOPPER, TENSOR_CORES, Instruction, _epilogue, _in_loops, _programs
from gapg_kernels.tiles import TILES


def listing(*lines: str) -> list[Instruction]:
    """One instruction a line, 16 bytes each: ["@P"] OPERATION [line it branches to]."""
    found = []
    for i, line in enumerate(lines):
        words = line.split()
        predicated = words[0] == "@P"
        operation, *where = words[predicated:]
        operands = f" {16 * int(where[0]):#x} " if where else ""
        found.append(Instruction(16 * i, predicated, operation, operands))
    return found


LOOP = [
    "MOV", "HGMMA", "HGMMA", "@P BRA 11",  # 11: where a step that ends no tile goes on
    "FADD", "MUFU.EX2", "@P BRA 9", "ISETP", "SEL", "MUFU.EX2", "@P STG",
    "UIADD3", "@P BRA 0", "EXIT",
]  # fmt: skip


def changed(line: int, text: str) -> list[Instruction]:
    return listing(*LOOP[:line], text, *LOOP[line + 1 :])


def test_the_epilogue_is_what_other_steps_skip_less_what_it_skips_itself() -> None:
    assert _epilogue(listing(*LOOP)) == 5  # FADD, EX2, the branch, EX2, STG; not the selects
    assert _epilogue(changed(6, "MOV")) == 7
    assert _in_loops(listing(*LOOP), TENSOR_CORES) == 2
    assert _in_loops(changed(12, "@P BRA 2"), TENSOR_CORES) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (3, "BRA 11"),  # skipped by every step
        (3, "@P BRA 0"),  # backwards: another loop
        (6, "@P BRA 4"),  # a loop in the epilogue
        (6, "@P BRA 13"),  # out of it
        (6, "BRA 9"),
        (8, "MUFU.EX2"),  # an exponential that some tiles leave out
    ],
)
def test_code_of_another_shape_has_no_count(line: int, text: str) -> None:
    assert _epilogue(changed(line, text)) is None


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (255, 115_224, 4, 2),
        (255, 115_712, 4, 2),  # 228 KiB with the 1 KiB that each takes unasked
        (255, 115_713, 4, 1),
        (255, 0, 8, 1),
        (129, 0, 8, 1),  # 136 a thread, so three warps a quarter
        (128, 0, 8, 2),
        (32, 0, 4, 16),
        (16, 0, 1, 32),
    ],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert _programs(CARDS[HOPPER], registers, shared, warps) == programs


def test_a_smaller_card_holds_fewer_programs() -> None:
    assert CARDS.keys() == TILES.keys()
    assert _programs(CARDS[8, 6], 255, 101_376, 8) == 1
    assert _programs(CARDS[8, 6], 255, 101_377, 8) == 0
    assert [_programs(CARDS[card], 16, 0, 1) for card in ((8, 6), (8, 9), (8, 0))] == [16, 24, 32]
