"""Quality beside kvpress' policies of the same name: same weights, same questions, bytes really held.

    make peers
    python bench/quality/beside_kvpress.py --out bench/results/quality/kvpress.json

Both compress the context to the same number of entries per head before the question is seen ("agnostic"), or with it
("aware"), then answer greedily. kvpress runs in its own Python (it needs an older transformers), one sequence at a
time.
Its head-ragged policies (AdaKV) mask entries and keep them: their bytes are those of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvcache
from kvcache.evaluation.examples import Example
from kvcache.evaluation.loading import load_model, shipped_folder
from kvcache.evaluation.rows import machine
from kvcache.evaluation.suite import PROTOCOLS, draw_examples, generate_answers, wilson

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / "build/peers/kvpress/bin/python"
SINKS, WINDOW = 4, 32


@dataclass(frozen=True)
class Pair:
    """One policy in both libraries; ``{keep}`` is the number of entries, kvpress takes the share that leaves."""

    ours: str
    press: str
    arguments: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None


PAIRS = (
    Pair("streamingllm(sinks=4, window={rest})", "StreamingLLMPress", {"n_sink": SINKS}),
    Pair("randomeviction(keep={keep})", "RandomPress", {"seed": 0}),
    Pair("h2o(heavy={keep}, recent=0)", "ObservedAttentionPress"),
    Pair("tova(keep={keep})", "TOVAPress"),
    Pair("snapkv(keep={keep}, window=32, pool=5)", "SnapKVPress", {"window_size": WINDOW, "kernel_size": 5}),
    Pair("pyramidkv(keep={keep}, window=32, pool=5)", "PyramidKVPress", {"window_size": WINDOW, "kernel_size": 5}),
    Pair(
        "adakv(keep={keep}, window=32, pool=5)", "SnapKVPress", {"window_size": WINDOW, "kernel_size": 5}, "AdaKVPress"
    ),
    Pair("knorm(keep={keep})", "KnormPress"),
    Pair("keydiff(keep={keep})", "KeyDiffPress"),
    Pair("lagkv(keep={keep}, sinks=4, lag=32)", "LagKVPress", {"n_sink": SINKS, "lag_size": 32}),
    Pair("expectedattention(keep={keep}, sinks=4)", "ExpectedAttentionPress", {"n_sink": SINKS}),
)


def cases(examples: list[Example], protocol: str) -> list[dict[str, Any]]:
    found = []
    for e in examples:
        cut = e.question_start if protocol == "agnostic" else len(e.prompt) - 1
        ids = e.prompt.tolist()
        found.append({"context": ids[:cut], "question": ids[cut:], "new_tokens": e.new_tokens})
    return found


def theirs(python: Path, shares: list[float], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """kvpress' answers under every pair and share, in that order."""
    jobs = [
        {"press": p.press, "wrapper": p.wrapper, "arguments": {"compression_ratio": 1 - share, **p.arguments}}
        for p in PAIRS
        for share in shares
    ]
    request = {"model": str(shipped_folder()), "threads": 1, "jobs": jobs, "cases": cases}
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answers.json")
        question.write_text(json.dumps(request))
        subprocess.run([str(python), str(HERE / "press_worker.py"), str(question), str(answer)], check=True)
        return json.loads(answer.read_text())


def compared(
    model: Any, pair: Pair, share: float, examples: list[Example], protocol: str, context: int, peer: dict[str, Any]
) -> dict[str, Any]:
    """One row: both libraries on the same questions."""
    keep = int(context * share)
    policy = pair.ours.format(keep=keep, rest=keep - SINKS)
    ours = generate_answers(model, policy, examples, protocol=protocol)
    row: dict[str, Any] = {
        "task": examples[0].task, "protocol": protocol, "share": share, "samples": len(examples), "policy": policy,
        "accuracy": ours.accuracy, "interval": ours.interval, "nbytes": ours.held.nbytes,
        "full_nbytes": ours.held.full_nbytes, "press": pair.wrapper or pair.press,
    }  # fmt: skip
    if "left_out" in peer:
        return row | {"left_out": peer["left_out"]}
    right = np.array([e.score(np.array(said), "") for e, said in zip(examples, peer["answers"])])
    mine = ours.scores[:, 0]
    return row | {
        "peer_accuracy": float(right.mean()), "peer_interval": wilson(float(right.sum()), len(right)),
        "peer_nbytes": round(float(np.mean(peer["nbytes"]))), "only_ours": int((mine > right).sum()),
        "only_theirs": int((mine < right).sum()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=PYTHON, help="a Python with kvpress (make peers)")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--tasks", nargs="+", default=["passkey", "frequent_words"])
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    if not o.python.exists():
        sys.exit(f"no Python with kvpress at {o.python}: make peers")
    torch.set_num_threads(1)
    model = kvcache.wrap(load_model())
    rows, versions = [], {}
    for protocol in o.protocols:
        for task in o.tasks:
            examples = draw_examples(task, o.length, o.samples, o.seed)
            asked = cases(examples, protocol)
            answered = theirs(o.python, o.shares, asked)
            versions, peers = answered["versions"], iter(answered["jobs"])
            for pair in PAIRS:
                for share in o.shares:
                    context = len(asked[0]["context"])
                    rows.append(compared(model, pair, share, examples, protocol, context, next(peers)))
                    print({k: v for k, v in rows[-1].items() if "interval" not in k}, flush=True)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"length": o.length, "seed": o.seed, "versions": versions, "machine": machine()}
    o.out.write_text(
        json.dumps({"command": "python bench/quality/beside_kvpress.py", **settings, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
