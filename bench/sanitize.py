"""The tests of the ops on this machine's GPU under compute-sanitizer: memcheck, racecheck, synccheck, initcheck.

    python bench/sanitize.py [--seconds 560] [--logs build/gpu] [tools ...]

The tools slow kernels down a hundred times: each gets its share of the time, and the tests are reduced
(tests/support/reduced.py). A tool that is not there, does not work on this machine or does not end in time is said so;
the exit code is 1 where one reports an error or a test fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LEAST = 5.0  # seconds: no tool is begun with fewer
FOUND = 9  # exit code of the sanitizer for an error of a kernel
# Tens of thousands of rows, gigabytes, ten thousand launches: nothing that a few do not show to a checker.
TOO_LONG = (
    "not many_rows and not more_rows and not 7000 and not 6553 and not 32_bits and not 31_elem and not ten_thousand"
)


def command(tool: str, log: Path) -> list[str]:
    sanitizer = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all",
        "--log-file", str(log),
    ]  # fmt: skip
    pytest = ["-m", "pytest", "-q", "-p", "support.reduced", "-p", "no:cacheprovider", "-m", "cuda", "-k", TOO_LONG]
    return [*sanitizer, sys.executable, *pytest, "tests/ops"]


def verdict(code: int | None, seconds: float, output: str, log: str) -> tuple[str, bool]:
    """What one tool's run means: a line, and whether it is a failure."""
    if "Device not supported" in log or "Unable to attach" in log or "LibraryNotLoaded" in log:
        return "does not work on this machine", False
    if code is None:
        done = output.count(".")
        return (
            f"did not end within {seconds:.0f} s; about {done} tests had run, see the log for errors",
            "ERROR:" in log,
        )
    if code == 0:
        return "no errors", False
    return ("errors, see the log" if code == FOUND else f"exit code {code}"), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything together")
    parser.add_argument("--logs", type=Path, default=Path("build/gpu"))
    parser.add_argument("tools", nargs="*", default=TOOLS)
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer: not installed here")
        return 0
    options.logs.mkdir(parents=True, exist_ok=True)
    environment = {
        "KVCACHE_VARIANTS": "2", "KVCACHE_EXAMPLES": "2", "KVCACHE_REDUCED": "cuda",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    end, failed = time.monotonic() + options.seconds, False
    for i, tool in enumerate(options.tools):
        seconds = (end - time.monotonic() - 5) / (len(options.tools) - i)
        if seconds < LEAST:
            print(f"{tool}: left out, the time was up", flush=True)
            continue
        log, text = options.logs / f"sanitizer-{tool}.log", options.logs / f"sanitizer-{tool}.txt"
        log.write_text("")
        with text.open("w") as output:
            run = subprocess.Popen(
                command(tool, log), cwd=ROOT, env={**os.environ, **environment}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = run.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, 9)  # the sanitizer and the tests below it
                run.wait()
                code = None
        said, found = text.read_text(errors="replace"), log.read_text(errors="replace")
        line, bad = verdict(code, seconds, said, found)
        failed |= bad
        print(f"{tool}: {line}", flush=True)
        for last in (said.strip().splitlines()[-3:] if bad else []) + found.strip().splitlines()[-2:]:
            print(f"  {last}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
