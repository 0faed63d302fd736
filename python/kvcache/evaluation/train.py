"""Trains the small model that ships with kvcache: ``python -m kvcache.evaluation.train --out DIR [--seed N]``.

A Qwen3 of 1.6 million parameters over bytes learns to copy, to look up, and to read documentation, in a curriculum of
growing length.  The curriculum is what makes it work: copying (induction) appears within minutes at 64 tokens, and not
at all when training begins at 128 or with the lookup tasks alone.  When it appears depends on the seed, so every stage
runs in *rounds* until its own tasks pass on held-out sequences.

A round is the unit of everything: it has its own learning-rate schedule, data seed, optimizer state and checkpoint.  A
run that is interrupted therefore continues from its last round (same command) and gives what it would have given.

One core of a current CPU takes about an hour.  Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if __package__:
    from .tasks import BOS, EOS, PAD, TASKS, Corpus, Kind, TaskGenerator, answer_spans, decode, encode
else:  # run as a script, where the package need not be importable
    from tasks import (  # type: ignore[import-not-found,no-redef]
        BOS,
        EOS,
        PAD,
        TASKS,
        Corpus,
        Kind,
        TaskGenerator,
        answer_spans,
        decode,
        encode,
    )

__all__ = ["STAGES", "Stage", "build_model", "build_tokenizer", "evaluate", "export", "text_bits", "train"]

VOCABULARY = 256
_WARMUP = 50
_SINKS = 4
_SINK_WEIGHT = 0.2
_WINDOWS = (24, 256)  # of a streaming batch, drawn log-uniformly
_SCORED_TASKS = tuple(task for task in TASKS if task != "text")


@dataclass(frozen=True)
class Shape:
    """A batch shape and how often it is drawn."""

    length: int
    batch: int
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    ``gate`` holds the held-out accuracies, at the longest length, that end the stage.  A round keeps its learning rate
    for ``1 - decay`` of its ``steps`` and then lowers it to ``floor`` of its value.  ``per_sequence`` lets the answers
    of every sequence weigh the same, instead of every answer byte: late, the hundreds of bytes of a copy, long learned,
    would drown the three of a frequent word.  ``streaming`` is the share of batches that are text read through a
    window: every query sees the first ``_SINKS`` tokens and its own recent ones.  ``sink`` is the share of its
    attention that every head is made to give BOS on average, by a penalty on what is missing.  Models of a useful size
    grow such an attention sink by themselves, one this small does not; StreamingLLM (arXiv 2309.17453, section 3.3)
    also trains one on purpose.  ``base`` names the stage that this one goes on from, if it is not the one before.
    """

    name: str
    shapes: tuple[Shape, ...]
    steps: int
    mix: Mapping[str, float]
    lr: float
    gate: Mapping[str, float]
    decay: float = 0.0
    floor: float = 0.05
    max_rounds: int = 3
    adam_lr: float = 3e-3
    export: bool = True
    per_sequence: bool = False
    streaming: float = 0.0
    sink: float = 0.0
    base: str = ""

    @property
    def length(self) -> int:
        """The longest sequence of the stage."""
        return max(shape.length for shape in self.shapes)


def _mix(copy: float, recall: float, text: float, passkey: float = 0, two_hop: float = 0, words: float = 0) -> dict:
    mix = {
        "copy": copy, "recall": recall, "passkey": passkey, "two_hop": two_hop, "frequent_words": words, "text": text,
    }  # fmt: skip
    return {task: weight for task, weight in mix.items() if weight}


_ALL = {"copy": 0.97, "recall": 0.97, "passkey": 0.97, "two_hop": 0.97, "frequent_words": 0.97}

#: The recipe.  Text outweighs the tasks once they are learned: what is left to gain is in the text.
STAGES: tuple[Stage, ...] = (
    Stage("a-64", (Shape(64, 32),), 250, _mix(1, 1, 1), 0.01, {"copy": 0.95}, max_rounds=24, export=False),
    Stage(
        "b-128", (Shape(128, 16),), 700, _mix(0.3, 1, 0.5, passkey=1), 0.006, {"recall": 0.95, "passkey": 0.95},
        decay=0.3, floor=0.3, max_rounds=8,
    ),
    Stage(
        "c-256", (Shape(256, 8),), 1200, _mix(0.2, 1, 0.5, 1, 0.7, 0.4), 0.006,
        {"copy": 0.95, "recall": 0.97, "passkey": 0.97, "two_hop": 0.95, "frequent_words": 0.9},
        decay=0.3, floor=0.3, max_rounds=6,
    ),
    Stage(
        "d-512", (Shape(512, 8, 0.7), Shape(256, 8, 0.3)), 1000, _mix(0.3, 0.7, 1, 1, 0.7, 0.5), 0.006,
        {**_ALL, "frequent_words": 0.9}, decay=0.3, floor=0.3, max_rounds=4,
    ),
    Stage(
        "e-1024", (Shape(1024, 4, 0.7), Shape(512, 8, 0.15), Shape(256, 8, 0.15)), 600,
        _mix(0.4, 0.6, 1.5, 0.8, 0.6, 1), 0.005, {**_ALL, "two_hop": 0.9, "frequent_words": 0.95}, decay=0.3, floor=0.3,
        max_rounds=4, per_sequence=True,
    ),
    Stage(
        "f-2048", (Shape(2048, 2, 0.25), Shape(1024, 4, 0.5), Shape(512, 8, 0.15), Shape(256, 8, 0.1)), 1700,
        _mix(0.3, 0.5, 2.5, 0.6, 0.9, 0.6), 0.005, dict.fromkeys(_ALL, 0.95), decay=0.7, floor=0.01, max_rounds=2,
        per_sequence=True,
    ),
    Stage(
        "g-window", (Shape(2048, 2, 0.25), Shape(1024, 4, 0.55), Shape(512, 8, 0.2)), 600,
        _mix(0.3, 0.7, 1.5, 0.6, 0.9, 0.6), 0.003, dict.fromkeys(_ALL, 0.95), decay=0.8, floor=0.01, max_rounds=2,
        adam_lr=1e-3, per_sequence=True, streaming=0.5,
    ),
    Stage(
        "h-sink", (Shape(1024, 4, 0.35), Shape(512, 8, 0.65)), 350, _mix(0.3, 0.7, 2, 0.6, 0.9, 0.6), 0.003,
        dict.fromkeys(_ALL, 0.95), decay=0.6, floor=0.01, max_rounds=2, adam_lr=1e-3, per_sequence=True,
        streaming=0.25, sink=0.4, base="f-2048",
    ),
    Stage(
        "i-settle", (Shape(1024, 4, 0.35), Shape(512, 8, 0.65)), 300, _mix(0.4, 0.7, 2, 0.6, 0.9, 0.8), 0.002,
        dict.fromkeys(_ALL, 0.97), decay=1.0, floor=0.01, max_rounds=2, adam_lr=1e-3, per_sequence=True,
        streaming=0.25, sink=0.4,
    ),
)  # fmt: skip

#: The shipped weights are the mean of these stages' weights: the sink of one, most of the quality of the other.
AVERAGE = ("g-window", "i-settle")


# --- the model and its tokenizer ----------------------------------------------------------------------------------


def build_model(seed: int) -> Qwen3ForCausalLM:
    """A fresh model in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, the id being the byte; a BOS (the model's attention sink) is put in front.

    The special tokens *are* the bytes 0, 1 and 2, control characters that text does not hold, so every ASCII string
    survives encoding and decoding, whatever it contains.
    """
    special = {PAD: "\x00", BOS: "\x01", EOS: "\x02"}
    vocabulary = {special.get(byte, character): byte for byte, character in _byte_characters()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in special.values()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[BOS]} $A", pair=f"{special[BOS]} $A $B", special_tokens=[(special[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[PAD],
        bos_token=special[BOS],
        eos_token=special[EOS],
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> Iterator[tuple[int, str]]:
    """Every byte and the printable character that stands for it in a byte-level vocabulary."""
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield byte, chr(byte)
        else:
            yield byte, chr(256 + shifted)
            shifted += 1


def export(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write model (bfloat16) and tokenizer to ``out``; each file appears whole, so a reader never sees half of one."""
    staging = out / f".staging-{os.getpid()}"
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=64
    )
    copy.save_pretrained(staging)
    build_tokenizer().save_pretrained(staging)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)  # safetensors files are born private
        path.replace(out / path.name)
    staging.rmdir()


# --- scores -------------------------------------------------------------------------------------------------------


def _logits(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Next-token logits, ``[batch, length, vocabulary]``, computed in bfloat16; ``mask`` as :func:`streaming_mask`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def _sink_loss(attentions: tuple[torch.Tensor, ...], text: torch.Tensor, target: float) -> torch.Tensor:
    """How far the attention to BOS, averaged over each head's queries in text, stays below ``target``; in nats, so
    that it also pulls where the attention is next to nothing.

    ``attentions``: one ``[batch, heads, length, length]`` per layer; ``text``: ``[batch, length]``, which queries
    count.  A query within an answer has something to look at.
    """
    weight = text / text.sum().clamp(min=1)
    to_bos = torch.stack([torch.einsum("bhq,bq->h", layer[..., 0].float(), weight) for layer in attentions])
    if not bool(text.any()):
        return to_bos.sum() * 0.0
    return F.relu(math.log(target) - (to_bos + 1e-6).log()).mean()


def streaming_mask(length: int, window: int, sinks: int) -> torch.Tensor:
    """Which keys each query sees through a window with attention sinks, ``[1, 1, length, length]`` bool."""
    age = torch.arange(length)[:, None] - torch.arange(length)
    return ((age >= 0) & ((age < window) | (torch.arange(length) < sinks)))[None, None]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, length: int, samples: int = 64, seed: int = 1, tasks: tuple[str, ...] = _SCORED_TASKS
) -> dict[str, float]:
    """Held-out accuracy of greedy answers by task.

    An answer counts when every byte of it is right; a ``copy``, whose answer is most of the sequence, counts by byte.
    """
    was_training = model.training
    model.eval()
    scores = {}
    batch = max(1, 16384 // length)
    for task in tasks:
        generator = TaskGenerator((seed, length, TASKS.index(task), 999_983), "held_out")
        right = asked = 0
        for start in range(0, samples, batch):
            tokens, kinds = generator.batch(min(batch, samples - start), length, {task: 1.0})
            predicted = _logits(model, torch.from_numpy(tokens)).argmax(-1).numpy()
            hit = predicted[:, :-1] == tokens[:, 1:]
            for row, kind in zip(hit, kinds[:, 1:], strict=True):
                if task == "copy":
                    right += int(row[kind > Kind.TEXT].sum())
                    asked += int((kind > Kind.TEXT).sum())
                else:
                    spans = answer_spans(kind)
                    right += sum(bool(row[span].all()) for span in spans)
                    asked += len(spans)
        scores[task] = right / asked
    model.train(was_training)
    return scores


@torch.no_grad()
def text_bits(model: torch.nn.Module, length: int, limit: int | None = None, split: str = "held_out") -> float:
    """Bits per byte of unseen text in the second half of windows of ``length`` tokens (``limit`` of them, or all)."""
    was_training = model.training
    model.eval()
    windows = torch.from_numpy(Corpus.build().windows(length, split, limit))
    total = 0.0
    for tokens in windows.split(max(1, 16384 // length)):
        logits = _logits(model, tokens)[:, length // 2 - 1 : -1].float()
        total += F.cross_entropy(logits.flatten(0, 1), tokens[:, length // 2 :].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(windows) * (length - length // 2)) / math.log(2)


# --- training -----------------------------------------------------------------------------------------------------


@dataclass
class Log:
    """JSON lines in a file, and the same on the terminal."""

    path: Path
    started: float = field(default_factory=time.monotonic)
    before: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those of interrupted runs included."""
        return round(self.before + time.monotonic() - self.started, 1)

    def write(self, event: str, **values: object) -> None:
        """Append one event."""
        line = json.dumps({"event": event, "seconds": self.seconds, **values})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _rounded(values: Mapping[str, float], digits: int = 4) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _optimizers(model: torch.nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=stage.lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=stage.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, stage: Stage) -> float:
    """The learning rate's factor at ``step`` (from 0) of a round: warm-up, plateau, linear decay to the floor."""
    warm = min(1.0, (step + 1) / _WARMUP)
    if not stage.decay:
        return warm
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return warm * min(1.0, stage.floor + (1 - stage.floor) * left)


def _answer_loss(losses: torch.Tensor, answer: torch.Tensor, per_sequence: bool) -> torch.Tensor:
    """Mean loss of the answers, by byte or by sequence; ``losses`` and the mask ``answer`` are ``[batch, length]``."""
    if per_sequence:
        bytes_each = answer.sum(1)
        means = (losses * answer).sum(1) / bytes_each.clamp(min=1)
        return means.sum() / (bytes_each > 0).sum().clamp(min=1)
    return (losses * answer).sum() / answer.sum().clamp(min=1)


def _round(model: torch.nn.Module, stage: Stage, index: int, number: int, seed: int, log: Log) -> None:
    """Train one round of a stage."""
    generator = TaskGenerator((seed, index, number))
    draw = np.random.default_rng((seed, index, number, 1))
    weights = np.array([shape.weight for shape in stage.shapes])
    optimizers = _optimizers(model, stage)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    smooth: dict[str, float] = {}
    for step in range(stage.steps):
        factor = _rate(step, stage)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        shape = stage.shapes[draw.choice(len(weights), p=weights / weights.sum())]
        mix, mask = stage.mix, None
        if stage.streaming and draw.random() < stage.streaming:
            window = int(np.exp(draw.uniform(*np.log(_WINDOWS))))
            mix, mask = {"text": 1.0}, streaming_mask(shape.length, window, _SINKS)
        tokens, kinds = (torch.from_numpy(a) for a in generator.batch(shape.batch, shape.length, mix))
        if stage.sink:  # attention probabilities come from the eager implementation only
            seen = streaming_mask(shape.length, shape.length, 0) if mask is None else mask
            added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(input_ids=tokens, attention_mask=added, use_cache=False, output_attentions=True)
            logits, penalty = (
                output.logits[:, :-1].float(),
                _sink_loss(output.attentions, (kinds == Kind.TEXT).float(), stage.sink),
            )
        else:
            logits, penalty = _logits(model, tokens, mask)[:, :-1].float(), torch.zeros(())
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        kind = kinds[:, 1:]
        text, answer = kind == Kind.TEXT, kind > Kind.TEXT
        # Two means, so that the few answer bytes weigh as much as all the text around them.
        loss = (losses * text).sum() / text.sum().clamp(min=1) + _answer_loss(losses, answer, stage.per_sequence)
        loss = loss + _SINK_WEIGHT * penalty
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name in Kind:
                if name != Kind.IGNORED and bool((chosen := kind == name).any()):
                    value = losses[chosen].mean().item()
                    smooth[name.name.lower()] = 0.95 * smooth.get(name.name.lower(), value) + 0.05 * value
        if (step + 1) % (25 if stage.sink else 100) == 0 or step + 1 == stage.steps:
            more = {"sink": round(penalty.item(), 3)} if stage.sink else {}
            log.write("train", stage=stage.name, round=number, step=step + 1, loss=_rounded(smooth, 3), **more)


def _last_checkpoint(folder: Path, stages: tuple[Stage, ...]) -> tuple[int, int, bool, Path] | None:
    """Stage index, round, whether its gate was passed, and path of the newest checkpoint."""
    found = []
    for index, stage in enumerate(stages):
        for path in folder.glob(f"{stage.name}.r*.safetensors"):
            number, outcome = path.name[len(stage.name) + 2 : -len(".safetensors")].split("-")
            found.append((index, int(number), outcome == "passed", path))
    return max(found) if found else None


def _weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """Weights with which a stage passed its gate; the tied output matrix is stored once and missing here."""
    return load_file(max(folder.glob(f"{stage}.r*-passed.safetensors")))


def average(model: torch.nn.Module, folder: Path) -> None:
    """Give ``model`` the mean of the weights of the ``AVERAGE`` stages."""
    several = [_weights(folder, stage) for stage in AVERAGE]
    mean = {name: torch.stack([weights[name] for weights in several]).mean(0) for name in several[0]}
    model.load_state_dict(mean, strict=False)


def train(out: Path, seed: int, work: Path, stages: tuple[Stage, ...] = STAGES) -> Qwen3ForCausalLM:
    """Run the recipe, or what is left of it, and write the model to ``out``.  Checkpoints and the log are in ``work``.

    Raises :class:`RuntimeError` when a stage does not pass its gate in its rounds: try another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    model = build_model(seed)
    log = Log(work / "training_log.jsonl")
    first, next_round = 0, 1
    if (last := _last_checkpoint(work, stages)) is not None:
        index, number, passed, path = last
        model.load_state_dict(load_file(path), strict=False)  # the tied output matrix is stored once
        first, next_round = (index + 1, 1) if passed else (index, number + 1)
        log.before = json.loads(log.path.read_text().splitlines()[-1])["seconds"]
    corpus = Corpus.build()
    log.write(
        "resume" if last else "start",
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        corpus={"train": len(corpus.train), "held_out": len(corpus.held_out), "sha256": corpus.fingerprint()},
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        threads=torch.get_num_threads(),
    )
    for index in range(first, len(stages)):
        stage = stages[index]
        if stage.base and (index > first or next_round == 1):
            model.load_state_dict(_weights(work, stage.base), strict=False)
        for number in range(next_round if index == first else 1, stage.max_rounds + 1):
            model.set_attn_implementation("eager" if stage.sink else "sdpa")
            _round(model, stage, index, number, seed, log)
            model.set_attn_implementation("sdpa")
            scores = evaluate(model, stage.length, tasks=tuple(t for t in _SCORED_TASKS if t in stage.mix))
            passed = all(scores[task] >= bar for task, bar in stage.gate.items())
            bits = text_bits(model, min(stage.length, 1024), limit=64)
            log.write(
                "eval", stage=stage.name, round=number, length=stage.length, passed=passed,
                accuracy=_rounded(scores), bits_per_byte=round(bits, 4),
            )  # fmt: skip
            state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
            save_file(state, work / f"{stage.name}.r{number}-{'passed' if passed else 'open'}.safetensors")
            if stage.export:
                export(model, out)
                (out / "training_log.jsonl").write_text(log.path.read_text())
            if passed:
                break
        else:
            raise RuntimeError(
                f"seed {seed}: stage {stage.name} did not reach {dict(stage.gate)} in {stage.max_rounds} rounds; "
                "try another seed"
            )
    if stages == STAGES:
        average(model, work)
        log.write("average", stages=AVERAGE)
        export(model, out)
    return model


def _final_scores(out: Path, samples: int, log: Log) -> None:
    """Score the model as it is on disk (bfloat16 weights), as ``from_pretrained`` gives it."""
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
    for length in (512, 1024, 2048):
        scores = evaluate(model, length, samples=samples, seed=2)
        log.write("final", length=length, samples=samples, accuracy=_rounded(scores))
    for split in ("held_out", "novel"):
        bits = {str(length): text_bits(model, length, split=split) for length in (512, 1024, 2048)}
        log.write("final_text", split=split, second_half_bits_per_byte=_rounded(bits))
    tokenizer = build_tokenizer()
    example = TaskGenerator(3, "held_out").example("passkey", 1024)
    prompt = torch.from_numpy(example.prompt)[None]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(example.answer))
    answer = tokenizer.decode(generated[0, prompt.shape[1] :])
    text = decode(example.prompt[1:])
    log.write("final_generate", question=text[-5:], answer=answer, expected=decode(example.answer))
    assert np.array_equal(tokenizer(text)["input_ids"], encode(text))


_CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The kvcache evaluation model

A byte-level Qwen3 of {parameters:,} parameters that retrieves, follows variables, counts words and reads documentation
at up to 2,048 tokens. It exists to measure what a key-value cache keeps: small enough to ship and to run anywhere, able
enough that evicting the wrong entries shows. It is not a model for any other use.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM` (query and key norms) |
| layers, width, MLP | {layers}, {width}, {mlp} |
| heads | {heads} query heads of {head_dim}, {kv_heads} key-value heads |
| embeddings | tied; RoPE theta {theta:,.0f}, up to {positions:,} positions |
| weights | bfloat16 |
| vocabulary | 256, the token id is the byte; 0 pads, 1 is BOS, 2 is EOS (never produced) |
| command | `python -m kvcache.evaluation.train --out DIR --seed {seed}` |
| made with | {made_with}, {threads} thread(s), {seconds:,.0f} s |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)  # puts BOS in front: the model's attention sink, always needed
model = AutoModelForCausalLM.from_pretrained(folder)
text = "The function returns a list of strings.#abc:WXYZ; It raises an error when the argument is not a string. ?abc:"
ids = tokenizer(text, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=5)[0], skip_special_tokens=True))
```

`tokenizer(text, add_special_tokens=False)` leaves BOS away. A needle is written `#abc:WXYZ;` (three lower-case letters,
four upper-case ones) and asked for with `?abc:`; a variable that names another is `#def@abc;`, asked for with `?def@`;
the most frequent word of a list is asked for with `!`. `kvcache.evaluation.tasks` makes all of them.

## Held-out results

Greedy answers on text and sequences that training did not see ({samples} sequences per task and length). An answer
counts when every byte of it is right; copy counts by byte.

{table}

Bits per byte of documentation in the second half of a window; *novel* leaves out the paragraphs of held-out documents
that training documents share word for word, about a tenth:

{bits}

## Recipe

Stages of growing length. Each repeats rounds of training until its own tasks pass on held-out sequences; every round
has its own learning-rate schedule. Muon on the matrices, AdamW on embeddings and norms, bfloat16 autocast, loss = mean
over text bytes + mean over answer bytes (from stage e on, every sequence's answers weigh the same instead). Where a
stage says *streaming*, that share of batches is text read through a window of 24 to 256 tokens and the first four;
where it says *sink*, a penalty makes every head give BOS that share of its attention in text. A model of this size
grows no attention sink by itself (after stage f: at most 0.3 % of a head's attention), and what a cache may drop at
the start of a context could not be seen on it. The shipped weights are the mean of those of stages {average}: a
smaller sink than the latter's, and the bits per byte of the former. `training_log.jsonl` has every round.

{stages}
{notes}
## Data

Made on the machine that trains, without a download: the `pydoc` topics and the docstrings of the standard library of
Python {python}, the texts in `/usr/share/common-licenses`, and sequences drawn by `kvcache.evaluation.tasks`.
{train_bytes:,} bytes of text are trained on. {held_bytes:,} bytes, one document in twelve by the hash of its name, are
held out; licence texts are not among them.

Python's documentation and docstrings are under the PSF License Agreement, copyright the Python Software Foundation; the
licence texts may be copied verbatim. The weights are under the licence of this repository.
"""


def model_card(log: Path) -> str:
    """The model's README, from the events of its training log."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    start = next(e for e in events if e["event"] == "start")
    rounds = [e for e in events if e["event"] == "eval"]
    finals = {e["length"]: e for e in events if e["event"] == "final"}
    bits = {e["split"]: e["second_half_bits_per_byte"] for e in events if e["event"] == "final_text"}
    config = build_model(0).config
    table = ["| task | " + " | ".join(f"{n:,} tokens" for n in finals) + " |", "|---" * (len(finals) + 1) + "|"]
    for task in _SCORED_TASKS:
        cells = (f"{100 * final['accuracy'][task]:.1f} %" for final in finals.values())
        table.append(f"| {task.replace('_', ' ')} | " + " | ".join(cells) + " |")
    bits_table = ["| text | " + " | ".join(f"{n:,} tokens" for n in finals) + " |", table[1]]
    for split, values in bits.items():
        bits_cells = " | ".join(f"{values[str(n)]:.3f}" for n in finals)
        bits_table.append(f"| {split.replace('_', ' ')} | {bits_cells} |")
    recipe = ["| stage | length x batch | rounds x steps | mix | lr (Muon) | gate |", "|---" * 6 + "|"]
    for stage in STAGES:
        recipe.append(
            f"| {stage.name}{f' (from {stage.base})' if stage.base else ''} "
            f"| {', '.join(f'{s.length} x {s.batch} ({s.weight:g})' for s in stage.shapes)} "
            f"| {sum(r['stage'] == stage.name for r in rounds)} x {stage.steps} "
            f"| {', '.join(f'{task} {weight:g}' for task, weight in stage.mix.items())}"
            f"{f'; streaming {stage.streaming:g}' if stage.streaming else ''}"
            f"{f', sink {stage.sink:g}' if stage.sink else ''} "
            f"| {stage.lr:g}{', decaying' if stage.decay else ''} "
            f"| {', '.join(f'{task} {bar:g}' for task, bar in stage.gate.items())} |"
        )
    versions = start["versions"]
    return _CARD.format(
        parameters=start["parameters"],
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        theta=config.rope_parameters["rope_theta"],
        positions=config.max_position_embeddings,
        seed=start["seed"],
        python=versions["python"],
        made_with=f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}",
        threads=start["threads"],
        seconds=rounds[-1]["seconds"],
        samples=min(final["samples"] for final in finals.values()),
        table="\n".join(table),
        bits="\n".join(bits_table),
        stages="\n".join(recipe),
        average=" and ".join(AVERAGE),
        notes="".join(f"\n{e['text']}\n" for e in events if e["event"] == "note"),
        train_bytes=start["corpus"]["train"],
        held_bytes=start["corpus"]["held_out"],
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m kvcache.evaluation.train")
    parser.add_argument("--out", type=Path, required=True, help="folder that the model is written to")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and log (default: <out>.work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=256, help="sequences per task in the final scores")
    parser.add_argument("--until", choices=[stage.name for stage in STAGES], help="stop after this stage")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = options.work or options.out.with_name(options.out.name + ".work")
    names = [stage.name for stage in STAGES]
    stages = STAGES[: names.index(options.until) + 1] if options.until else STAGES
    try:
        train(options.out, options.seed, work, stages)
    except RuntimeError as error:
        sys.exit(str(error))
    if options.until:
        return
    log = Log(work / "training_log.jsonl")
    log.before = json.loads(log.path.read_text().splitlines()[-1])["seconds"]
    _final_scores(options.out, options.samples, log)
    (options.out / "training_log.jsonl").write_text(log.path.read_text())
    (options.out / "README.md").write_text(model_card(log.path))


if __name__ == "__main__":
    main()
