"""``generate_batch`` of a wrapped model: transformers' method on our own scheduler, every request under the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils.logging import tqdm

from .batching import Request, Scheduler
from .cache import KVCache
from .cache_layers import is_stateful
from .layers import wrapped_state
from .sampling import Sampler

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

MAX_ROWS = 64
MAX_BATCH_TOKENS = 2048


def generate_batch(
    self: PreTrainedModel,
    inputs: list[list[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """Generate for many prompts by continuous batching, every request under the policy that the model is wrapped with.

    Stands for transformers' method of the same name and signature while the model is wrapped.

    Arguments
        inputs: one list of token ids per prompt, without padding; lengths may differ.
        generation_config: how tokens are chosen, as for ``generate``: greedy or sampling, ``num_return_sequences``,
            ``max_new_tokens``, ``eos_token_id`` and all processors of logits. None: the model's.
        continuous_batching_config: of its fields these count: ``max_requests_per_batch`` (rows that run at once,
            default 64), ``max_batch_tokens`` (prompt tokens read between two decode steps, default 2048),
            ``num_blocks`` x ``page_size`` (tokens that the pool may hold; default ``wrap``'s ``max_tokens``),
            ``return_logprobs`` and ``seed``. Pages have ``wrap``'s ``page_size``.
        record_timestamps: note the time (seconds, ``time.perf_counter``) of every token.
        progress_bar: show finished requests.
        persistent_manager, warmup: without effect: nothing outlives the call and nothing is captured.
        kwargs: fields of the generation config to change, e.g. ``max_new_tokens=64``.

    Returns request id -> GenerationOutput, in the order of ``inputs``; copies of a prompt (``num_return_sequences``)
    come before its own id. A request that ran out of pages has status FAILED and an ``error``; the others go on.

    Raises TypeError or ValueError, before anything runs, naming what is wrong: a prompt, an option, a way of decoding,
    a model with recurrent states, a prompt that ``max_tokens`` can never hold.
    """
    state = wrapped_state(self)
    assert state is not None
    name = type(self).__name__
    given = self.generation_config if generation_config is None else generation_config
    max_length = kwargs.get("max_length", given.max_length)
    config, unused = self._prepare_generation_config(generation_config, **kwargs)
    if unused:
        raise ValueError(f"generate_batch does not know {sorted(unused)}")
    prompts = check_prompts(inputs, self.get_input_embeddings().weight.shape[0])
    if not prompts:
        return {}
    options = continuous_batching_config
    max_tokens = state.max_tokens
    if options is not None and getattr(options, "num_blocks", None) is not None:
        max_tokens = options.num_blocks * options.page_size
    sampler = Sampler(self, config, getattr(options, "seed", None), bool(getattr(options, "return_logprobs", False)))
    scheduler = Scheduler(
        self,
        sampler,
        max_rows=_option(options, "max_requests_per_batch", MAX_ROWS),
        max_batch_tokens=_option(options, "max_batch_tokens", MAX_BATCH_TOKENS),
        max_tokens=max_tokens,
        page_size=state.page_size,
    )
    if any(is_stateful(x) for x in KVCache(self).layers):
        raise ValueError(f"generate_batch needs layers that keep nothing but keys and values, but {name} has others")
    copies = config.num_return_sequences or 1
    ordered: list[Request] = []
    for index, prompt in enumerate(prompts):
        most = config.max_new_tokens
        if most is None:
            most = 20 if max_length is None else max_length - len(prompt)
        if most < 1:
            raise ValueError(f"inputs[{index}] has {len(prompt)} tokens: nothing is left of max_length={max_length}")
        group = []
        for copy in range(copies):
            own = copy == copies - 1
            output = GenerationOutput(f"req_{index}" if own else f"req_{index}__child#{copy}", list(prompt))
            output.timestamps = [] if record_timestamps else None
            group.append(Request(output, most))
        total = len(prompt) if state.policy.retains else group[0].total
        if max_tokens is not None and total > max_tokens:
            raise ValueError(
                f"inputs[{index}] comes to {total} tokens ({len(prompt)} now), more than max_tokens={max_tokens}"
            )
        scheduler.waiting.append(group)
        ordered += group
    with torch.no_grad(), tqdm(total=len(ordered), disable=not progress_bar, unit="request") as bar:
        while scheduler.busy:
            scheduler.step()
            bar.update(len(scheduler.finished) - bar.n)
    return {x.output.request_id: x.output for x in ordered}


def check_prompts(inputs: Any, vocabulary: int) -> list[list[int]]:
    """``inputs`` as lists of ints; TypeError or ValueError naming the first prompt that is none."""
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, (Sequence, Tensor)):
        raise TypeError(f"inputs must be a list of lists of token ids, got {type(inputs).__name__}")
    prompts = []
    for index, prompt in enumerate(inputs):
        ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(ids, Sequence) or any(isinstance(x, bool) or not isinstance(x, int) for x in ids):
            raise TypeError(f"inputs[{index}] must be a list of token ids (int), got {prompt!r:.100}")
        if not ids:
            raise ValueError(f"inputs[{index}] is empty: a request needs at least one token")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"inputs[{index}] has token {min(ids) if min(ids) < 0 else max(ids)}, outside 0..{vocabulary - 1}"
            )
        prompts.append(list(ids))
    return prompts


def _option(options: Any, name: str, default: int) -> int:
    value = getattr(options, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"continuous_batching_config.{name} must be an int of at least 1, got {value!r}")
    return value
