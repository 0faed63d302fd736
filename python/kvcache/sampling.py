"""The next token of every running request, by the rules of a transformers ``GenerationConfig``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.continuous_batching.requests import GenerationOutput

#: Processors that look at the logits alone: all rows at once. The others see the tokens of their row.
_ROW_FREE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)


class Sampler:
    """Chooses tokens greedily or by sampling.

    Arguments
        model: whose ``generate`` would otherwise choose.
        config: prepared as ``generate`` prepares it.
        seed: of a random generator of its own; None: torch's.
        return_logprobs: whether to give the log probability of each token after all processors.

    Raises ValueError for a way of decoding that is neither greedy nor sampling, and for stops that need text or time.
    """

    def __init__(self, model: PreTrainedModel, config: GenerationConfig, seed: int | None, return_logprobs: bool):
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"generate_batch decodes greedily or by sampling, but the config asks for {mode.value}")
        for name in ("stop_strings", "max_time", "guidance_scale", "watermarking_config"):
            if getattr(config, name, None) not in (None, 1.0):
                raise ValueError(f"{name} is not supported by generate_batch: use generate()")
        self.model, self.config = model, config
        self.return_logprobs = return_logprobs
        model._prepare_special_tokens(config, True, device=model.device)
        eos = config.eos_token_id
        eos = [] if eos is None else eos.tolist() if isinstance(eos, Tensor) else eos
        self.eos = frozenset(eos if isinstance(eos, (list, tuple)) else [eos])
        self._random: torch.Generator | None = None
        if seed is not None:
            self._random = torch.Generator(device=model.device).manual_seed(seed)
        self._processors: dict[int, LogitsProcessorList] = {}

    def _processors_for(self, prompt_tokens: int) -> LogitsProcessorList:
        """As ``generate`` has them for a prompt of that length."""
        found = self._processors.get(prompt_tokens)
        if found is None:
            found = self._processors[prompt_tokens] = self.model._get_logits_processor(
                generation_config=self.config,
                input_ids_seq_length=prompt_tokens,
                logits_processor=LogitsProcessorList(),
                device=self.model.device,
                model_kwargs={},
            )
        return found

    def choose(self, requests: list[GenerationOutput], logits: Tensor) -> tuple[list[int], list[float] | None]:
        """The next token of each request and its log probability (None if not wanted), from ``logits`` [rows, V]."""
        processors = self._processors_for(len(requests[0].prompt_ids))
        if all(isinstance(x, _ROW_FREE) for x in processors):
            scores = processors(torch.empty(len(requests), 0, dtype=torch.long, device=logits.device), logits)
        else:
            rows = []
            for row, request in enumerate(requests):
                ids = torch.tensor([[*request.prompt_ids, *request.generated_tokens]], device=logits.device)
                rows.append(self._processors_for(len(request.prompt_ids))(ids, logits[row : row + 1]))
            scores = torch.cat(rows)
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1, generator=self._random)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if not self.return_logprobs:
            return tokens.tolist(), None
        return tokens.tolist(), scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
