"""Answers of a model whose prompts kvpress compresses: the other end of kvpress.py, in kvpress' own Python.

    PYTHON press_worker.py REQUEST.json ANSWERS.json

REQUEST: {"model": folder, "press": class, "arguments": {}, "wrapper": class or null, "threads": n, "kvpress": version,
"cases": [{"context": [ids], "question": [ids], "new_tokens": n}]}. Every case is a sequence of its own, as in kvpress'
pipeline: the context is read under the press, the question and the answer follow on the compressed cache at their true
positions, greedily. Must not import kvcache (another transformers).
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def make_press(request: dict[str, Any]) -> Any:
    press = getattr(kvpress, request["press"])(**request["arguments"])
    return press if request["wrapper"] is None else getattr(kvpress, request["wrapper"])(press)


def held(cache: Any) -> int:
    """Bytes of the cache's tensors. What a head-ragged press only masks is still there, and counts."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def answer(model: Any, press: Any, case: dict[str, Any]) -> tuple[list[int], int]:
    context, question = (torch.tensor([case[k]]) for k in ("context", "question"))
    cache = DynamicCache(config=model.config)
    with contextlib.nullcontext() if press is None else press(model):
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


@torch.inference_mode()
def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    eager = request["press"] == "ObservedAttentionPress"
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="eager" if eager else "sdpa"
    ).eval()
    press = make_press(request)
    found = [answer(model, press, case) for case in request["cases"]]
    versions = {"kvpress": request["kvpress"], "transformers": transformers.__version__, "torch": torch.__version__}
    result = {"answers": [said for said, _ in found], "nbytes": [n for _, n in found], "versions": versions}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
