"""What the compiler says of the kernels: the committed report, and a build that refuses decode kernels which spill."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((ROOT / "bench/results/nvcc/kernels.json").read_text())
FLAGS = re.search(r"set\(no_spills ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()

# 40 values that are all alive at once.
SOURCE = """
extern "C" __global__ void kernel(float* x) {
  float y[40];
#pragma unroll
  for (int i = 0; i < 40; ++i) y[i] = x[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 40; ++i) x[i * 32 + 31 - threadIdx.x] = y[39 - i] * y[i];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("registers", [24, 255])
def test_the_flags_refuse_a_kernel_that_spills(registers, tmp_path):
    (tmp_path / "kernel.cu").write_text(SOURCE)
    command = ["nvcc", "-arch=sm_90a", "-O3", f"-maxrregcount={registers}", *FLAGS, "-cubin", "-o", "out", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (registers == 255), done.stderr
    assert ("spill" in done.stderr.lower()) == (registers == 24)


def test_the_report_has_no_spills_in_decode_kernels():
    assert REPORT["archs"] == ["80", "89", "90a", "100", "120"]
    decode = [x for x in REPORT["kernels"] if re.match("decode_|plan_decode", x["source"])]
    assert {x["kernel"] for x in decode} >= {"decode_mma_kernel", "decode_combine_kernel", "plan_decode_kernel"}
    assert all(x["spills"] == 0 for x in decode)


def test_the_report_has_every_kernel():
    files = (path for path in (ROOT / "csrc/cuda").glob("*.cu") if "__global__" in path.read_text())
    assert {x["source"] for x in REPORT["kernels"]} >= {path.name for path in files}


def test_lines_of_named_sources_are_replaced():
    spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "bench/kernel_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    lines = [{"source": name, "spills": 8} for name in ("append.cu", "long_gone.cu", "topk.cu")]
    new = [{"source": "topk.cu", "spills": 0}, {"source": "rows.cu", "spills": 0}]
    got = report.merged({"archs": ["90a"], "kernels": lines}, new, ["90a"], [Path("topk.cu"), Path("rows.cu")])
    assert got == [lines[0], new[1], new[0]]
    with pytest.raises(SystemExit, match="the report is of 80,90a"):
        report.merged({"archs": ["80", "90a"], "kernels": []}, new, ["90a"], [Path("topk.cu")])
