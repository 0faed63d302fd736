"""The tests of the ops in each build of the emulated kernels, reduced; together they must launch every kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import emulation

pytestmark = [pytest.mark.emulated, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

# Tens of thousands of rows or of scores say nothing about order and bounds that a few do not.
TOO_LONG = "not many_rows and not more_rows and not 70001 and not 70000 and not 65536 and not 32_bits and not 31_elem"
VARIANTS = 4  # of each parametrised test
EXAMPLES = {"plain": 5, "shuffled": 10, "race": 5, "asan": 5}  # percent of those of each fuzzed test


def _without_bounds(declaration: str) -> str:
    """What follows ``void`` and ``__launch_bounds__(...)``."""
    text = re.sub(r"\bvoid\b", "", declaration).lstrip()
    if not text.startswith("__launch_bounds__"):
        return text
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return text[i + 1 :]
    raise ValueError(declaration[:80])


def kernels() -> set[str]:
    """The names of all kernels in csrc/cuda."""
    names = set()
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cuh")]:
        for rest in path.read_text().split("__global__")[1:]:
            names.add(re.match(r"\W*(\w+)", _without_bounds(rest))[1])
    return names


@pytest.mark.parametrize("build", emulation.BUILDS)
def test_ops(build, tmp_path):
    emulation.path(build)
    settings = {
        **emulation.environment(build),
        "KVCACHE_VARIANTS": str(VARIANTS),
        "KVCACHE_EXAMPLES": str(EXAMPLES[build]),
        "KVCACHE_EMULATION_LAUNCHED": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "support.reduced", "-p", "no:cacheprovider", "-m"]
    command += ["emulated", "-k", TOO_LONG, "--hypothesis-seed=0", "tests/ops"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    print(done.stdout[-8000:], done.stderr[-4000:])
    assert done.returncode == 0, f"the {build} build, see above"
    launched = {name for file in tmp_path.iterdir() for name in re.findall(r"\w+", file.read_text())}
    assert kernels() - launched == set(), f"never launched in the {build} build"
