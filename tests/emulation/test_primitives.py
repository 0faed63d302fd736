"""What the emulation makes of each primitive, against plain computations: csrc/emulation/selftest/primitives*.cu."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import emulation

pytestmark = pytest.mark.emulated
ROOT = Path(__file__).resolve().parents[2]
SELFTEST = ROOT / "csrc/emulation/selftest"

#: The calls of a kernel that stand for something a GPU does and the emulation imitates.
PRIMITIVE = re.compile(
    r"\b(__\w+_sync|__syncthreads\w*|__syncwarp|atomic[A-Z]\w+|ldmatrix_\w+|mma_m\w+|cp_async_\w+|transpose_8x8|l2_policy"
    r"|fast_\w+|load_streaming|__(?:popc|popcll|ffs|ffsll|clz|clzll|brev|byte_perm|funnelshift_\w|u?mulhi|ldg|ldcg|ldcs)"
    r"|__\w+_as_\w+|__fdividef|(?:bf16|f16)_bits_to_float|float_to_\w+_bits|floats_to_\w+|f16x2_to_floats|warp_sum"
    r"|warp_max|larger|pack2)(?:<[\w:]+>)?\("
)


def tested() -> str:
    return "".join(path.read_text() for path in SELFTEST.glob("primitives*.cu"))


def names() -> set[str]:
    return set(re.findall(r"KVCACHE_PRIMITIVE\((\w+)\)", tested()))


@pytest.mark.parametrize("build", map(emulation.with_build, emulation.BUILDS))
def test_primitives_compute_what_a_gpu_does(build):
    script = str(Path(__file__).with_name("planted.py"))
    done = subprocess.run(
        [sys.executable, script, str(emulation.path(build)), "primitives"],
        env={**os.environ, **emulation.environment(build)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert set(done.stdout.splitlines()) == {f"{name}: passed" for name in names()}, done.stderr[-2000:]


def test_every_primitive_that_a_kernel_uses_is_tested():
    used = set()
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cuh")]:
        used |= {match[1] for match in PRIMITIVE.finditer(path.read_text())}
    assert {"mma_m16n8k16", "ldmatrix_x4", "cp_async_16", "atomicAdd", "__shfl_xor_sync", "fast_exp2"} <= used
    # Barriers have no result; the planted bugs show what they order.
    assert used - {match[1] for match in PRIMITIVE.finditer(tested())} - {"__syncthreads", "__syncwarp"} == set()
