"""From the sequences of a step to micro-batches: packed or padded, prompts shared where that pays."""
