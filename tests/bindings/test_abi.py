"""The binding to torch's C ABI: declarations, symbols, instruction sets, ownership."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from paged_case import make_paged

from kvcache import _C, ops

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
INCLUDE = Path(torch.__file__).parent / "include"

pytestmark = pytest.mark.cpu
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def run(*command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, check=False)


@needs_compiler
@pytest.mark.skipif(not INCLUDE.is_dir(), reason="torch without headers")
def test_declarations_are_those_of_the_installed_torch(tmp_path):
    """abi_check.cpp compiles, and would not if a declaration were wrong."""
    command = (CXX, "-std=c++20", "-fsyntax-only", f"-I{INCLUDE}")
    result = run(*command, ROOT / "csrc/bindings/abi_check.cpp")
    assert result.returncode == 0, result.stderr
    abi = (ROOT / "csrc/bindings/abi.h").read_text()
    wrong = abi.replace("aoti_torch_get_dim, (Handle, int64_t*)", "aoti_torch_get_dim, (Handle, int32_t*)")
    assert wrong != abi
    (tmp_path / "abi.h").write_text(wrong)
    shutil.copy(ROOT / "csrc/bindings/abi_check.cpp", tmp_path)
    result = run(*command, tmp_path / "abi_check.cpp")
    assert "aoti_torch_get_dim" in result.stderr


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("flags", [[], ["-march=x86-64-v3"], ["-march=x86-64-v4"]], ids=["base", "v3", "v4"])
def test_instruction_sets_share_no_symbols(tmp_path, flags):
    """A weak symbol, such as an inline function's, could come from the object with the widest instructions."""
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86-64 only")
    # -O0 inlines nothing and so shows every function that is not private to the file.
    result = run(
        CXX, "-std=c++20", "-O0", "-fno-exceptions", *flags, "-DKVCACHE_ISA_NS=this_set", '-DKVCACHE_ISA_NAME="this"',
        "-c", ROOT / "csrc/cpu/isa.cpp", "-o", tmp_path / "isa.o",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    symbols = [line.split() for line in run("nm", "-C", "--defined-only", tmp_path / "isa.o").stdout.splitlines()]
    public = [" ".join(parts[1:]) for parts in symbols if parts[1].isupper() or parts[1] in "wvu"]
    public = [symbol for symbol in public if symbol[0] not in "TDRB" or "this_set" not in symbol]
    assert public == []


SMOKE = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import kvcache
    from ops_smoke import run_every_op
    run_every_op()
    print(kvcache._C.isa)
"""


def python(code, **environment):
    code = textwrap.dedent(code).format(tests=str(ROOT / "tests"))
    return run(sys.executable, "-c", code, **environment)


@pytest.mark.parametrize("name", ["base", "x86-64-v3", "v4"])
def test_isa_can_be_forced_down(name):
    full = {"v3": "x86-64-v3", "v4": "x86-64-v4"}.get(name, name)
    if full not in _C.available_isas:
        pytest.skip(f"this CPU has no {full}")
    result = python(SMOKE, KVCACHE_ISA=name, KVCACHE_BACKEND="native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == full


def test_the_best_isa_is_the_default():
    assert _C.available_isas[0] == "base"
    if "KVCACHE_ISA" not in os.environ:
        assert _C.isa == _C.available_isas[-1]


def test_a_wrong_isa_is_a_clear_error():
    result = python("import torch, kvcache", KVCACHE_ISA="avx9000")
    assert result.returncode != 0
    possible = ", ".join(_C.available_isas)
    message = f"KVCACHE_ISA=avx9000: unknown instruction set; possible here: {possible}"
    assert f"ImportError: {message}" in result.stderr


def test_a_wrong_backend_is_a_clear_error():
    result = python("import kvcache", KVCACHE_BACKEND="fast")
    assert "ImportError: KVCACHE_BACKEND: unknown backend 'fast', must be one of native, reference" in result.stderr
    assert python("import kvcache; print(kvcache.ops.backend())", KVCACHE_BACKEND="reference").stdout == "reference\n"


def test_import_without_torch_is_a_clear_error():
    result = run(sys.executable, "-c", f"""
import importlib.util
spec = importlib.util.spec_from_file_location("kvcache._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
""")  # fmt: skip
    assert "import torch before kvcache._C" in result.stderr


def test_cuda_info():
    info = _C.cuda_info()
    assert set(info) == {"compiled", "archs", "runtime", "driver", "error", "devices"}
    assert info["devices"] or info["error"]
    if not info["compiled"]:
        assert info["error"] == "kvcache was built without nvcc"


def resident_kb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_calls_leak_nothing():
    """Handles, lists and the heap cells of optional arguments are given back, also when the call raises."""
    case = make_paged(rows=1, heads=1, page_size=4, k_dim=8, v_dim=8, max_count=6, seed=1)
    q, scores = torch.randn(1, 2, 8), case.columns[0]
    shared = (case.k_pages, case.v_pages, case.table, case.counts, case.positions)
    sinks, bias = torch.zeros(2), torch.zeros(1, 1, case.positions.shape[2])
    first, end, budgets = (torch.zeros(1, dtype=torch.int32) + i for i in (0, 100, 1))
    budgets = budgets.view(1, 1)
    wrong = torch.zeros(3)

    def calls(n):
        for _ in range(n):
            ops.decode_attention(q, *shared, first, sinks, bias, None, None, scores, 0.3)
            ops.choose_victims(scores, case.counts, case.positions, budgets, first, end)
            ops.topk(scores, case.counts, case.positions, budgets, first, end, 8)
            ops.evict(*case.args[:2], *([x] for x in case.args[2:]), [scores], [case.counts], [first], [end])
            ops.evict(*case.args[:2], *([x] for x in case.args[2:]), [None], [case.counts], [first], [end])
            with contextlib.suppress(ValueError):
                ops.decode_attention(q, *shared, first, wrong, bias, None, None, scores, 0.3)

    calls(3000)
    before = resident_kb()
    calls(30_000)
    # One leaked 16-byte cell per call would be 2 MB, one tensor handle more.
    assert resident_kb() - before < 1000
