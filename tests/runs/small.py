"""The command line of the smallest run that trains; of an option that comes twice, the last counts."""

SMALL = (
    *("train", "quickstart", "--threads", "1", "--tensorboard", "false"),
    *("--task.args", "{max_number: 6, max_target: 24}"),
    *("--model.llama", "{hidden_size: 32, num_layers: 1, num_heads: 1, intermediate_size: 32}"),
    *("--eval.every", "0", "--eval.heldout", "0", "--eval.problems", "4"),
    *("--rollout.prompts-per-step", "2", "--rollout.samples-per-prompt", "2"),
)
