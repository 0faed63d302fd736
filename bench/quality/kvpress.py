"""Quality beside kvpress' policies of the same name: same weights, same questions, bytes really held.

    make peers
    python bench/quality/kvpress.py --out bench/results/quality/kvpress.json

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
from importlib import metadata
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
    Pair("lagkv(keep={keep}, sinks=4, lag=64)", "LagKVPress", {"n_sink": SINKS, "lag_size": 64}),
    Pair("expectedattention(keep={keep}, sinks=4)", "ExpectedAttentionPress", {"n_sink": SINKS}),
)


def cases(examples: list[Example], protocol: str) -> list[dict[str, Any]]:
    found = []
    for e in examples:
        cut = e.question_start if protocol == "agnostic" else len(e.prompt) - 1
        ids = e.prompt.tolist()
        found.append({"context": ids[:cut], "question": ids[cut:], "new_tokens": e.new_tokens})
    return found


def theirs(python: Path, pair: Pair, share: float, examples: list[Example], protocol: str) -> dict[str, Any]:
    """kvpress' answers."""
    asked = cases(examples, protocol)
    request = {
        "model": str(shipped_folder()), "press": pair.press, "wrapper": pair.wrapper, "threads": 1, "cases": asked,
        "arguments": {"compression_ratio": 1 - share, **pair.arguments}, "kvpress": installed(python),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answers.json")
        question.write_text(json.dumps(request))
        command = [str(python), str(HERE / "press_worker.py"), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"left_out": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"}
        found = json.loads(answer.read_text())
    right = [float(e.score(np.array(said), "")) for e, said in zip(examples, found["answers"])]
    return {"accuracy": float(np.mean(right)), "nbytes": round(float(np.mean(found["nbytes"]))), "right": right,
            "versions": found["versions"]}  # fmt: skip


def installed(python: Path) -> str:
    command = [str(python), "-c", "from importlib import metadata; print(metadata.version('kvpress'))"]
    return subprocess.check_output(command, text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=PYTHON, help="a Python with kvpress (make peers)")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tasks", nargs="+", default=["passkey", "recall", "frequent_words"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    if not o.python.exists():
        sys.exit(f"no Python with kvpress at {o.python}: make peers")
    torch.set_num_threads(1)
    model = kvcache.wrap(load_model())
    rows = []
    for protocol in PROTOCOLS:
        for task in o.tasks:
            examples = draw_examples(task, o.length, o.samples, o.seed)
            context = len(cases(examples, protocol)[0]["context"])
            for pair in PAIRS:
                for share in o.shares:
                    keep = int(context * share)
                    policy = pair.ours.format(keep=keep, rest=keep - SINKS)
                    ours = generate_answers(model, policy, examples, protocol=protocol)
                    peer = theirs(o.python, pair, share, examples, protocol)
                    row = {
                        "task": task, "protocol": protocol, "share": share, "samples": o.samples, "policy": policy,
                        "accuracy": ours.accuracy, "interval": ours.interval, "nbytes": ours.held.nbytes,
                        "full_nbytes": ours.held.full_nbytes, "press": pair.wrapper or pair.press,
                    }  # fmt: skip
                    if "left_out" in peer:
                        row["left_out"] = peer["left_out"]
                    else:
                        right = np.array(peer["right"])
                        row |= {"peer_accuracy": peer["accuracy"], "peer_nbytes": peer["nbytes"],
                                "peer_interval": wilson(right.sum(), len(right)), "versions": peer["versions"],
                                "only_ours": int((ours.scores[:, 0] > right).sum()),
                                "only_theirs": int((ours.scores[:, 0] < right).sum())}  # fmt: skip
                    rows.append(row)
                    shown = {k: v for k, v in row.items() if k not in ("versions", "interval", "peer_interval")}
                    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()),
                          flush=True)  # fmt: skip
    o.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"kvcache": metadata.version("kvcache"), **machine()}
    command = "python bench/quality/kvpress.py"
    o.out.write_text(json.dumps({"command": command, "machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
