"""Answers of a model whose prompts kvpress compresses: the other end of beside_kvpress.py, in kvpress' own Python.

    PYTHON press_worker.py REQUEST.json ANSWERS.json

REQUEST: {"model": folder, "threads": n, "jobs": [{"press": class, "arguments": {}, "wrapper": class or null}], "cases":
[{"context": [ids], "question": [ids], "new_tokens": n}]}; every job answers every case. A case is a sequence of its
own, as in kvpress' pipeline: the context is read under the press, the question and the answer follow on the compressed
cache at their true positions, greedily. Must not import kvcache (another transformers).
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def make_press(job: dict[str, Any]) -> Any:
    press = getattr(kvpress, job["press"])(**job["arguments"])
    return press if job["wrapper"] is None else getattr(kvpress, job["wrapper"])(press)


def held(cache: Any) -> int:
    """Bytes of the cache's tensors. What a head-ragged press only masks is still there, and counts."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def answer(model: Any, press: Any, case: dict[str, Any]) -> tuple[list[int], int]:
    context, question = (torch.tensor([case[k]]) for k in ("context", "question"))
    cache = DynamicCache(config=model.config)
    with press(model):
        model(context, past_key_values=cache, logits_to_keep=1)
    nbytes = held(cache)
    ids, start, said = question, context.shape[1], []
    for _ in range(case["new_tokens"]):
        positions = torch.arange(start, start + ids.shape[1])[None]
        logits = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        start += ids.shape[1]
        ids = logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(ids))
    return said, nbytes


def answers(model: Any, job: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What one press answers and holds, or why it cannot."""
    # Presses that look at probabilities need the attention that computes them.
    model.set_attn_implementation("eager" if job["press"] == "ObservedAttentionPress" else "sdpa")
    try:
        found = [answer(model, make_press(job), case) for case in cases]
    except Exception as error:  # whatever a press raises belongs into the table
        return {"left_out": f"{type(error).__name__}: {error}"}
    return {"answers": [said for said, _ in found], "nbytes": [n for _, n in found]}


@torch.inference_mode()
def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    versions = {n: metadata.version(n) for n in ("kvpress", "transformers", "torch")}
    found = [answers(model, job, request["cases"]) for job in request["jobs"]]
    Path(sys.argv[2]).write_text(json.dumps({"jobs": found, "versions": versions}))


if __name__ == "__main__":
    main()
