"""DA-GRPO as a reward: the same advantages as two advantages of which one is weighed, and a multiplier that climbs."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapg.config import load_config
from gapg.judge import Group, Outcome
from gapg.judge import rewards as hierarchical
from gapg.tasks.base import Prompt
from gapg_kernels.policy_loss import group_advantages
from gapg_rollout.records import Completion
from studies.da_grpo import Multiplier, make_multiplier, rewards

LC, CC, CW, LW = Outcome.LOCAL_CORRECT, Outcome.CLOUD_CORRECT, Outcome.CLOUD_WRONG, Outcome.LOCAL_WRONG


def group(*outcomes: Outcome, score: float | None = None, unknown: bool = False) -> Group:
    completions = tuple(Completion((1,), (-1.0,), "", "stop") for _ in outcomes)
    return Group(Prompt("p", "", "", ""), completions, outcomes, (True,) * len(outcomes), score, unknown=unknown)


def test_right_less_the_price_of_calling() -> None:
    assert rewards(group(LC, CC, LW, score=1.0), 1.0, 0.75) == [1.0, 0.75, 0.0]
    assert rewards(group(LC, CW, LW, score=0.0), 1.0, 0.75) == [1.0, -0.25, 0.0]
    # three of four answers of the cloud are right
    assert rewards(group(CC, LW, score=0.75), 1.0, 0.5) == [0.25, 0.0]
    with pytest.raises(ValueError, match="oracle failed"):
        rewards(group(Outcome.UNKNOWN, LW, unknown=True), 1.0, 0.5)


@given(
    kinds=st.lists(st.sampled_from(["local right", "local wrong", "call"]), min_size=2, max_size=8),
    cloud=st.sampled_from([0.0, 1.0]),
    multiplier=st.floats(0, 2),
)
def test_its_advantage_is_the_two_advantages(kinds: list[str], cloud: float, multiplier: float) -> None:
    outcome = {"local right": LC, "local wrong": LW, "call": CC if cloud else CW}
    g = group(*(outcome[k] for k in kinds), score=cloud)
    right = torch.tensor([[float(o in (LC, CC)) for o in g.outcomes]], dtype=torch.float64)
    called = torch.tensor([[float(o in (CC, CW)) for o in g.outcomes]], dtype=torch.float64)
    two = group_advantages(right, "gapg") - multiplier * group_advantages(called, "gapg")
    one = group_advantages(torch.tensor([rewards(g, 1.0, 1.0 - multiplier)], dtype=torch.float64), "gapg")
    torch.testing.assert_close(one, two)


@given(st.lists(st.sampled_from([LC, CC, LW]), min_size=2, max_size=8), st.floats(0, 0.99))
def test_where_the_cloud_is_right_it_is_gapg(outcomes: list[Outcome], alpha_c: float) -> None:
    g = group(*outcomes, score=1.0)
    assert rewards(g, 1.0, alpha_c) == pytest.approx(hierarchical(g, 1.0, alpha_c))


def test_the_multiplier_starts_at_the_configs_price_and_follows_the_calls() -> None:
    config = load_config("quickstart")
    law = make_multiplier(config)
    assert law.alpha_c == config.reward.alpha_c == 0.4
    law.observe(0.8, 0.1, 1.0)
    assert law.alpha_c == pytest.approx(0.4 - 0.01 * 0.5)
    law.observe(0.0, 0.1, 1.0)
    assert law.alpha_c == pytest.approx(0.4 - 0.01 * 0.5 + 0.01 * 0.3)
    # its fields are its state
    assert replace(make_multiplier(config), **asdict(law)) == law


def test_the_multiplier_is_never_negative_and_has_no_ceiling() -> None:
    law = Multiplier(cloud_fraction=0.5, alpha_a=1.0, alpha_c=0.999)
    law.observe(0.0, 1.0, 1.0)
    assert law.alpha_c == 1.0
    for _ in range(300):
        law.observe(1.0, 0.0, 1.0)
    assert law.alpha_c == pytest.approx(1.0 - 300 * 0.01 * 0.5)
