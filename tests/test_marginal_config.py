"""What `method: marginal` cannot do is refused, in one line that names the key and the fix."""

from __future__ import annotations

import pytest

from gapg.config import RunConfig, load_config
from gapg.errors import ConfigError


def marginal(**overrides: str) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("quickstart", {"method": "marginal", **changed})


REFUSED = [
    ({"loss__epochs": "2"}, ["method=marginal", "loss.epochs", "set 1", "method=gapg"]),
    ({"loss__epochs": "2", "loss__clip": "[0.2, 0.2]"}, ["method=marginal", "loss.epochs"]),
    ({"loss__kl_coef": "0.1"}, ["method=marginal", "loss.kl_coef", "set 0"]),
    ({"loss__aggregation": "token_mean"}, ["method=marginal", "loss.aggregation", "leave it out"]),
    ({"loss__entropy": "true"}, ["method=marginal", "loss.entropy", "set false"]),
    ({"reward__function": "my.module:rewards"}, ["method=marginal", "reward.function", "leave it out"]),
    ({"reward__alpha_f": "0.2"}, ["method=marginal", "reward.alpha_f", "set 0"]),
    ({"budget__rho": "0.5"}, ["method=marginal", "budget.rho", "leave it out"]),
    ({"budget__gain": "0.1"}, ["method=marginal", "budget.gain", "leave it out"]),
    ({"budget__damping": "0"}, ["method=marginal", "budget.damping", "leave it out"]),
    ({"marginal__prices": "[0.5, 0.5]", "marginal__score": "brier"}, ["marginal.prices", "[0.5, 0.5]", "[0, 1]"]),
    ({"marginal__prices": "[0.8, 0.2]", "marginal__score": "brier"}, ["marginal.prices", "[0.8, 0.2]"]),
    ({"marginal__prices": "[0.2, 1.5]", "marginal__score": "brier"}, ["marginal.prices", "1.5", "less than or equal"]),
    ({"marginal__prices": "[0.2, 0.8]"}, ["marginal.prices", "score=brier", "leave it out", "score=log"]),
    ({"marginal__prices": "[0.2, 0.8]", "marginal__score": "price"}, ["marginal.prices", "score=price"]),
    ({"marginal__cloud": "ask"}, ["marginal.cloud=ask", "marginal.score=brier", "marginal.cloud=ignore"]),
    ({"marginal__cloud": "cached"}, ["marginal.cloud=cached", "marginal.score=brier", "marginal.cloud=ignore"]),
    ({"marginal__cloud": "sometimes"}, ["marginal.cloud", "sometimes", "ignore", "cached", "ask"]),
    ({"marginal__score": "crps"}, ["marginal.score", "crps", "log", "brier", "price"]),
    ({"marginal__weight": "0", "marginal__trace": "[0, 0]"}, ["marginal.weight=0", "marginal.trace=[0, 0]"]),
    ({"marginal__weight": "-1"}, ["marginal.weight", "-1", "greater than or equal to 0"]),
    ({"marginal__weight": "inf"}, ["marginal.weight", "inf"]),
    ({"marginal__trace": "[1, -1]"}, ["marginal.trace", "-1"]),
    ({"marginal__trace": "2"}, ["marginal.trace", "2"]),
    ({"method": "marginl"}, ["method", "marginl", "gapg", "marginal"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_it_is_refused(overrides: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        marginal(**overrides)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_it_can_do_is_taken() -> None:
    """What is refused above is refused for what is odd in it, and gapg keeps its options."""
    assert marginal().marginal.trace_worth == (1.0, 0.5)
    assert marginal(marginal__score="brier").marginal.trace_worth == (1.0, 0.0)
    assert marginal(marginal__trace="[0, 1]").marginal.trace_worth == (0.0, 1.0)
    assert marginal(marginal__score="brier", marginal__prices="[0.2, 0.8]", marginal__cloud="ask")
    assert marginal(marginal__score="price", marginal__cloud="cached", loss__tis_cap="2", loss__advantage="grpo")
    assert marginal(marginal__weight="0")
    for overrides, words in REFUSED:
        if words[0] == "method=marginal" and "reward__function" not in overrides:
            assert marginal(**overrides, method="gapg").method == "gapg"
