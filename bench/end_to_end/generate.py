"""Decode time of generate() on a wrapped model against other caches: ``kvcache bench`` with what this checkout has.

    python bench/end_to_end/generate.py [any argument of kvcache bench]

Writes report.json and generate.png into --out (bench/results/generate). What ``make peers`` fetched takes part: kvpress
in its own Python, and optimum-quanto for transformers' QuantizedCache. What is measured and how:
kvcache.evaluation.bench.decode. The JSON names the machine and its load.
"""

import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parents[2] / "build" / "peers"


def completed(arguments: list[str]) -> list[str]:
    """``arguments`` with the defaults of this checkout for those that are not given."""
    given = {a.split("=")[0] for a in arguments}
    python = PEERS / "kvpress" / "bin" / "python"
    if "--kvpress-python" not in given and python.exists():
        arguments = [*arguments, "--kvpress-python", str(python)]
    return arguments if "--out" in given else [*arguments, "--out", "bench/results/generate"]


if __name__ == "__main__":
    sys.path.append(str(PEERS / "quantized"))
    from kvcache.cli import main

    sys.exit(main(["bench", *completed(sys.argv[1:])]))
