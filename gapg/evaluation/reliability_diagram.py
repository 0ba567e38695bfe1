"""The reliability diagram: how often answers are right against the chance that the policy gives itself to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from gapg.console import printable
from gapg.evaluation.reliability import Bin, FloatArray
from gapg.evaluation.report import BLUE, GREEN, ORANGE, save_figure

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw(bins: Sequence[Bin], score: FloatArray, right: FloatArray, title: str, path: Path) -> None:
    """The bins with their intervals beside the diagonal of a calibrated policy; below, how the scores lie."""
    figure, (above, below) = plt.subplots(2, figsize=(6, 7), sharex=True, height_ratios=(3, 1), layout="constrained")
    above.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--", label="calibrated")
    right_B = np.array([b.right for b in bins])
    around = np.abs(np.array([(b.low, b.high) for b in bins]).reshape(-1, 2).T - right_B)
    style = {"color": BLUE, "capsize": 3, "label": f"{len(bins)} equal-count bins, with 95% intervals"}
    above.errorbar([b.score for b in bins], right_B, around, fmt="o", **style)
    above.set(ylabel="answered right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    above.set_title(printable(title), parse_math=False)  # a task's name may hold dollars
    above.legend(fontsize=8, loc="upper left")
    known = ~np.isnan(score)
    parts = [score[known & (right == 0)], score[known & (right > 0)]]
    below.hist(
        parts, bins=np.linspace(0, 1, 41).tolist(), stacked=True, color=[ORANGE, GREEN], label=["wrong", "right"]
    )
    below.set(xlabel="S: the chance that the policy answers instead of calling", ylabel="problems")
    below.legend(fontsize=8, loc="upper center")  # S lies at both ends where a policy knows
    save_figure(figure, path)
    plt.close(figure)
