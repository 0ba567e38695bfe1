"""The table of architectures: what is committed holds, and a handful of rows are measured again."""

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

import architectures
import record
from architecture_zoo import ZOO, random_model, settings
from architectures import fault
from gapg.errors import ConfigError
from gapg.model.folder import set_plain

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def committed() -> dict[str, Rows]:
    return architectures.by_case(record.read(architectures.RESULTS)["rows"])


def test_no_committed_row_is_wrong(committed: dict[str, Rows]) -> None:
    assert {name: fault(of) for name, of in committed.items() if fault(of)} == {}
    assert sorted(committed) == sorted(ZOO), "python bench/architectures.py measures all again"
    assert len({settings.get("model_type", name) for name, settings in ZOO.items()}) >= 50
    routes = [architectures.route_of(of) for of in committed.values()]
    assert {"packed", "padded", "refused"} <= set(routes)


def test_the_page_shows_what_is_committed() -> None:
    begin, end = architectures.MARKERS
    text = architectures.table(record.read(architectures.RESULTS))
    page = (record.ROOT / "docs" / "architectures.md").read_text()
    assert f"{begin}\n{text}\n{end}" in page, "python bench/architectures.py --table docs/architectures.md"


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "opt",
        "lfm2",
        "qwen3_5",
        "granitemoehybrid",
        "mamba2",
        "bloom",
        "gemma2 (softcaps of 2)",
        "nanochat",
        "phimoe",
        "gpt_oss",
        "deepseek_v32",
        "mistral (window of 16)",
        "llama4_text (chunk of 16)",
        "phi3 (longrope over 16)",
    ],
)
def test_a_row_is_as_committed(name: str, committed: dict[str, Rows]) -> None:
    transformers.logging.set_verbosity_error()
    rows = architectures.measure(name)
    (of,) = architectures.by_case(rows).values()
    assert fault(of) is None
    assert of.keys() == committed[name].keys()
    for impl, then in committed[name].items():
        now = of[impl]
        assert [now.get(key) for key in ("route", "attention")] == [then.get(key) for key in ("route", "attention")]
        assert ("error" in now) == ("error" in then)
        for figure in then.keys() & {"median", "gradient"}:
            assert now[figure] == pytest.approx(then[figure], rel=0.05, abs=1e-5)


def test_a_wrong_decision_is_a_fault(committed: dict[str, Rows]) -> None:
    def changed(name: str, impl: str, **values: Any) -> str | None:
        of = copy.deepcopy(committed[name])
        of[impl].update(values)
        return fault(of)

    assert changed("lfm2", "joined", route="packed") is not None
    assert changed("llama", "joined", route="padded") == "padded, but packing is exact"
    assert changed("llama", "shared", median=2e-4) is not None
    assert changed("lfm2", "padded", gradient=2e-4) is not None
    assert changed("llama", "packed", error="ValueError") is not None
    assert changed("llama", "joined", median=1e-3) is not None
    assert changed("llama", "joined") is None


def test_a_gradient_on_one_side_only_counts() -> None:
    ours = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0])}
    truth = {"a": torch.tensor([3.0, 4.0])}
    assert architectures.gradient_difference(ours, truth) == pytest.approx(1.0)
    assert architectures.gradient_difference(truth, {**truth, "c": torch.tensor([12.0])}) == pytest.approx(12 / 13)


def make_noisy(config: PreTrainedConfig) -> None:
    """Every dropout, dropped layer and jitter of a config and its parts, on."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            make_noisy(value)
        elif type(value) in (int, float) and re.search("drop|jitter|noise|stochastic", key):
            setattr(config, key, type(value)(0.5) or 1)


@torch.no_grad()
def noise_of(name: str) -> str | None:
    """What is wrong, if anything, with a model in training mode whose config had all noise on; "" for none to see."""
    ids = torch.arange(3, 23)[None]
    noisy = settings(name)
    make_noisy(noisy)
    plain = copy.deepcopy(noisy)
    set_plain(plain)
    model = random_model(plain, "eager").train()
    trained, again = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    evaluated = model.eval()(input_ids=ids, use_cache=False).logits
    if not torch.equal(trained, again):
        return "training mode is random"
    if not torch.equal(trained, evaluated):
        return "training mode is not evaluation mode"
    try:
        given = random_model(noisy, "eager")
    except ValueError:  # DiffLlama's refuses dropout itself
        return ""
    if not torch.equal(evaluated, given.eval()(input_ids=ids, use_cache=False).logits):
        return "evaluation mode is not that of the model given"
    return "" if torch.equal(evaluated, given.train()(input_ids=ids, use_cache=False).logits) else None


def test_what_is_trained_is_what_sampled_in_every_architecture() -> None:
    """In training mode the same twice, the same as in evaluation mode, and that of the model as it was given."""
    transformers.logging.set_verbosity_error()
    found = {name: noise_of(name) for name in ZOO if name not in ("phimoe", *repeated())}
    assert {name: fault for name, fault in found.items() if fault} == {}
    assert sum(fault is None for fault in found.values()) > 100, "with their noise on, these are another function"
    with pytest.raises(ConfigError, match="phimoe: in training mode its routers draw experts at random"):
        set_plain(settings("phimoe"))


def repeated() -> set[str]:
    """Other settings of an architecture, or its text part, bring no other noise."""
    return {name for name in ZOO if " (" in name or f"{name}_text" in ZOO}
