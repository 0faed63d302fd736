"""The kernel benches run: under emulation, and their GPU side on a pretended one whose clock says nothing."""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.backends import use
from support.pretend_gpu import pretend_gpu

from kvcache import ops

SCRIPTS = Path(__file__).resolve().parents[2] / "bench/kernels"
HELPERS = ("common", "devices", "peers")
NAMES = sorted(p.stem for p in SCRIPTS.glob("*.py") if p.stem not in HELPERS)


@contextlib.contextmanager
def as_script(name, *options):
    """Runs nothing yet: the environment in which ``python bench/kernels/name.py options`` would run."""
    before = ops.backend()
    with (
        mock.patch.object(sys, "argv", [str(SCRIPTS / f"{name}.py"), *map(str, options)]),
        mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]),
    ):
        try:
            yield lambda: runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        finally:
            ops.set_backend(before)
            for module in HELPERS:
                sys.modules.pop(module, None)


@pytest.mark.emulated
@pytest.mark.parametrize("name", NAMES)
def test_emulated(name, tmp_path, capsys):
    with as_script(name, "--device", "emulated", "--out", tmp_path / "rows.json") as run:
        run()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"]
    assert "emulated" in found["machine"]["device"]
    assert "no time means anything" in capsys.readouterr().out
    for row in found["rows"]:
        times = [value for column, value in row.items() if column.endswith("µs")]
        assert times
        assert not any(isinstance(value, float) for value in times)


def test_profile_prints_the_command(capsys):
    with as_script("topk", "--device", "cpu", "--profile", "nsys") as run:
        run()
    assert "nsys profile --capture-range=cudaProfilerApi" in capsys.readouterr().out


class Event:
    """One that finds every replay to take a millisecond."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def pretended(**more):
    """What the benches use of torch.cuda."""
    properties = SimpleNamespace(
        name="pretended", multi_processor_count=12, major=9, minor=0, L2_cache_size=1 << 16
    )  # fmt: skip
    calls = {
        "is_available": lambda: True, "current_device": lambda: 0, "get_device_properties": lambda _: properties,
        "mem_get_info": lambda: (1 << 24, 1 << 30), "Event": Event, "synchronize": lambda: None,
        "_sleep": lambda _: None, "Stream": lambda: mock.Mock(), "current_stream": lambda: mock.Mock(),
        "stream": lambda _: contextlib.nullcontext(), "graph": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), **more,
    }  # fmt: skip
    return mock.patch.multiple(torch.cuda, **calls)


@pytest.mark.emulated
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("captures", [True, False])
def test_gpu_side(name, captures, tmp_path, capsys):
    """Shapes of the emulated case, everything else as on a GPU: sets, graphs, flushes, reasons instead of times."""

    def refuse(_):
        raise RuntimeError("this cannot be captured")

    more = {} if captures else {"graph": refuse}
    with use("emulated"), as_script(name, "--device", "cuda", "--out", tmp_path / "rows.json", "--quick") as run:
        from devices import CudaBench

        small = mock.patch.multiple(CudaBench, kind="emulated", peak=lambda _: 1e12)
        with pretend_gpu(emulated=True), pretended(**more), small:  # its own graphs, of which nothing is replayed
            run()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["machine"]["gpu"] == "pretended"
    assert found["rows"]
    text = capsys.readouterr().out
    assert ("not captured" in text) == (not captures)
