"""Continuous batching under a policy: ``generate_batch`` of a wrapped model.

Requests join and leave one running batch between decode steps. A prompt is read in a cache of its own, in chunks that
take turns with the decode steps of the requests that are already running; when it is complete, its rows join the
running cache without moving an entry: both take their pages from one pool. A decode step holds one token per running
request and nothing else. Rows begin at different columns, as rows padded on the left do; a padded row behaves in every
policy as it would alone, and so does a request beside others.

Source: iteration-level scheduling, Orca (Yu et al., OSDI 2022, section 4.1); chunks of prompts between decode steps,
Sarathi (arXiv 2308.16369).
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ._C import OutOfPages
from .attention import cache_argument
from .cache import KVCache
from .cache_layers import is_stateful
from .layers import wrapped_state
from .sampling import Sampler

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from .store import PageStorage

MAX_ROWS = 64
MAX_BATCH_TOKENS = 2048


@dataclass
class Request:
    """One sequence on its way: what the user gets, and how far it may go."""

    output: GenerationOutput
    max_new_tokens: int

    @property
    def total(self) -> int:
        """Entries that a cache which drops nothing holds in the end; the last token is never stored."""
        return len(self.output.prompt_ids) + self.max_new_tokens - 1


@dataclass
class Rows:
    """Requests that share a cache, one per row."""

    cache: KVCache
    requests: list[Request]

    def pages_bound(self) -> dict[PageStorage, int]:
        bounds = self.cache.engine.pages_bound([x.total for x in self.requests])
        return {storage: int(pages.sum()) for storage, pages in bounds.items()}


@dataclass
class Prompts(Rows):
    """Requests whose prompts are being read, padded on the left to the longest."""

    tokens: Tensor  # int64 [rows, columns]
    real: Tensor  # bool [rows, columns]
    done: int = 0  # columns read


@dataclass
class Scheduler:
    """Brings requests through prompt and decoding, as many at once as rows and pages allow, first come first served."""

    model: PreTrainedModel
    sampler: Sampler
    max_rows: int
    max_batch_tokens: int
    max_tokens: int | None
    page_size: int
    waiting: deque[list[Request]] = field(default_factory=deque)  # requests of one prompt (several samples) together
    prompts: Prompts | None = None
    ready: deque[Rows] = field(default_factory=deque)  # prompts read, but no room to run yet
    running: Rows | None = None
    finished: list[Request] = field(default_factory=list)
    storages: dict[tuple, PageStorage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = inspect.signature(type(self.model).forward).parameters
        self._cache_name = cache_argument(names)
        self._takes = {x for x in ("position_ids", "logits_to_keep") if x in names}

    # -- scheduling -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.ready or self.prompts or self.running)

    def step(self) -> None:
        """One turn: whoever is ready joins, one chunk of prompts is read, every running request gets a token."""
        if self.prompts is None and not self.ready and self.waiting:
            self._begin_prompts()
        if self.prompts is not None:
            self._read_prompts(self.prompts)
        while self.ready and self._fits(self.ready[0]):
            self._run(self.ready.popleft())
        if self.running is not None:
            self._decode(self.running)

    def _begin_prompts(self) -> None:
        """Open a cache for the requests at the head of the queue that fit beside the running ones."""
        groups: list[list[Request]] = []
        running = 0 if self.running is None else len(self.running.requests)
        while self.waiting:
            wanted = [*groups, self.waiting[0]]
            rows = sum(map(len, wanted))
            lengths = [len(x[0].output.prompt_ids) for x in wanted]
            # Shorter prompts ride along with the longest, but padding is kept below a quarter of what is computed.
            padded = max(lengths) * len(lengths)
            if groups and (padded > self.max_batch_tokens or 4 * sum(lengths) < 3 * padded):
                break
            if (running or groups) and (rows + running > self.max_rows or not self._has_room(wanted)):
                break
            groups.append(self.waiting.popleft())
        if not groups:
            return
        prompts = [x[0].output.prompt_ids for x in groups]
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            real[row, width - len(ids) :] = True
        cache = KVCache(self.model, max_tokens=self.max_tokens)
        cache.engine.storages = self.storages
        cache.engine.pool_rows = 1  # pages are counted here: partly filled ones are no allowance but part of the room
        cache.engine.prompt_length = width
        now = time.perf_counter()
        for request in (y for x in groups for y in x):
            request.output.status = RequestStatus.PREFILLING
            request.output.lifespan = (now, -1)
        self.prompts = Prompts(cache, [y for x in groups for y in x], tokens, real)
        self._copies = [len(x) for x in groups]

    def _read_prompts(self, prompts: Prompts) -> None:
        """The next chunk; after the last one the requests have their first token and are ready to run."""
        start, width = prompts.done, prompts.tokens.shape[1]
        end = min(width, start + max(1, self.max_batch_tokens // len(prompts.tokens)))
        try:
            logits = self._forward(prompts.cache, prompts.tokens[:, start:end], prompts.real[:, :end])
        except OutOfPages as error:
            self.prompts = None
            self._fail(prompts.requests, error)
            return
        prompts.done = end
        if end < width:
            return
        self.prompts = None
        copies = torch.tensor(self._copies)
        if int(copies.max()) > 1:  # several samples of a prompt share its pages until they write
            prompts.cache._select_rows(torch.arange(len(copies)).repeat_interleave(copies))
            logits = logits.repeat_interleave(copies.to(logits.device), 0)
        rows = Rows(prompts.cache, prompts.requests)
        for request in rows.requests:
            request.output.status = RequestStatus.DECODING
        self._append_tokens(rows, logits)
        if rows.requests:
            self.ready.append(rows)

    def _run(self, rows: Rows) -> None:
        if self.running is None:
            self.running = rows
            return
        self.running.cache.engine.join(rows.cache.engine)
        self.running.requests += rows.requests

    def _decode(self, running: Rows) -> None:
        engine = running.cache.engine
        last = torch.tensor([[x.output.generated_tokens[-1]] for x in running.requests])
        real = None if engine.real is None else torch.nn.functional.pad(engine.real, (0, 1), value=True)
        try:
            logits = self._forward(running.cache, last, real)
        except OutOfPages as error:  # the machine's memory, as max_tokens was kept free: the last to come gives way
            self._fail([running.requests[-1]], error)
            self._keep(running, list(range(len(running.requests) - 1)))
        else:
            self._append_tokens(running, logits)
        if not running.requests:
            self.running = None

    # -- room -------------------------------------------------------------------------------------------------------

    def _has_room(self, groups: list[list[Request]]) -> bool:
        """Whether the pages of these prompts are free beside all that the running requests may come to need."""
        if self.max_tokens is None:
            return True
        page = self.page_size
        if self.running is None:  # what a page costs may not be known yet: all of them must fit to their end
            needed = sum(-(-(r.total + 1) // page) for g in groups for r in g)
            return needed <= -(-self.max_tokens // page)
        heads: dict[PageStorage, int] = {}
        for layer in self.running.cache.engine.layers:
            if layer.store is not None:
                heads[layer.store.storage] = heads.get(layer.store.storage, 0) + layer.store.heads
        # The prompt of each group once, and for every further sample a copy of its last page to write into.
        needed = sum(-(-(len(g[0].output.prompt_ids) + 1) // page) + len(g) - 1 for g in groups)
        held = self.running.pages_bound()
        return all(s.limit is None or held[s] + needed * heads[s] <= s.limit for s in held)

    def _fits(self, rows: Rows) -> bool:
        """Whether ``rows`` may run beside the others until all of them end; alone they always may try."""
        if self.running is None:
            return True
        if len(self.running.requests) + len(rows.requests) > self.max_rows:
            return False
        held, wanted = self.running.pages_bound(), rows.pages_bound()
        return all(s.limit is None or n + held.get(s, 0) <= s.limit for s, n in wanted.items())

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _forward(self, cache: KVCache, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Logits [rows, vocabulary] float32 of the last of ``tokens`` [rows, T]; ``real`` [rows, columns seen + T]."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": tokens.to(device), self._cache_name: cache, "use_cache": True}
        if real is None:
            real = torch.ones(len(tokens), cache.seen_tokens + tokens.shape[1], dtype=torch.bool)
        inputs["attention_mask"] = real.to(device=device, dtype=torch.long)
        if "position_ids" in self._takes:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :].to(device)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs).logits[:, -1].float()

    def _append_tokens(self, rows: Rows, logits: Tensor) -> None:
        """Give every request its next token; those that end leave ``rows``."""
        outputs = [x.output for x in rows.requests]
        tokens, logprobs = self.sampler.choose(outputs, logits)
        now, kept = time.perf_counter(), []
        for row, (request, token) in enumerate(zip(rows.requests, tokens, strict=True)):
            output = request.output
            output.generated_tokens.append(token)
            if logprobs is not None:
                output.logprobs.append(logprobs[row])
            if output.timestamps is not None:
                output.timestamps.append(now)
            if token in self.sampler.eos or len(output.generated_tokens) >= request.max_new_tokens:
                output.status = RequestStatus.FINISHED
                output.lifespan = (output.lifespan[0], now)
                self.finished.append(request)
            else:
                kept.append(row)
        self._keep(rows, kept)

    def _keep(self, rows: Rows, kept: list[int]) -> None:
        if len(kept) == len(rows.requests):
            return
        rows.requests = [rows.requests[i] for i in kept]
        if kept:
            rows.cache._select_rows(torch.tensor(kept))
            rows.cache.engine.drop_padding()
        else:
            rows.cache.reset()

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            request.output.status, request.output.error = RequestStatus.FAILED, str(error)
            request.output.lifespan = (request.output.lifespan[0], time.perf_counter())
            self.finished.append(request)


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
    if getattr(options, "num_blocks", None) is not None:
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
