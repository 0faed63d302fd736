"""Decode time of a wrapped model's generate() against transformers' caches; the same as ``kvcache bench``.

    python bench/end_to_end/generate.py [--context 2048 8192 32768] [--out bench/results/generate]

Writes report.json into --out. What is measured and how: kvcache.evaluation.generate_bench. The JSON names the machine
and its load.
"""

import sys

from kvcache.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(a.startswith("--out") for a in arguments):
        arguments += ["--out", "bench/results/generate"]
    sys.exit(main(["bench", *arguments]))
