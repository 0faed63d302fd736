"""Continuous batching under a policy: which requests run when, and in which cache.

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ._C import OutOfPages
from .attention import cache_argument
from .cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .sampling import Sampler
    from .store import PageStorage


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
    copies: list[int]  # samples of each prompt: requests per row
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
        now, requests = time.perf_counter(), [request for group in groups for request in group]
        for request in requests:
            request.output.status = RequestStatus.PREFILLING
            request.output.lifespan = (now, -1)
        self.prompts = Prompts(cache, requests, tokens, real, [len(x) for x in groups])

    def _read_prompts(self, prompts: Prompts) -> None:
        """The next chunk; after the last one the requests have their first token and are ready to run."""
        start, width = prompts.done, prompts.tokens.shape[1]
        end = min(width, start + max(1, self.max_batch_tokens // len(prompts.tokens)))
        if prompts.cache.policy.routes:  # which needs all of a prompt at once
            end = width
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
        copies = torch.tensor(prompts.copies)
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
