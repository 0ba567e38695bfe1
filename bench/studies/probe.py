"""Probes: small nets that read a trained model's hidden states after its answer, and say whether it is wrong.

Trained on the run's greedy and sampled answers to its training problems; each net's epoch is chosen by the validation
problems. The device model is not changed. `POOLED` is the kind that products use; `ATTENTION` picks the tokens itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gapg.batches.batching import Example
from gapg.config_sections import OptimConfig
from gapg.console import Display
from gapg.model.policy import body
from gapg.optim import clip_and_step, learning_rate
from gapg.runs.run import Run
from gapg.seeding import derive
from studies import arms
from studies.answers import Answers, OwnAnswers, own_answers, score_rows, with_samples
from studies.arms import Entrant, Predictions, Rows

NETS = 5
"""Their log-odds are averaged."""
EPOCHS, BATCH = 8, 256
WEIGHT_DECAY = 0.1
AT_ONCE = 64
"""Sequences a forward of the device model: their hidden states are all there at once."""

Inputs = tuple[Tensor, ...]
"""What a net reads, each of n answers."""


@dataclass(frozen=True)
class States:
    """x [n, L, D] float32: the hidden states of all layers and the embedding, side by side. here, response [n, L] bool:
    where there is a token, and where it is the response's or the last of the prompt. L: the longest."""

    x: Tensor
    here: Tensor
    response: Tensor

    def pooled(self) -> Inputs:
        """([n, 3 D],): mean, largest and last over the response."""
        of_response = self.response[..., None]
        mean = (self.x * of_response).sum(1) / of_response.sum(1)
        largest = self.x.masked_fill(~of_response, -torch.inf).amax(1)
        last = self.x[torch.arange(len(self.x)), self.here.sum(1) - 1]
        return (torch.cat([mean, largest, last], dim=1),)

    def tokens(self) -> Inputs:
        return self.x, self.here


@torch.no_grad()
def states(model: PreTrainedModel, examples: Sequence[Example]) -> States:
    """Of prompts and responses, in one forward."""
    trains = model.training
    model.eval()
    ids = [torch.tensor([*e.prompt_ids, *e.response_ids]) for e in examples]
    # padded on the right, where no causal layer looks
    padded = pad_sequence(ids, batch_first=True).to(model.device)
    out = body(model)(input_ids=padded, use_cache=False, output_hidden_states=True)
    model.train(trains)
    place = torch.arange(padded.shape[1])[None]
    prompt, length = (torch.tensor(n)[:, None] for n in ([len(e.prompt_ids) for e in examples], list(map(len, ids))))
    here = place < length
    x = torch.cat(out.hidden_states, dim=-1).float().cpu().masked_fill(~here[..., None], 0.0)
    return States(x, here, here & (place >= prompt - 1))


class PooledNet(nn.Module):
    """One hidden layer over `pooled`."""

    def __init__(self, inputs: Inputs, width: int = 256, dropout: float = 0.3) -> None:
        super().__init__()
        size = inputs[0].shape[-1]
        self.net = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(size, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class AttentionNet(nn.Module):
    """A few learned queries over the tokens, and one hidden layer over what they find."""

    def __init__(self, inputs: Inputs, queries: int = 8, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        size = inputs[0].shape[-1]
        self.value, self.query, self.dropout = nn.Linear(size, width), nn.Linear(size, queries), nn.Dropout(0.2)
        self.out = nn.Sequential(nn.Linear(queries * width, hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(hidden, 1))

    def forward(self, x_nLD: Tensor, here_nL: Tensor) -> Tensor:
        value = self.dropout(nn.functional.gelu(self.value(x_nLD)))
        weight = self.query(x_nLD).masked_fill(~here_nL[..., None], -torch.inf).softmax(1)
        return self.out((weight.transpose(1, 2) @ value).flatten(1)).squeeze(-1)


@dataclass(frozen=True)
class Kind:
    """A probe: what its nets read, how a net is made, and its learning rate."""

    name: str
    read: Callable[[States], Inputs]
    net: Callable[[Inputs], nn.Module]
    lr: float


POOLED = Kind("probe", States.pooled, PooledNet, 1e-3)
ATTENTION = Kind("attention-probe", States.tokens, AttentionNet, 2e-3)


def probe_scores(
    kind: Kind, model: PreTrainedModel, answers: OwnAnswers, seed: int, nets: int = NETS, epochs: int = EPOCHS
) -> tuple[Tensor, Tensor]:
    """Log-odds of a wrong answer, [n] float32, on the validation and on the held-out problems.

    The same seed gives the same scores on the same machine, and leaves torch's generator as it was.
    """
    read = [_read(kind, model, part.examples) for part in answers]
    first, *there = read[0]
    known = first[there[0]] if there else first
    centre, scale = known.mean(0), known.std(0) + 1e-4
    inputs = [((x - centre) / scale, *rest) for x, *rest in read]
    total = [torch.zeros(len(part.ids)) for part in answers[1:]]
    with torch.random.fork_rng(devices=[]), Display(kind.name, nets * epochs) as display:
        for k in range(nets):
            torch.manual_seed(derive(seed, kind.name, k))
            net = _train(kind, inputs[0], answers.training, inputs[1], answers.validation, epochs, display)
            for scores, of_split in zip(total, inputs[1:], strict=True):
                scores += _scores(net, of_split) / nets
    return total[0], total[1]


def _read(kind: Kind, model: PreTrainedModel, examples: Sequence[Example]) -> Inputs:
    """What its nets read of all examples. `ATTENTION` keeps each token's states, which long responses of a large model
    do not leave memory for; `POOLED` keeps none."""
    parts = [kind.read(states(model, examples[i : i + AT_ONCE])) for i in range(0, len(examples), AT_ONCE)]
    return tuple(map(_joined, zip(*parts, strict=True)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """End to end, as long as the longest along the second dimension."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (*(0, 0) * (part.dim() - 2), 0, longest - part.shape[1])) for part in parts])


def _train(
    kind: Kind, inputs: Inputs, training: Answers, others: Inputs, validation: Answers, epochs: int, display: Display
) -> nn.Module:
    """A net with the weights of its best epoch, by cross-entropy on the validation problems."""
    net, n = kind.net(inputs), len(training.ids)
    optimizer = torch.optim.AdamW(net.parameters(), lr=kind.lr, weight_decay=WEIGHT_DECAY, fused=True)
    per_epoch = -(-n // BATCH)
    schedule = OptimConfig(lr=kind.lr, warmup_steps=20, final_lr=0.0)
    lowest, best = float("inf"), net.state_dict()
    for epoch in range(epochs):
        net.train()
        for k, batch in enumerate(torch.randperm(n).split(BATCH)):
            score = net(*(x[batch] for x in inputs))
            binary_cross_entropy_with_logits(score, training.wrong[batch]).backward()
            lr = learning_rate(schedule, epoch * per_epoch + k, epochs * per_epoch)
            clip_and_step(optimizer, lr, 1.0)
        if (loss := validation.loss(_scores(net, others))) < lowest:
            lowest, best = loss, copy.deepcopy(net.state_dict())
        display.advance(f"loss {loss:.3f}")
    net.load_state_dict(best)
    return net


@torch.no_grad()
def _scores(net: nn.Module, inputs: Inputs) -> Tensor:
    net.eval()
    return torch.cat([net(*part) for part in zip(*(x.split(BATCH) for x in inputs), strict=True)])


def probe(kind: Kind, run: Run) -> Rows:
    answers = with_samples(run, own_answers(run))
    return score_rows(answers, *probe_scores(kind, run.model, answers, run.config.seed))


PROBE, ATTENTION_PROBE = (Predictions(kind.name, partial(probe, kind)) for kind in (POOLED, ATTENTION))
ENTRANTS = (
    Entrant("+ probe on pooled hidden states", arms.masked, PROBE),
    Entrant("+ probe with attention on hidden states", arms.masked, ATTENTION_PROBE),
    Entrant("marginal, probe with attention", arms.marginal, ATTENTION_PROBE),
)
