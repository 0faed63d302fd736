"""The parts of ``make gpu``, without a GPU: what they start, how they share out their time, what they make of ends."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """bench/gpu.py on a pretended H200, with scripts of its own beside it."""
    module = load("gpu")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    (tmp_path / "kernels").mkdir()
    return module


def script(folder, name, text):
    (folder / "kernels" / f"{name}.py").write_text(
        f"import json, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n{text}\n"
    )


def test_benches_share_the_time(gpu, tmp_path, monkeypatch, capsys):
    script(tmp_path, "quick", "json.dump({'rows': []}, open(out, 'w')); print('| a table |')")
    script(tmp_path, "broken", "raise SystemExit('no such kernel')")
    script(tmp_path, "endless", "time.sleep(600)")
    script(tmp_path, "late", "print('too late')")
    monkeypatch.setattr(gpu, "LEAST", 3)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--seconds", "5", "quick", "broken", "endless", "late"])
    start = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - start < 18
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "results/h200/quick.json").read_text()) == {"rows": []}
    assert "| a table |" in text
    assert "FAILED broken: exit code 1" in text
    assert "no such kernel" in text
    assert "FAILED endless: did not end within" in text
    assert "late: left out, the time was up" in text


def test_every_bench_is_in_the_order():
    helpers = ("common", "devices", "peers")
    assert set(load("gpu").ORDER) == {p.stem for p in (ROOT / "bench/kernels").glob("*.py")} - set(helpers)


#: What a sanitizer does in the place of running the tests: ``$3`` is the tool, ``$8`` its log.
SANITIZER = """
case "$2" in
  memcheck) echo "12 passed"; echo "========= ERROR SUMMARY: 0 errors" > "$8";;
  racecheck) echo "1 failed"; echo "========= ERROR SUMMARY: 231 errors" > "$8"; exit 9;;
  synccheck) echo "......"; exec sleep 600;;
  initcheck) echo "========= Error: Device not supported" > "$8"; exit 1;;
esac
"""


def test_sanitizer(tmp_path, monkeypatch, capsys):
    sanitize = load("sanitize")
    monkeypatch.setattr(sanitize, "LEAST", 1)
    fake(tmp_path, "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--seconds", "12", "--logs", str(tmp_path / "logs")])
    start = time.monotonic()
    assert sanitize.main() == 1
    assert time.monotonic() - start < 25
    text = capsys.readouterr().out
    assert "memcheck: no errors" in text
    assert "racecheck: errors, see the log" in text
    assert "231 errors" in text
    assert "synccheck: did not end within" in text
    assert "initcheck: does not work on this machine" in text


def test_a_clean_run_and_a_missing_sanitizer(tmp_path, monkeypatch, capsys):
    sanitize = load("sanitize")
    fake(tmp_path, "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--seconds", "20", "--logs", str(tmp_path), "memcheck"])
    assert sanitize.main() == 0
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert sanitize.main() == 0
    assert "not installed here" in capsys.readouterr().out


@pytest.mark.slow
def test_sanitized_tests_are_chosen(tmp_path):
    """The reduced plugin picks tests marked cuda; none runs here."""
    command = load("sanitize").command("memcheck", tmp_path / "log")
    command = command[command.index(sys.executable) :]
    settings = {"KVCACHE_VARIANTS": "2", "KVCACHE_EXAMPLES": "2", "KVCACHE_REDUCED": "cuda"}
    done = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, env={**os.environ, **settings, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    assert 50 < len(listed) < 400
    assert any("test_storage_ops_replay" in line for line in listed)
    assert all("[emulated" not in line and "[cpu" not in line for line in listed)


@pytest.mark.parametrize("spent", [0, 300, 900])
def test_a_part_knows_what_is_left_of_its_time(spent):
    """The build's time is taken off; there is never no limit at all."""
    started = int(time.time()) - spent
    done = subprocess.run(
        ["make", "-s", "-f", "-", "show"],
        input=f"include {ROOT}/Makefile\nstarted := {started}\nshow:\n\t@echo $(left)\n", cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout.split()[-1]) - max(570 - spent, 30)) <= 5


def test_the_build_is_for_the_gpu_at_hand(tmp_path):
    """What CMake asks nvcc for where nvidia-smi names an H200."""
    fake(tmp_path, "nvidia-smi", "echo 9.0")
    text = (ROOT / "CMakeLists.txt").read_text()
    begin, end = text.index('set(default_archs "80'), text.index("set(KVCACHE_CUDA_ARCHS")
    (tmp_path / "archs.cmake").write_text(text[begin:end] + 'message(STATUS "archs=${default_archs}")\n')
    environment = {k: v for k, v in os.environ.items() if k != "KVCACHE_CUDA_ARCHS"}
    for given, want in (({}, "90a-real"), ({"KVCACHE_CUDA_ARCHS": "80;100"}, "80;100")):
        done = subprocess.run(
            [_cmake(), "-P", str(tmp_path / "archs.cmake")], capture_output=True, text=True, check=True,
            env={**environment, **given, "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"},
        )  # fmt: skip
        assert f"archs={want}" in done.stdout + done.stderr


def _cmake() -> str:
    from support import emulation

    return emulation._tool("cmake") or pytest.skip("no cmake")


def test_the_kinds_of_ends_of_a_tool():
    verdict = load("sanitize").verdict
    assert verdict(0, 9, "", "") == ("no errors", False)
    assert verdict(1, 9, "1 failed", "") == ("exit code 1", True)
    assert verdict(None, 9, "...", "========= ERROR: invalid read")[1]
    assert not verdict(None, 9, "...", "")[1]
