"""Which causal LMs of the installed transformers work: a tiny model of every class, wrapped against unwrapped.

python -m kvcache.evaluation.compatibility [--only NAME ...] [--jobs N] [--json FILE] [--timeout S]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .console import console, ticking

SINKS, KEPT, PROMPT, NEW = 4, 12, 40, 24
LIVELY = 3  # different tokens among NEW: below that, errors could hide behind one token repeated
STRENGTHS = (1.0, 2.0, 4.0)  # of the random weights, tried in this order until the model is lively
MEMORY = 12 << 30  # bytes of address space on top of the parent's: a hog ends itself, not the sweep


def classes() -> dict[str, str]:
    """Class name -> the first model type that maps to it."""
    found: dict[str, str] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            found.setdefault(name, model_type)
    return found


def prompts(rows: int) -> tuple[Tensor, Tensor]:
    """Left-padded random ids and mask, [rows, PROMPT]; the first row has no padding."""
    ids = torch.randint(3, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 7 * row] = ids[row, : 7 * row] = 0
    return ids, mask


@torch.no_grad()
def continued(model: Any, rows: int) -> Tensor:
    ids, mask = prompts(rows)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, PROMPT:]


@torch.no_grad()
def evicted_by_mask(model: Any, new: Tensor) -> Tensor:
    """The tokens [1, NEW] that the unwrapped model wants after each of ``new`` [1, NEW] when StreamingLLM's closed
    form hides keys: a query past the prompt sees the sinks, the KEPT tokens before it and itself."""
    registry = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    plain = registry["eager"]
    calls = []

    def hiding(*args: Any, **kwargs: Any) -> Any:
        mask = plain(*args, **{**kwargs, "allow_is_causal_skip": False})
        if mask is None:
            return None
        calls.append(mask)
        query, key = torch.arange(mask.shape[-2])[:, None], torch.arange(mask.shape[-1])
        hidden = (query >= PROMPT) & (key >= SINKS) & (key < query - KEPT)
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    registry["eager"] = hiding
    try:
        ids = torch.cat([prompts(1)[0], new[:, :-1]], 1)
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        registry["eager"] = plain
    if not calls:
        raise NotImplementedError("the model makes masks of its own: no dense oracle")
    return logits[:, PROMPT - 1 :].argmax(-1)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def measure(name: str, model_type: str) -> dict[str, Any]:
    """The row of one class."""
    import kvcache

    from .tiny_models import tiny_model

    row: dict[str, Any] = {"model_type": model_type}
    truth: dict[int, Tensor] = {}
    for strength in STRENGTHS:
        try:
            model = tiny_model(getattr(transformers, name), model_type, gain=strength)
        except Exception as error:
            return row | {"outcome": "not built", "reason": describe(error)}
        try:
            truth = {rows: continued(model, rows) for rows in (1, 3)}
        except Exception as error:
            return row | {"outcome": "does not generate", "reason": describe(error)}
        row["distinct"] = len(truth[1].unique())
        if row["distinct"] >= LIVELY:
            break
    try:
        kvcache.wrap(model, "full")
    except Exception as error:
        return row | {"outcome": "refused", "reason": describe(error)}
    state: Any = model._kvcache_state
    tiers = getattr(state, "tiers", None) or {
        i: "materialised" if i in state.materialised else "handle" for i in range(len(state.windows))
    }
    row["tiers"] = [tiers[i] for i in sorted(tiers)]
    for column, rows in (("single", 1), ("padded", 3)):
        try:
            row[column] = "identical" if torch.equal(continued(model, rows), truth[rows]) else "different"
        except Exception as error:
            row[column] = describe(error)
    try:
        kvcache.wrap(model, f"streamingllm(sinks={SINKS}, window={KEPT})")
        new = continued(model, 1)
        kvcache.unwrap(model)
        row["eviction"] = "identical" if torch.equal(evicted_by_mask(model, new), new) else "different"
    except NotImplementedError as error:
        row["eviction"] = str(error)
    except Exception as error:
        row["eviction"] = describe(error)
    kinds = set(row["tiers"])
    worst = next((k for k in ("own", "pre-hook", "materialised") if k in kinds), "handle")
    same = row["single"] == row["padded"] == "identical"
    wrong = next((row[c] for c in ("single", "padded") if row[c] not in ("identical", "different")), None)
    if not same:
        return row | {"outcome": "error" if wrong else "different", "reason": wrong or "tokens differ"}
    return row | {"outcome": worst, "reason": ""}


def _child(connection: Any, name: str, model_type: str) -> None:
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        connection.send(measure(name, model_type))
    except BaseException as error:
        connection.send({"model_type": model_type, "outcome": "crashed", "reason": describe(error)})


def guarded(name: str, model_type: str, timeout: float) -> dict[str, Any]:
    """:func:`measure` in a process of its own: a crash or a hang costs one row."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, name, model_type))
    begin = time.perf_counter()
    process.start()
    there.close()
    try:
        row = here.recv() if here.poll(timeout) else None
        reason = f"no answer within {timeout:g} s"
    except EOFError:
        row, reason = None, "the process died"
    if row is None:
        process.kill()
    process.join()
    row = row or {"model_type": model_type, "outcome": "crashed", "reason": reason}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcache.evaluation.compatibility", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes; measured again if already there")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds per class")
    parser.add_argument("--json", type=Path, help="results; classes already in it are not measured again")
    options = parser.parse_args(argv)
    path = options.json or Path(f"bench/results/compatibility/transformers-{transformers.__version__}.json")
    found = json.loads(path.read_text())["classes"] if path.exists() else {}
    every = classes()
    if unknown := sorted(set(options.only or ()) - set(every)):
        parser.error(f"not in the causal-LM mapping of transformers {transformers.__version__}: {', '.join(unknown)}")
    todo = options.only or [name for name in every if name not in found]
    transformers.logging.set_verbosity_error()
    path.parent.mkdir(parents=True, exist_ok=True)
    with ticking(console(), len(todo)) as ticker, ThreadPoolExecutor(options.jobs) as pool:
        jobs = pool.map(lambda name: (name, guarded(name, every[name], options.timeout)), todo)
        for name, row in jobs:
            found[name] = row
            ticker.phase(f"{name} {row['outcome']}")
            ticker.tick()
            versions = {"transformers": transformers.__version__, "torch": torch.__version__}
            path.write_text(json.dumps({"versions": versions, "classes": dict(sorted(found.items()))}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
