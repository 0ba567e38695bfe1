"""GAPG in plain PyTorch: a tiny model learns what to answer itself and when to call the cloud. Needs only gapg_kernels.

A prompt is a number below 32, a response one token. For an even prompt one answer is right, and can be learnt; for an
odd one the right answer is drawn anew each time, and only the cloud knows it. A right answer is worth 1, a call 0.3
(right, less its price), a wrong answer 0. Calling always earns 0.30; answering the even and calling for the odd, 0.65.
"""

import torch
from torch import Tensor, nn

from gapg_kernels import linear_loss

PROMPTS, VOCAB, CLOUD, GROUP = 32, 64, 63, 32  # token 63 calls the cloud; a step samples 32 responses to each prompt


def policy_loss(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Your loss: any function of log-probs. It sees a chunk of rows at a time and returns the chunk's sum."""
    return -(advantage * logprob + 0.05 * entropy).sum() / (PROMPTS * GROUP)


def main() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(PROMPTS, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64))
    head = nn.Linear(64, VOCAB, bias=False)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)
    prompt = torch.arange(PROMPTS).repeat_interleave(GROUP)
    for step in range(151):
        with torch.no_grad():  # with a real model an inference engine does this
            response = torch.distributions.Categorical(logits=head(body(prompt))).sample()
        answer = torch.where(prompt % 2 == 0, prompt + 7, torch.randint(CLOUD, prompt.shape))
        reward = torch.where(response == CLOUD, 0.3, (response == answer).float()).view(PROMPTS, GROUP)
        advantage = (reward - reward.mean(1, keepdim=True)) * GROUP / (GROUP - 1)  # less the mean of the others
        rows = {"advantage": advantage.flatten()}
        out = linear_loss(body(prompt), head.weight, response, policy_loss, rows=rows, entropy=True)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 30 == 0:
            calls = (response == CLOUD).view(PROMPTS // 2, 2, GROUP).float().mean((0, 2)).tolist()
            print(f"step {step:3d}  reward {reward.mean():.2f}  calls: even {calls[0]:.0%}, odd {calls[1]:.0%}")


if __name__ == "__main__":
    main()
