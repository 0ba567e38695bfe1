"""docs/integrations.md, "A loop of your own": what stands there runs, and its gradients are eager's."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


class Model(nn.Module):
    """As transformers' are called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)

    def model(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embed(ids).tanh())

    def logprob(self, ids: Tensor, temperature: float) -> Tensor:
        logits = self.lm_head(self.model(ids).last_hidden_state[:, :-1]) / temperature
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.parameters() if p.grad is not None]
        self.zero_grad()
        return found


def test_the_page_has_eagers_gradients() -> None:
    section = PAGE.read_text().partition("## A loop of your own")[2].partition("\n## ")[0]
    with_a_function, with_chunks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(50, (4, 9))
    is_response = torch.rand(4, 8) > 0.4
    old = model.logprob(ids, 0.7).detach()[is_response]
    old += 0.3 * torch.randn_like(old)
    advantage = torch.randn_like(old)
    given = {"input_ids": ids, "is_response": is_response, "old_logprob": old, "advantage": advantage}
    names: dict[str, Any] = {"torch": torch, "model": model, "tokens": len(old)} | given

    exec(with_a_function, names)  # noqa: S102  # the page is ours
    found = [model.gradients()]
    names["hidden"] = model.model(ids).last_hidden_state[:, :-1][is_response]
    exec(with_chunks, names)  # noqa: S102
    found.append(model.gradients())

    gain = names["clipped"](model.logprob(ids, 0.7)[is_response], old, advantage)
    gain.backward()
    torch.testing.assert_close(names["out"].loss, gain)
    want = [model.gradients()]
    (-advantage * model.logprob(ids, 1.0)[is_response]).mean().backward()
    want.append(model.gradients())
    for ours, theirs in zip(found, want, strict=True):
        for got, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, exact)
