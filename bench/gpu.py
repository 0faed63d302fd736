"""Run the kernel benchmarks on this machine's GPU and write ``bench/results/<gpu>/<op>.json``.

    python bench/gpu.py [--seconds 480] [--full] [ops ...]

Each script gets a share of the time and ends by itself; the tables come last, so that a log that was cut shows them.
Used by ``make gpu-bench``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent
#: Most important first: what no longer fits into the time is left out, and said so.
ORDER = (
    "decode_attention",
    "latent_attention",
    "topk",
    "selection",
    "prefill_attention",
    "column_sums",
    "storage",
    "choose_victims",
    "routing",
)
LEAST = 10.0  # seconds: no bench is begun with fewer


def gpu_name() -> str:
    """``h200`` for "NVIDIA H200"."""
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").strip()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything together")
    parser.add_argument("--full", action="store_true", help="every shape")
    parser.add_argument("ops", nargs="*", default=ORDER)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a GPU; on this machine run bench/kernels/<op>.py --device emulated", file=sys.stderr)
        return 1
    out = BENCH / "results" / gpu_name()
    out.mkdir(parents=True, exist_ok=True)
    end, tables, failed = time.monotonic() + options.seconds, [], []
    for i, op in enumerate(options.ops):
        left = end - time.monotonic()
        limit = left / (len(options.ops) - i) * 2 if i + 1 < len(options.ops) else left
        if left < LEAST:
            failed.append(f"{op}: left out, the time was up")
            continue
        command = [
            sys.executable,
            str(BENCH / "kernels" / f"{op}.py"),
            "--device",
            "cuda",
            "--out",
            str(out / f"{op}.json"),
        ]
        print("+", " ".join(command[1:]), flush=True)
        try:
            run = subprocess.run(
                [*command, *(["--full"] if options.full else [])], capture_output=True, text=True,
                timeout=min(limit, left), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            failed.append(f"{op}: did not end within {min(limit, left):.0f} s")
            continue
        if run.returncode:
            failed.append(f"{op}: exit code {run.returncode}\n{run.stderr[-2000:]}")
        tables.append(f"## {op}\n{run.stdout}")
    print("\n".join([*tables, *(f"FAILED {line}" for line in failed)]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
