"""The other end of a contender in a process of its own: kvpress with the transformers that it needs.

    PYTHON worker.py TIMING.py

Run by ``kvcache bench --kvpress-python``; reads one JSON request a line from standard input and answers each with one
line. Must not import kvcache (another transformers). ``TIMING.py`` is timing.py next to this file: what is measured is
measured by the same code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

import torch


class Worker:
    """One model, one press, one cache behind a context."""

    def __init__(self, timing: Any) -> None:
        self.timing = timing

    def load(self, r: dict[str, Any]) -> dict[str, Any]:
        """The parent's model: ``architecture``, ``settings`` of its configuration, ``weights`` in safetensors."""
        import kvpress  # type: ignore[import-not-found]
        import transformers
        from safetensors.torch import load_file

        torch.set_num_threads(r["threads"])
        if r.get("cpu") is not None:
            os.sched_setaffinity(0, {r["cpu"]})
        dtype = getattr(torch, r["dtype"])
        cls = getattr(transformers, r["architecture"])
        config = cls.config_class(**r["settings"])
        config._attn_implementation = "eager" if r["press"] == "ObservedAttentionPress" else "sdpa"
        torch.set_default_dtype(dtype)
        with torch.device(r["device"]):
            self.model = cls(config).eval()
        torch.set_default_dtype(torch.float32)
        missing, unknown = self.model.load_state_dict(load_file(r["weights"], device=r["device"]), strict=False)
        if unknown or any("lm_head" not in name for name in missing):
            raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")
        self.model.tie_weights()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.press = getattr(kvpress, r["press"])(**r["arguments"])
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def fill(self, r: dict[str, Any]) -> dict[str, Any]:
        """A cache behind ``prompt`` [rows, n]: read under the press, or random entries of the length it would keep."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        prompt = torch.tensor(r["prompt"], device=self.model.device)
        seconds = None
        with torch.no_grad():
            if r["read"]:
                with self.press(self.model):
                    seconds = self.timing.first_token(self.model, prompt, {"past_key_values": self.cache})
            else:
                c = self.model.config
                kept = int(prompt.shape[1] * (1 - self.press.compression_ratio))
                shape = (len(prompt), c.num_key_value_heads, kept, c.head_dim)
                k, v = (torch.randn(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
                for i in range(c.num_hidden_layers):
                    self.cache.update(k, v, i)
        kept = self.cache.get_seq_length()
        # generate() takes a cache's length for the tokens seen; a step costs what the entries kept cost either way.
        self.sequence = torch.cat([prompt[:, :kept], prompt[:, -1:]], 1)
        return {"first_token": seconds, "kept": kept}

    def round(self, r: dict[str, Any]) -> dict[str, Any]:
        peak = self.timing.Peak(self.model.device)
        with peak, self.press(self.model):
            self.sequence, wall, cpu = self.timing.generate_tokens(
                self.model, self.sequence, {"past_key_values": self.cache}, r["tokens"]
            )
        nbytes = sum(x.keys.nbytes + x.values.nbytes for x in self.cache.layers)
        return {"wall": wall, "cpu": cpu, "peak": peak.nbytes, "nbytes": nbytes, "kept": self.cache.get_seq_length()}


def main() -> None:
    spec = importlib.util.spec_from_file_location("timing", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    timing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timing)
    # What libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(timing)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request["do"])(request)
        except Exception as error:  # the parent makes a row of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
