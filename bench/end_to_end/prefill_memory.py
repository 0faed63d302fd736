"""Peak memory of reading a prompt in chunks under an evicting policy, against reading it into a full cache.

    python bench/end_to_end/prefill_memory.py [--length 8192] [--chunk 512] [--out FILE.json]

``generate(prefill_chunk_size=chunk)`` of a model wrapped with ``prefill="chunked"``, one new token, each case in a
process of its own. *pool* is the most that pages in use held at once, counted after each chunk's last layer and before
it evicts; *allowed* is the budget's share of the full cache and one chunk; *reserved* is what the pool took from the
allocator, which grows by doubling; *RSS* is how far the process grew above what it was with the model loaded (VmHWM,
reset before: copies, activations and the allocator's own slack are in it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
BUDGETS = (2, 4, 8, 16)  # a head keeps 1/n of the prompt
PAGE = 16


def cases() -> list[tuple[str, str, float, bool]]:
    """(name, policy, share of the prompt that is kept, in chunks)."""
    found = [("full", "full", 1.0, False), ("full", "full", 1.0, True)]
    for n in BUDGETS:
        found.append(("streamingllm", f"streamingllm(sinks=0, window={1 / n})", 1 / n, True))
        found.append(("h2o", f"h2o(heavy={0.5 / n}, recent={0.5 / n})", 1 / n, True))
    return found


def build(length: int) -> Any:
    """A Llama with little in it but cache: 4 layers, hidden size 256, 4 kv heads of 64, float32, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length + 8,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def resident(field: str) -> int:
    """Bytes that /proc/self/status gives for VmRSS or VmHWM; 0 where there is no such file."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    except OSError:
        return 0
    return int(line.split()[1]) * 1024


def measure(policy: str, length: int, chunk: int | None) -> dict[str, Any]:
    """Peaks in bytes of one prefill in this process."""
    import torch

    import kvcache
    from kvcache.engine import Engine
    from kvcache.evaluation.rows import machine

    torch.set_num_threads(1)
    peaks = {"pool": 0, "reserved": 0}
    finish = Engine.finish

    def watched(self: Engine) -> None:
        storages = self.storages.values()
        peaks["pool"] = max(peaks["pool"], sum(s.pool.used * s.page_bytes for s in storages))
        peaks["reserved"] = max(peaks["reserved"], sum(s.reserved_bytes for s in storages))
        finish(self)

    Engine.finish = watched  # type: ignore[method-assign]
    model = build(length)
    kvcache.wrap(model, policy, page_size=PAGE, prefill="chunked")
    ids = torch.randint(3, 512, (1, length), generator=torch.Generator().manual_seed(1))
    options = {} if chunk is None else {"prefill_chunk_size": chunk}

    def run(ids: torch.Tensor) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **options
        )

    run(ids[:, :PAGE])  # what is loaded and compiled on first use
    peaks.update(pool=0, reserved=0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before = resident("VmRSS")
    cache = run(ids).past_key_values
    Engine.finish = finish  # type: ignore[method-assign]
    kept = max(int(cache.kept(layer).max()) for layer in range(len(cache.layers)))
    return {
        **peaks,
        "rss": resident("VmHWM") - before,
        "kept": kept,
        "full": cache.full_nbytes,
        "machine": machine(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the rows there")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, as JSON, in this process
    options = parser.parse_args(argv)
    if options.case:
        policy, chunked = json.loads(options.case)
        print(json.dumps(measure(policy, options.length, options.chunk if chunked else None)))
        return 0
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    failed = 0
    for name, policy, share, chunked in cases():
        command = [sys.executable, __file__, "--length", str(options.length), "--chunk", str(options.chunk)]
        done = subprocess.run(
            [*command, "--case", json.dumps([policy, chunked])], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        full = found["full"]
        if share == 1.0:
            allowed = full
        else:
            allowed = int(share * full) + full * options.chunk // options.length
        # Two pages per head may be partly filled: at the end of what it kept and of the chunk.
        rounding = 2 * PAGE * full / options.length
        failed += found["pool"] > allowed + rounding
        rows.append(
            {
                "policy": name,
                "prompt": options.length,
                "chunk": options.chunk if chunked else None,
                "kept": found["kept"],
                "pool MiB": found["pool"] / MIB,
                "allowed MiB": allowed / MIB,
                "of full": found["pool"] / full,
                "reserved MiB": found["reserved"] / MIB,
                "RSS MiB": found["rss"] / MIB,
            }
        )
        print(
            "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": found["machine"], "rows": rows}, indent=1) + "\n")
    if failed:
        print(f"{failed} prefills held more than their budget and one chunk", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
