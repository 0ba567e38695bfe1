"""Which groups a step learns from: exact fractions, the rules of D1 and D2, and a draw that only the seed decides."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.config_sections import BudgetConfig
from gapg.filtering import select
from gapg.judge import Group, Outcome
from gapg.tasks.base import Prompt
from gapg_rollout.records import Completion

RIGHT, CALL, MISSED, WRONG, FAILED = (
    Outcome.LOCAL_CORRECT,
    Outcome.CLOUD_CORRECT,
    Outcome.CLOUD_WRONG,
    Outcome.LOCAL_WRONG,
    Outcome.UNKNOWN,
)


def group(name: str, outcomes: tuple[Outcome, ...], score: float | None, *, unknown: bool = False) -> Group:
    return Group(
        Prompt(name, name, "", "toy"),
        tuple(Completion((1,), (0.0,), "", "stop") for _ in outcomes),
        outcomes,
        (True,) * len(outcomes),
        oracle_score=score,
        unknown=unknown,
    )


def of_kind(kind: str, name: str) -> Group:
    """D1, D2 with and without a call, a problem nobody solves, and a group the oracle failed."""
    return {
        "d1": lambda: group(name, (WRONG, RIGHT), None),
        "d1 called": lambda: group(name, (CALL, RIGHT), 1.0),
        "d1 cloud wrong": lambda: group(name, (MISSED, RIGHT), 0.0),
        "d2": lambda: group(name, (WRONG, CALL), 1.0),
        "d2 never called": lambda: group(name, (WRONG, WRONG), 0.5),
        "unsolved": lambda: group(name, (WRONG, MISSED), 0.4),
        "unsolved, not asked": lambda: group(name, (WRONG, WRONG), None),
        "unknown": lambda: group(name, (WRONG, FAILED), None, unknown=True),
        "unknown but right": lambda: group(name, (RIGHT, FAILED), None, unknown=True),
    }[kind]()


KINDS = ("d1", "d1 called", "d1 cloud wrong", "d2", "d2 never called", "unsolved", "unsolved, not asked", "unknown")
batches = st.lists(st.sampled_from([*KINDS, "unknown but right"]), max_size=40).map(
    lambda kinds: [(kind, of_kind(kind, f"p{i}")) for i, kind in enumerate(kinds)]
)
rhos = st.one_of(st.none(), st.fractions(0, 3, max_denominator=20))


@given(batches, rhos, st.integers(0, 2**32))
def test_the_rules(batch: list[tuple[str, Group]], rho: Fraction | None, seed: int) -> None:
    groups = [g for _, g in batch]
    selection = select(groups, rho, random.Random(seed))

    def ids(*prefixes: str) -> list[str]:
        return [g.prompt.id for kind, g in batch if kind.startswith(prefixes)]

    d1, d2, kept = ids("d1"), ids("d2"), [g.prompt.id for g in selection.kept]
    assert (selection.d1, selection.d2) == (len(d1), len(d2))
    assert (selection.unsolved, selection.unknown) == (len(ids("unsolved")), len(ids("unknown")))
    assert selection.d1 + selection.d2 + selection.unsolved + selection.unknown == len(groups)
    assert kept == sorted(kept, key=lambda name: int(name[1:])), "in the order of the groups"
    assert not set(kept) & set(ids("unknown"))
    if rho is None:
        assert kept == [g.prompt.id for kind, g in batch if not kind.startswith("unknown")]
    else:
        quota = len(d1) * rho.numerator // rho.denominator  # integers: no rounding anywhere
        assert set(d1) <= set(kept) <= set(d1) | set(d2)
        assert len(kept) == len(d1) + min(len(d2), quota) == len(d1) + selection.d2_kept


@given(batches, rhos, st.integers(0, 2**32))
def test_only_the_seed_decides(batch: list[tuple[str, Group]], rho: Fraction | None, seed: int) -> None:
    groups = [g for _, g in batch]
    assert select(groups, rho, random.Random(seed)) == select(groups, rho, random.Random(seed))


def test_every_prompt_of_d2_has_the_same_chance() -> None:
    groups = [of_kind("d1", "p0"), of_kind("d1", "p1"), *(of_kind("d2", f"p{i}") for i in range(2, 7))]
    drawn = [g.prompt.id for seed in range(2000) for g in select(groups, Fraction(1), random.Random(seed)).kept[2:]]
    counts = [drawn.count(f"p{i}") for i in range(2, 7)]
    assert sum(counts) == 4000
    assert sum((c - 800) ** 2 / 480 for c in counts) < 25  # about chi-square(4): p = 5e-5


@pytest.mark.parametrize(
    ("fraction", "rho", "d1", "kept"),
    [
        (0.3, Fraction(3, 7), 7, 3),
        (0.6, Fraction(3, 2), 2, 3),  # 0.6 / 0.4 in floats is 1.4999999999999998 and would keep 2
        (0.1, Fraction(1, 9), 9, 1),
        (0.5, Fraction(1), 4, 4),
        (0.9, Fraction(9), 1, 9),
    ],
)
def test_rho_is_exact(fraction: float, rho: Fraction, d1: int, kept: int) -> None:
    assert BudgetConfig(cloud_fraction=fraction).exact_rho == rho
    groups = [of_kind("d1", f"p{i}") for i in range(d1)] + [of_kind("d2", f"q{i}") for i in range(12)]
    assert select(groups, rho, random.Random(0)).d2_kept == kept


def test_rho_may_be_given() -> None:
    assert BudgetConfig(cloud_fraction=0.3, rho=0.1).exact_rho == Fraction(1, 10)


def test_nothing_solved_keeps_nothing() -> None:
    groups = [of_kind("d2", "p0"), of_kind("unsolved", "p1")]
    assert select(groups, Fraction(3, 7), random.Random(0)).kept == []
    assert select([], Fraction(3, 7), random.Random(0)).kept == []
