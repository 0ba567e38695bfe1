"""Which architectures train on packed rows, on padded rows, or not at all: measured on a tiny random model of each.

    python bench/architectures.py                              # all of them, some minutes on a CPU
    python bench/architectures.py --only lfm2,granite
    python bench/architectures.py --table docs/architectures.md    # the committed table into that page, no run

Each route's log-probs and gradients, in training mode, are compared with those of transformers' own eager model given
one sequence at a time. Beside them stands what `gapg.model.route.choose_route` says of the model: the row is WRONG
where that route is off, or padded without need. The script exits with 1 if a row is.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import record
from architecture_zoo import SIZE, ZOO, build
from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.errors import ConfigError
from gapg.model.policy import response_logprobs
from gapg.model.route import choose_route
from record import Row

RESULTS = record.RESULTS / "architectures" / "architectures.json"
MARKERS = ("<!-- architectures: drawn by bench/architectures.py -->", "<!-- end of architectures -->")
TOLERANCE = 1e-4
"""Of a log-prob, in nats, and of the gradient, relative to its norm; both in float32."""
LEAST_CONTEXT = 1e-2
"""A model whose log-probs move less than this when other sequences stand before them could hide a leak."""
ROUTES: dict[str, dict[str, Any]] = {
    "packed": {"token_cap": 4000},
    "shared": {"token_cap": 4000, "share": True},
    "padded": {"token_cap": 60, "padded": True},
}
"""Arguments of `packed_batches`: one row of everything, the same with shared prompts, and several padded batches."""

Logprobs = dict[tuple[int, int], Tensor]
Gradient = dict[str, Tensor]


def examples(seed: int = 0) -> list[Example]:
    """Three prompts with two responses each, no two of which have the same length."""
    draw = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, SIZE["vocab_size"]) for _ in range(n)]

    found = []
    for group, (prompt, *responses) in enumerate([(3, 9, 4), (7, 2, 12), (5, 6, 11)]):
        prompt_ids = ids(prompt)
        for sample, length in enumerate(responses):
            found.append(Example(prompt_ids, ids(length), draw.uniform(-1, 1), group=group, sample=sample))
    return found


LONGEST = max(map(len, examples()))


# --- the measurement -------------------------------------------------------------------------------------------------


def by_logits(model: PreTrainedModel, row: list[Example]) -> Iterator[tuple[Example, Tensor]]:
    """Each example's response log-probs by the model's own logits of one sequence, the row's examples end to end."""
    ids = torch.tensor([[token for e in row for token in (*e.prompt_ids, *e.response_ids)]])
    logprob = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
    end = 0
    for e in row:
        end += len(e)
        at = torch.arange(end - len(e.response_ids) - 1, end - 1)
        yield e, logprob[at, torch.tensor(e.response_ids)]


def alone(model: PreTrainedModel) -> tuple[Logprobs, Gradient]:
    """The truth: one sequence at a time."""
    model.zero_grad(set_to_none=True)
    found = {}
    for e in examples():
        ((_, logprob),) = by_logits(model, [e])
        (e.weight * logprob.sum()).backward()
        found[e.group, e.sample] = logprob.detach()
    return found, gradient_of(model)


def by_route(model: PreTrainedModel, batches: list[PackedBatch]) -> tuple[Logprobs, Gradient]:
    """The same as the trainer computes it."""
    model.zero_grad(set_to_none=True)
    found: Logprobs = {}
    for batch in batches:
        logprob = response_logprobs(model, batch)
        (batch.weight * logprob).sum().backward()
        cells = torch.stack([batch.group, batch.sample], -1)
        for cell in cells.unique(dim=0):
            group, sample = cell.tolist()
            found[group, sample] = logprob.detach()[(cells == cell).all(-1)]
    return found, gradient_of(model)


def gradient_of(model: PreTrainedModel) -> Gradient:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logprob_difference(ours: Logprobs, truth: Logprobs) -> float:
    assert ours.keys() == truth.keys()
    return max(float((ours[cell] - truth[cell]).abs().max()) for cell in truth)


def gradient_difference(ours: Gradient, truth: Gradient) -> float:
    """||ours - truth|| / ||truth|| over all parameters; one that has no gradient has a gradient of 0."""
    zero = torch.zeros(())
    names = ours.keys() | truth.keys()
    off = sum(float((ours.get(name, zero) - truth.get(name, zero)).double().square().sum()) for name in names)
    return float((off / sum(float(g.double().square().sum()) for g in truth.values())) ** 0.5)


def route_row(name: str, route: str, model: PreTrainedModel, truth: tuple[Logprobs, Gradient]) -> Row:
    """The worse of two orders of the examples."""
    found = []
    try:
        for order in (examples(), examples()[::-1]):
            ours = by_route(model, packed_batches(order, device=torch.device("cpu"), **ROUTES[route]))
            found.append((logprob_difference(ours[0], truth[0]), gradient_difference(ours[1], truth[1])))
    except Exception as error:  # whatever a model's own code raises is the answer
        return record.error_row(name, route, error)
    logprob, grad = (max(values) for values in zip(*found, strict=True))
    if not torch.tensor([logprob, grad]).isfinite().all():
        return record.error_row(name, route, "not finite")
    return {**figure(name, route, logprob), "gradient": grad}


def measure(name: str) -> list[Row]:
    """A row of what was decided, whose figure is the control, and one of each route."""
    try:
        model, plain = build(name).train(), build(name, "eager").eval()
        plain.load_state_dict(model.state_dict())
        truth = alone(plain)
    except ConfigError as refusal:
        return [record.error_row(name, "refused", str(refusal))]
    except Exception as error:
        return [record.error_row(name, "not built", error)]
    with torch.no_grad():
        joined = {(e.group, e.sample): logprob for e, logprob in by_logits(plain, examples())}
    control = figure(name, "joined", logprob_difference(joined, truth[0]))
    packed = [route_row(name, route, model, truth) for route in ("packed", "shared")]
    try:
        decided, reason = ("packed" if choose_route(model, longest=LONGEST) else "padded"), None
    except ConfigError as error:
        decided, reason = "refused", str(error)
    decision = {"route": decided, "reason": reason, "attention": model.config._attn_implementation}
    return [control | decision, *packed, route_row(name, "padded", model, truth)]  # padded in the attention chosen


def figure(name: str, impl: str, logprob: float) -> Row:
    return {"case": name, "impl": impl, "metric": "log-prob difference", "unit": "nats", "median": logprob}


# --- the page --------------------------------------------------------------------------------------------------------


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{architecture: {route, or what else was looked at: its row}}"""
    return {case: {row["impl"]: row for row in part} for case, part in record.by_case(rows).items()}


def worst(rows: list[Row]) -> tuple[float, float] | None:
    """The largest differences (of log-probs, of the gradient); None where a route failed."""
    if any("error" in row for row in rows):
        return None
    return max(row["median"] for row in rows), max(row["gradient"] for row in rows)


def fault(of: dict[str, Row]) -> str | None:
    """What is wrong with the route of an architecture, if anything."""
    if "joined" not in of:
        return None
    packed, padded = worst([of["packed"], of["shared"]]), worst([of["padded"]])
    route = of["joined"]["route"]
    chosen = packed if route == "packed" else padded
    if of["joined"]["median"] < LEAST_CONTEXT:
        return "its log-probs do not hang on the context: no evidence"
    if route != "refused" and (chosen is None or max(chosen) > TOLERANCE):
        return f"{route}, but that is off by {chosen}"
    if route == "padded" and packed is not None and max(packed) <= TOLERANCE:
        return "padded, but packing is exact"
    return None


def table(found: dict[str, Any]) -> str:
    """Markdown of a record: a sentence of counts, and a line for each architecture."""
    cases = by_case(found["rows"])
    routes = [route_of(of) for of in cases.values()]
    counts = ", ".join(f"{routes.count(r)} {r}" for r in ("packed", "padded", "refused", "not built") if r in routes)
    head = ("architecture", "route", "log-probs off by", "gradient off by", "packed instead", "attention")
    lines = [[cell.replace("|", "\\|") for cell in cells(name, of)] for name, of in cases.items()]
    versions = f"{len(cases)} models of transformers {found['versions']['transformers']}"
    return f"{versions}: {counts}.\n\n{record.markdown(head, lines)}"


def route_of(of: dict[str, Row]) -> str:
    """A model that was not compared has one row, whose name says why."""
    return of["joined"]["route"] if "joined" in of else next(iter(of))


def cells(name: str, of: dict[str, Row]) -> list[str]:
    route = route_of(of)
    if "joined" not in of:
        return [name, route, "", "", of[route]["error"], ""]
    packed, attention = [of["packed"], of["shared"]], of["joined"]["attention"]
    if route == "refused":
        return [name, route, "", "", of["joined"]["reason"], attention]
    off = worst(packed if route == "packed" else [of["padded"]])
    logprob, gradient = (f"{x:.0e}" for x in off) if off else ("failed", "failed")
    instead = ""
    if route == "padded":
        off = worst(packed)
        instead = f"off by {off[0]:.0e}" if off else next(row["error"] for row in packed if "error" in row)
    return [name, route, logprob, gradient, instead, attention]


def main() -> None:
    parser = record.parser(__doc__, "architectures")
    parser.add_argument("--only", type=record.pick(ZOO), metavar="NAMES", help="parts of architectures' names")
    parser.add_argument("--table", type=Path, metavar="FILE", help="draw the committed record into it, and stop")
    given = parser.parse_args()
    if given.table:
        with record.refusing(parser):
            record.draw_between(given.table, MARKERS, table(record.read(RESULTS)))
        return
    transformers.logging.set_verbosity_error()
    names = given.only or sorted(ZOO)
    rows, wrong = list[Row](), dict[str, str]()
    for name in names:
        measured = measure(name)
        rows += measured
        (of,) = by_case(measured).values()
        print("  ".join(filter(None, cells(name, of))), flush=True)
        if found := fault(of):
            wrong[name] = found
            print(f"    WRONG: {found}", flush=True)
    record.write("architectures", rows, given.output / "architectures.json")
    print(f"{len(wrong)} of {len(names)} wrong" + "".join(f"\n  {name}: {why}" for name, why in wrong.items()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
