"""The head in verl's place: verl's arguments, verl's formula, and the call that puts it there.

verl 0.9.1 asks for an older transformers than this repository, so it is not among the requirements. SOURCE and CALLS
are what its wheel says. The tests that read and run verl itself do so where it is found, and skip elsewhere:

    pip download --no-deps verl==0.9.1 -d V && unzip -q V/*.whl -d V
    PYTHONPATH=V pytest tests/integrations/test_verl.py
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gapg.integrations import verl
from tests.kernels.float64_entropy import entropies
from tests.kernels.float64_oracle import ENTROPIES, inputs_at, truth

SOURCE = """
class LinearCrossEntropy(torch.autograd.Function):
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
        temperature: typing.Optional[float]=1.0, reduction: typing.Optional[str]='none',
        dist_process_group: typing.Optional[dist.ProcessGroup]=None) -> list[torch.Tensor]:
        ...
linear_cross_entropy = LinearCrossEntropy.apply
"""
"""verl/utils/kernel/linear_cross_entropy.py of verl 0.9.1 (the wheel; Apache-2.0), its arguments alone."""

CALLS = {
    "linear_cross_entropy(hidden_states, self.lm_head.weight, rolled_labels, temperature, 'none')",
    "linear_cross_entropy(hidden_states, vocab_weights, rolled_labels, temperature, 'none')",
    "linear_cross_entropy(hidden_states, self.output_layer.weight, labels_rmpad, temperature, 'none', "
    "parallel_state.get_tensor_model_parallel_group())",
    "linear_cross_entropy(hidden_states, weight, labels, temperature, 'none', "
    "parallel_state.get_tensor_model_parallel_group())",
    "linear_cross_entropy(hidden_states, output_weight, labels, temperature, 'none', "
    "parallel_state.get_tensor_model_parallel_group())",
}
"""Every call in verl 0.9.1: five models of verl/models/transformers, two modules of verl/models/mcore."""


def forward_of(source: str) -> ast.FunctionDef:
    (found,) = (
        method
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "LinearCrossEntropy"
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    )
    return found


def calls_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "linear_cross_entropy":
            yield ast.unparse(node)


def forget_verl() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


@pytest.fixture
def home() -> Iterator[Path]:
    """The folder of the real verl."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("verl is not there; SOURCE and CALLS stand in for it")
    (folder,) = spec.submodule_search_locations
    yield Path(folder)
    forget_verl()


def test_verl_still_reads_like_the_record(home: Path) -> None:
    source = (home / "utils/kernel/linear_cross_entropy.py").read_text()
    assert ast.dump(forward_of(source).args) == ast.dump(forward_of(SOURCE).args)
    assert {call for path in home.rglob("*.py") for call in calls_in(path.read_text())} == CALLS


def test_it_takes_verls_arguments() -> None:
    theirs = forward_of(SOURCE).args
    ours = inspect.signature(verl.linear_cross_entropy)
    assert [argument.arg for argument in theirs.args][1:] == list(ours.parameters)
    defaults = [p.default for p in ours.parameters.values() if p.default is not inspect.Parameter.empty]
    assert [ast.literal_eval(default) for default in theirs.defaults] == defaults
    for call in CALLS:
        (statement,) = ast.parse(call).body
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        assert not statement.value.keywords
        ours.bind(*statement.value.args)


def formula(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What verl's kernel computes, as its torch backend (verl/utils/experimental/torch_functional.py) writes it."""
    logits = hidden @ weight.t() / temperature
    entropy = torch.logsumexp(logits, -1) - torch.sum(logits.softmax(-1) * logits, -1)
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0], entropy


def relative(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("nats", ENTROPIES)
def test_log_probs_entropies_and_their_gradients_are_verls(nats: float, temperature: float) -> None:
    inputs = inputs_at(nats, dtype=torch.float32, temperature=temperature)
    exact = truth(inputs)
    bound = 1e-5 if nats else 3e-5  # at 0 nats a row's logits reach 120, and float32 knows exp of them no better
    by_entropy = torch.linspace(0.2, 1.0, len(inputs.grad))
    gradients: list[tuple[Tensor, ...]] = []
    for compute, dtype in ((verl.linear_cross_entropy, torch.float32), (formula, torch.float64)):
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (inputs.hidden, inputs.weight))
        logprob, entropy = compute(hidden.view(8, 8, -1), weight, inputs.target.view(8, 8), temperature)
        logprob, entropy = logprob.flatten(), entropy.flatten()
        if dtype == torch.float32:
            assert logprob.dtype == entropy.dtype == torch.float32
            assert (logprob - exact.logprob).abs().max() < 1e-5
            assert (entropy - entropies(inputs)).abs().max() < 1e-5
            assert relative(entropy.detach(), entropies(inputs)) < bound
        for loss in ((logprob * inputs.grad).sum(), (entropy * by_entropy).sum()):
            gradients.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    ours, theirs = gradients[:2], gradients[2:]
    for got, want in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        assert relative(got, want) < bound


@pytest.mark.parametrize("reduction", ["sum", "MEAN"])
def test_a_reduction_is_of_the_log_probs_alone(reduction: str) -> None:
    inputs = inputs_at(2.0, dtype=torch.float32)
    hidden = inputs.hidden.clone().requires_grad_()
    each, entropy = verl.linear_cross_entropy(hidden, inputs.weight, inputs.target)
    value, same = verl.linear_cross_entropy(hidden, inputs.weight, inputs.target, 1.0, reduction)
    assert value.shape == () and torch.equal(same, entropy)
    assert torch.equal(value, each.mean() if reduction == "MEAN" else each.sum())
    (by_value,) = torch.autograd.grad(value, hidden)
    (by_each,) = torch.autograd.grad(each.sum() / (len(each) if reduction == "MEAN" else 1), hidden)
    torch.testing.assert_close(by_value, by_each)


SPLIT = """
import torch, torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # one process that believes in two
from gapg.integrations.verl import linear_cross_entropy

dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
inputs = torch.randn(4, 8), torch.randn(16, 8), torch.randint(16, (4,)), 1.0, "none"
linear_cross_entropy(*inputs, dist.new_group([0]))
print("alone: computed")
linear_cross_entropy(*inputs, dist.group.WORLD)
"""


def test_a_vocabulary_split_over_ranks_is_refused() -> None:
    """In a process of its own: a process has one default group, and an engine that ran here before has taken it."""
    ran = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "alone: computed\n"
    assert ran.stderr.endswith("the odds form needs the whole vocabulary on a rank; use TP size 1\n")


def test_another_reduction_is_refused() -> None:
    hidden, weight, labels = torch.randn(4, 8), torch.randn(16, 8), torch.randint(16, (4,))
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, not 'max'"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package called verl, with the module that the record describes and one that has imported from it, as Megatron's
    do; the function itself only says whose it is."""
    kernel = tmp_path / "verl" / "utils" / "kernel"
    kernel.mkdir(parents=True)
    for folder in (kernel, *list(kernel.parents)[:2]):
        (folder / "__init__.py").touch()
    head = "import typing\nimport torch\nimport torch.distributed as dist\n"
    source = head + textwrap.dedent(SOURCE).replace("    def forward", "    @staticmethod\n    def forward")
    (kernel / "linear_cross_entropy.py").write_text(source)
    (tmp_path / "verl" / "early.py").write_text(f"from {verl.MODULE} import linear_cross_entropy\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("verl.early")
    forget_verl()


def test_one_call_puts_it_into_verl_also_where_it_is_imported_already(host: ModuleType) -> None:
    theirs = host.linear_cross_entropy
    verl.install()
    assert theirs is not verl.linear_cross_entropy
    assert host.linear_cross_entropy is verl.linear_cross_entropy
    assert importlib.import_module(verl.MODULE).linear_cross_entropy is verl.linear_cross_entropy
    verl.install()
    assert host.linear_cross_entropy is verl.linear_cross_entropy


def test_another_verl_is_refused(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(ctx: object, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> None: ...

    monkeypatch.setattr(importlib.import_module(verl.MODULE).LinearCrossEntropy, "forward", staticmethod(forward))
    theirs = host.linear_cross_entropy
    with pytest.raises(RuntimeError, match="install that version"):
        verl.install()
    assert host.linear_cross_entropy is theirs


def test_verls_own_forward_runs_on_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropies and every gradient of a model are those of verl's torch backend. (Its packages are made by
    hand: verl/__init__.py wants Ray.)"""
    for name in ("verl", "verl.utils", "verl.models", "verl.models.transformers"):
        package = ModuleType(name)
        package.__path__ = [str(home.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    verl.install()
    dense = importlib.import_module("verl.models.transformers.dense_common")
    torch.manual_seed(0)
    size = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=600, **size))
    ids, results = torch.randint(600, (1, 40)), []
    for forward in (dense.forward_with_triton_backend, dense.forward_with_torch_backend):
        model.zero_grad()
        out = forward(model, ids, position_ids=torch.arange(40)[None], temperature=0.7, return_dict=True)
        logprob, entropy = out.log_probs.squeeze(0), out.entropy.squeeze(0)
        ((logprob * torch.linspace(-1, 1, 40)).sum() - 0.1 * entropy.sum()).backward()
        results.append([logprob.detach(), entropy.detach(), *(p.grad for p in model.parameters())])
    assert len(results[0]) == 2 + len(list(model.parameters()))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-5
