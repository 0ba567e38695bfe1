"""The sections of a run's settings: task, model, warm start, rollout, reward, loss, budget and the rest."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gapg import config_keys

Fraction01 = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[int, Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
FLOAT32 = 1e38  # most of a number that multiplies or bounds tensors of float32


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_merely_true(cls, value: Any, info: ValidationInfo) -> Any:
        """Python's True is the number 1; a truth value itself may be written 1 and 0, yes and no, on and off."""
        allowed = config_keys.kinds(cls.model_fields[info.field_name or ""].annotation)
        items = value if isinstance(value, list | tuple) else [value]
        if bool not in allowed and any(isinstance(item, bool) for item in items):
            none = "; leave it empty for none" if type(None) in allowed else ""
            raise PydanticCustomError("truth_value", f"needs a value, not true or false{none}")
        return value


class TaskConfig(Section):
    """What is trained on: prompts, right answers and their verifier."""

    name: str
    """`countdown`, `word-problems`, `maths`, or the import path of your own: `mypkg.mytask:MyTask`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the task."""


class LlamaConfig(Section):
    """A Llama made from scratch, for tasks that bring their own tokenizer."""

    hidden_size: Count = 96
    """Width of the residual stream."""
    num_layers: Count = 3
    """Transformer blocks."""
    num_heads: Count = 3
    """Attention heads; they divide `hidden_size`."""
    intermediate_size: Count = 256
    """Width of the MLP."""
    max_positions: Count = 128
    """Longest sequence."""


class LoraConfig(Section):
    """Low-rank adapters, which the policy gradient trains instead of the weights. The warm start trains the weights."""

    rank: Count
    """Rank of the adapters."""
    alpha: Count = 32
    """The adapters' product counts alpha / rank times."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of linear layers, such as [q_proj, v_proj]; empty: all below the LM head, which stays frozen."""


class ModelConfig(Section):
    """The device model: weights that are there, or a small Llama from scratch."""

    path: str | None = None
    """A Hugging Face folder or hub name. Leave empty to make `llama` from scratch."""
    llama: LlamaConfig = LlamaConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. The optimizer's weights and moments are float32 always: no small update is lost."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: so is what moves between layers, and the optimizer has float32 masters; needs `dtype: bfloat16`."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    """Train adapters (`--model.lora.rank 16`), which want a larger `optim.lr`; checkpoints hold merged weights."""
    liger: Literal["auto"] | bool = "auto"
    """RMSNorm, SwiGLU and RoPE by liger-kernel's Triton kernels; `auto`: on a GPU, where they compute the same."""
    compile: bool = False
    """torch.compile of the decoder layers, without Liger's kernels: the first steps take minutes."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.parameters == "bfloat16" and self.dtype == "float32":
            raise ValueError("model.parameters=bfloat16: the model computes in float32; set model.dtype=bfloat16 too")
        if self.compile and self.liger is True:
            raise ValueError("model.compile=true compiles what model.liger=true replaces: set one of them to false")
        return self

    @model_validator(mode="after")
    def _installed(self) -> ModelConfig:
        if self.lora is not None and find_spec("peft") is None:
            raise ValueError("model.lora: peft is not installed; pip install 'gapg[lora]'")
        if self.liger is True and find_spec("liger_kernel") is None:
            raise ValueError("model.liger=true: liger-kernel is not installed; pip install 'gapg[liger]'")
        return self


class OptimConfig(Section):
    """AdamW and its schedule: warm-up, then flat, then down to `final_lr`."""

    lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's decay rates of the gradient's mean and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; how often it binds is logged as `clipped`."""
    warmup_steps: Whole = 10
    """Steps in which the learning rate rises to `lr`."""
    flat: Fraction01 = 0.0
    """Part of the run after which the learning rate starts to fall."""
    final_lr: Fraction01 = 0.1
    """Learning rate at the last step, as a part of `lr`."""
    offload: bool = False
    """AdamW's moments and weights of its own in the machine's memory, and its step on the CPU: slower, needs a GPU."""

    @field_validator("weight_decay")
    @classmethod
    def _shrinks(cls, value: float, info: ValidationInfo) -> float:
        if value * info.data.get("lr", 0.0) >= 1:
            raise PydanticCustomError(
                "no_decay", "weight_decay times lr must be below 1, or a step turns the sign of every weight"
            )
        return value


class WarmStartConfig(Section):
    """Supervised steps on demonstrations before the policy gradient."""

    steps: Count = 1000
    """Optimizer steps on demonstrations."""
    batch_size: Count = 64
    """Demonstrations a step."""
    demonstrations: str | None = None
    """A jsonl of {"prompt" or "id", "response"}; empty: the task makes its own."""
    optim: OptimConfig = OptimConfig(lr=3e-3, warmup_steps=30, flat=0.4, final_lr=0.02)
    checkpoint_every: Count = 250
    """Steps between checkpoints of the warm start."""


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: transformers in the same process, or vLLM."""
    prompts_per_step: Count = 32
    """Prompts of a step."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """G. The estimator's baseline needs two or more."""
    max_prompt_tokens: Count = 256
    """Longer prompts are left out."""
    max_new_tokens: Count = 720
    """Most tokens of a response."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """1 is the policy itself; another value trains the policy at that temperature. vLLM takes 0.01 to 2."""
    max_rows: Count = 2048
    """Responses that the transformers engine decodes at once."""
    vllm_args: dict[str, Any] = {}
    """Further arguments of the vLLM engine (`gpu_memory_utilization`, `max_model_len`, `enforce_eager`, …)."""

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its response."""
        return self.max_prompt_tokens + self.max_new_tokens


class RewardConfig(Section):
    """What an outcome is worth; a wrong answer is worth 0."""

    alpha_a: Annotated[float, Field(ge=1e-6)] = 1.0
    """Reward of a right local answer."""
    alpha_c: Annotated[float, Field(ge=0)] = 0.25
    """Reward of a call the cloud answers rightly; where the controller starts. 0 is task-tuning only."""
    alpha_f: Annotated[float, Field(ge=0)] = 0.0
    """Added for exactly one terminal ending."""
    function: str = "gapg.judge:rewards"
    """Import path of a function (group, alpha_a, alpha_c, alpha_f) -> one reward a response."""

    @model_validator(mode="after")
    def _ordered(self) -> RewardConfig:
        if self.alpha_c >= self.alpha_a:
            raise ValueError(f"reward.alpha_c={self.alpha_c} must be below reward.alpha_a={self.alpha_a}")
        return self


class MarginalConfig(Section):
    """With `method: marginal`: what a response is worth before anybody decides, and how the decision learns.

    r is 1 for a right answer, S the chance that the policy answers instead of calling, c how right the cloud is.
    """

    score: Literal["log", "brier", "price"] = "log"
    """`log`, `brier`: S is scored as a forecast of r, which is right for every price of a call; `price`: the expected
    reward with a call at `reward.alpha_c`."""
    weight: Annotated[float, Field(ge=0, le=FLOAT32)] = 1.0
    """How much the decision's gradient counts."""
    trace: tuple[Annotated[float, Field(ge=0, le=FLOAT32)], Annotated[float, Field(ge=0, le=FLOAT32)]] | None = None
    """[a, b]: a response is worth a U + b r, with U by `score` (Brier's for `log`). Empty: [1, 0.5] for `log`, else
    [1, 0], which with `weight: 1` is the exact gradient of the expected U."""
    prices: tuple[Fraction01, Fraction01] = (0.0, 1.0)
    """brier: the range of prices of a call, in right answers, that U is the mean over; no S outside it learns."""
    cloud: Literal["ignore", "cached", "ask"] = "ignore"
    """c: `ignore` takes it for 1 and connects to no cloud in training; `cached` takes the answers that are paid for
    already, and 1 for the others; `ask` asks once for each prompt. `log` knows no c."""

    @property
    def trace_worth(self) -> tuple[float, float]:
        """(a, b)."""
        return self.trace or ((1.0, 0.5) if self.score == "log" else (1.0, 0.0))

    @model_validator(mode="after")
    def _possible(self) -> MarginalConfig:
        low, high = self.prices
        if low >= high:
            raise ValueError(f"marginal.prices=[{low:g}, {high:g}]: give a range, the low end first, as in [0, 1]")
        if self.prices != (0.0, 1.0) and self.score != "brier":
            raise ValueError(f"marginal.prices is the range of score=brier: leave it out for score={self.score}")
        if self.cloud != "ignore" and self.score == "log":
            raise ValueError(
                f"marginal.cloud={self.cloud}: the log score has no term for how right the cloud is; set "
                "marginal.score=brier (or price), or marginal.cloud=ignore"
            )
        if self.weight == 0 and max(self.trace_worth) == 0:
            raise ValueError("marginal.weight=0 and marginal.trace=[0, 0]: nothing would be learned")
        return self


class LossConfig(Section):
    """The policy loss; the defaults are the paper's estimator, everything else is an option from GRPO's family."""

    advantage: Literal["gapg", "grpo"] = "gapg"
    """`gapg`: reward less the mean of the group's others. `grpo`: divided by the group's standard deviation."""
    aggregation: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """`sequence_sum`: log pi of whole responses, the true gradient. `token_mean`: every token alike (DAPO)."""
    epochs: Count = 1
    """Optimizer steps per batch of responses; from the second on the ratio to the policy that sampled counts."""
    clip: tuple[Fraction01, Annotated[float, Field(ge=0, le=FLOAT32)]] | None = None
    """[low, high]: a token whose ratio leaves [1 - low, 1 + high] the way its advantage pushes has no gradient."""
    tis_cap: Annotated[float, Field(gt=0, le=FLOAT32)] | None = None
    """Truncated importance sampling: weigh tokens by min(pi / pi_engine, cap), for an engine that differs."""
    kl: Literal["k2", "k3"] = "k3"
    """Estimator of the KL penalty."""
    kl_coef: Annotated[float, Field(ge=0, le=FLOAT32)] = 0.0
    """KL penalty to the policy the run started from, which is then kept in memory too."""
    entropy: bool = False
    """Also log the policy's entropy over the tokens trained on."""

    @model_validator(mode="after")
    def _useful(self) -> LossConfig:
        if self.clip is not None and self.epochs == 1:
            raise ValueError(
                "loss.clip does nothing in one epoch, whose ratio is 1: leave it out, or set loss.epochs to 2"
            )
        return self


class UpdateConfig(Section):
    """What an update need not compute. None of it changes the gradient; each can be turned off to see what it saves."""

    skip_zero_advantage: bool = True
    """Responses of zero advantage stay out (all, when every reward of a group is equal), unless there is a KL term.
    With `method: marginal` the decision learns from all; equal ones of a group go in once, weighted by their number."""
    response_positions: bool = True
    """Only positions that predict a response token go through the LM head."""
    pack: Literal["auto"] | bool = "auto"
    """Sequences end to end; off: padded rows. `auto`: packed where a check of the model finds that it is exact."""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """One copy of a prompt for its responses; `auto`: where the cost model says that it pays."""

    @model_validator(mode="after")
    def _possible(self) -> UpdateConfig:
        if self.pack is False and self.share_prompts == "always":
            raise ValueError(
                "update.pack=false pads each response with a prompt of its own: set update.share_prompts=auto"
            )
        return self


class BudgetConfig(Section):
    """How many problems may go to the cloud, and what holds the policy to it."""

    cloud_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Part of the problems that may go to the cloud. (The filter's rho, calls per local answer, follows from it.)"""
    filter: bool = True
    """Adaptive prompt filtering."""
    controller: bool = True
    """Moves alpha_c so that the training call fraction meets `cloud_fraction`."""
    rho: Annotated[float, Field(ge=0)] | None = None
    """Overrides the filter's rho = c / (1 - c)."""
    gain: Annotated[float, Field(gt=0)] = 0.05
    """Integral gain of the controller, per step."""
    damping: Annotated[float, Field(ge=0)] = 0.75
    """Proportional gain of the controller."""

    @property
    def exact_rho(self) -> Fraction:
        """rho as an exact fraction (0.6/0.4 in floats would lose a prompt)."""
        if self.rho is not None:
            return Fraction(str(self.rho))
        c = Fraction(str(self.cloud_fraction))
        return c / (1 - c)


class EvalConfig(Section):
    """Evaluations during a run and after it."""

    every: Whole = 50
    """Steps between evaluations during training (0: none)."""
    problems: Count = 500
    """Problems kept out of training for these evaluations, and for choosing the best checkpoint: at most a fifth."""
    heldout: Whole | None = None
    """Held-out problems of the final evaluation (empty: all; 0: none)."""
