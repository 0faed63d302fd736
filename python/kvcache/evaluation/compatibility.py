"""Which causal LMs of the installed transformers work: a tiny model of every class, wrapped against unwrapped.

python -m kvcache.evaluation.compatibility [--only NAME ...] [--jobs N] [--json FILE] [--again] [--docs FILE]
    [--timeout S]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .console import console, ticking
from .tiny_models import WINDOW, tiny_model

SINKS, KEPT, PROMPT, NEW = 4, 12, 40, 24
TIERS = ("handle", "materialised", "pre-hook", "own")
LIVELY = 3  # different tokens among NEW: below that, errors could hide behind one token repeated
#: Seed and strength of the random weights, tried in this order until the model is lively.
ATTEMPTS = ((0, 1.0), (1, 2.0), (2, 1.0), (3, 4.0), (4, 0.5), (5, 2.0))
MEMORY = 12 << 30  # bytes of address space on top of the parent's: a hog ends itself, not the sweep
#: Why tokens differ where they do, read in the models' sources; shown beside what is measured.
REASONS = {
    "GitForCausalLM": "transformers' text-only steps move the padding mask by the image's tokens: "
    "unwrapped, too, a padded row is not what it is alone",
    "MoshiForCausalLM": "its masks ignore its sliding window, its cache does not: "
    "transformers reads a whole prompt, then the window alone",
    "ProphetNetForCausalLM": "its decoding steps have no padding mask: "
    "transformers attends to padding, which kvcache does not store",
    "Qwen4ExpForCausalLM": "eviction: its indexer still chooses among what was evicted; "
    "the oracle's mask hides that from it",
    "RecurrentGemmaForCausalLM": "its recurrent layers read padding: "
    "unwrapped, too, a padded row is not what it is alone",
}


class NoOracle(Exception):
    """The unwrapped model cannot be made to hide what a policy evicts."""


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
def evicted_by_mask(model: Any, new: Tensor, sinks: int, window: int, sliding: int | None = None) -> Tensor:
    """The tokens [1, NEW] that the unwrapped model wants after each of ``new`` [1, NEW] when StreamingLLM's closed
    form (docs/policies.md) hides keys: a query past the prompt sees the first ``sinks`` tokens, the last ``window``
    before it and itself. ``sliding``: the recent tokens of layers with a sliding window, which then have no sinks."""
    registry = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    plain = registry["eager"]
    calls = []

    def hiding(*args: Any, **kwargs: Any) -> Any:
        mask = plain(*args, **{**kwargs, "allow_is_causal_skip": False})
        if mask is None:
            return None
        calls.append(mask)
        query, key = torch.arange(mask.shape[-2])[:, None], torch.arange(mask.shape[-1])
        first, last = (sinks, window) if sliding is None or kwargs.get("local_size") is None else (0, sliding)
        hidden = (query >= PROMPT) & (key >= first) & (key < query - last)
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    registry["eager"] = hiding
    try:
        ids = torch.cat([prompts(1)[0], new[:, :-1]], 1)
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        registry["eager"] = plain
    if not calls:
        raise NoOracle("no dense oracle: the model makes its own masks")
    return logits[:, PROMPT - 1 :].argmax(-1)


def eviction(model: Any, truth: Tensor) -> dict[str, str]:
    """The wrapped model under StreamingLLM against the closed form; ``truth`` [1, NEW]: its tokens unwrapped."""
    import kvcache

    try:
        kvcache.wrap(model, f"streamingllm(sinks={SINKS}, window={KEPT})")
        new = continued(model, 1)
        kvcache.unwrap(model)
        if not torch.equal(evicted_by_mask(model, truth, SINKS, PROMPT + NEW), truth):
            return {"eviction": "no dense oracle: one pass over all tokens differs from transformers' own decoding"}
        if torch.equal(new, truth):
            return {"eviction": "no dense oracle: the tokens do not depend on what is evicted"}
        if torch.equal(evicted_by_mask(model, new, SINKS, KEPT, sliding=SINKS + KEPT), new):
            return {"eviction": "identical"}
    except NoOracle as error:
        return {"eviction": str(error)}
    except Exception as error:
        return {"eviction": describe(error)}
    return {"eviction": "different"}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def measure(name: str, model_type: str) -> dict[str, Any]:
    """The row of one class."""
    import kvcache

    row: dict[str, Any] = {"model_type": model_type}
    truth: dict[int, Tensor] = {}
    for seed, strength in ATTEMPTS:
        try:
            model = tiny_model(getattr(transformers, name), model_type, seed, strength)
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
    row["tiers"] = [tier for _, tier in sorted(state.tiers.items())]
    for column, rows in (("single", 1), ("padded", 3)):
        try:
            row[column] = "identical" if torch.equal(continued(model, rows), truth[rows]) else "different"
        except Exception as error:
            row[column] = describe(error)
    row |= eviction(model, truth[1])
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


def document(
    found: dict[str, dict[str, Any]],
    versions: dict[str, str],
    others: dict[str, dict[str, dict[str, Any]]] | None = None,
) -> str:
    """docs/compatibility.md: a table of all rows and their counts. ``others``: rows of further transformers versions,
    a column each."""
    others = others or {}
    counts = Counter(row["outcome"] for row in found.values())
    evictions = Counter(_short(row.get("eviction", "")) for row in found.values())
    same = sum(counts[k] for k in TIERS)
    lines = [
        "# Which models work",
        "",
        f"Measured: a tiny random model of each of the {len(found)} classes in the causal-LM mapping of transformers "
        f"{versions['transformers']} (torch {versions['torch']}, CPU). Written by",
        "",
        "```",
        "make compatibility        # python -m kvcache.evaluation.compatibility --again --docs docs/compatibility.md",
        "```",
        "",
        f"Each model generates {NEW} greedy tokens after {PROMPT}, alone (*single*) and in a left-padded batch of "
        "three (*padded*), without kvcache and",
        'with `policy="full"`: the tokens are identical or not. *Eviction* compares '
        f"`streamingllm(sinks={SINKS}, window={KEPT})` with the unwrapped model under a mask",
        "that hides what the policy evicts; `-` says that there is no such oracle for the model (its reason is in "
        "the JSON file). Layers with a sliding window",
        f"have one of {WINDOW} tokens.",
        "",
        f"**{same} of {len(found)} classes generate identical tokens**: "
        + ", ".join(f"{counts[k]} {k}" for k in TIERS if counts[k])
        + ". The rest: "
        + (", ".join(f"{n} {k}" for k, n in counts.most_common() if k not in TIERS) or "none")
        + ". Eviction: "
        + ", ".join(f"{n} {k}" for k, n in evictions.most_common() if k not in ("", "-"))
        + ".",
        "",
        "*handle*: keys and values stay in pages and attention reads them there. *materialised*: they are gathered for "
        "the model's own attention.",
        "*pre-hook*: the model has no attention interface and its own module is served. *own*: some layers keep "
        "transformers' own state.",
        "*not built*, *does not generate*: the sweep could not make a small model, or transformers cannot generate "
        "with it as it is; nothing is said about kvcache.",
        "",
    ]
    for version, rows in others.items():
        right = [name for name in rows if rows[name]["outcome"] in TIERS]
        lines += [
            f"The column *{version}* is the outcome with transformers {version}, whose mapping has {len(rows)} "
            f"classes: **{len(right)} of them identical**, alone and padded.",
            "Empty: that version does not have the class. In brackets: what went wrong there and does not here.",
            "",
        ]
    lines += [
        "| " + " | ".join(["Class", "Outcome", "Single", "Padded", "Eviction", *others, "Reason"]) + " |",
        "|---" * (6 + len(others)) + "|",
    ]
    for name, row in sorted(found.items(), key=lambda item: item[0].lower()):
        cells = [_short(row.get(c, "")) for c in ("single", "padded", "eviction")]
        reason = row.get("reason") or (row.get("eviction", "") if cells[2] == "error" else "")
        if name in REASONS and ("different" in cells or row["outcome"] == "different"):
            reason = REASONS[name]
        if row.get("distinct", LIVELY) < LIVELY:
            reason = "; ".join(filter(None, [reason, f"only {row['distinct']} different tokens"]))
        for rows in others.values():
            there = rows.get(name, {"outcome": ""})
            told = there["outcome"] in (*TIERS, "", row["outcome"])
            cells.append(there["outcome"] if told else f"{there['outcome']} ({_cell(there.get('reason', ''), 80)})")
        lines.append(f"| {name} | {row['outcome']} | {' | '.join(cells)} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str, most: int = 160) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:most]


def _short(cell: str) -> str:
    if cell in ("", "identical", "different"):
        return cell
    return "-" if cell.startswith("no dense oracle") else "error"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcache.evaluation.compatibility", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes; measured again if already there")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds per class")
    parser.add_argument("--json", type=Path, help="results; classes already in it are not measured again")
    parser.add_argument("--again", action="store_true", help="measure those as well")
    parser.add_argument("--docs", type=Path, help="write the table there")
    options = parser.parse_args(argv)
    path = options.json or Path(f"bench/results/compatibility/transformers-{transformers.__version__}.json")
    found = json.loads(path.read_text())["classes"] if path.exists() and not options.again else {}
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
    if options.docs:
        rows = {name: found.get(name, {"outcome": "not measured"}) for name in every}
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        others = {}
        for other in sorted(path.parent.glob("transformers-*.json")):
            if other != path:
                others[other.stem.removeprefix("transformers-")] = json.loads(other.read_text())["classes"]
        options.docs.write_text(document(rows, versions, others))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
