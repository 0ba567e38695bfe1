"""The table of architectures: what is committed holds, and a handful of rows are measured again."""

import copy
from typing import Any

import pytest
import torch
import transformers

import architectures
import record
from architecture_zoo import ZOO
from architectures import fault

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
        "gemma2",
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
