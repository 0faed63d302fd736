"""Where the benches run and how they time: the CPU, a GPU, the emulation. What a figure means is said in common.py."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvcache import _C, ops

ROOT = Path(__file__).resolve().parents[2]

#: Something to be timed: called with the number of a set of inputs. A text says why there is nothing.
Run = Callable[[int], object] | str


@dataclass
class Times:
    """Seconds per call of each contender, None where nothing was timed, or why there is none."""

    seconds: dict[str, float | str | None]
    bandwidth: float | None  # bytes per second
    notes: list[str] = field(default_factory=list)

    def best(self, peer: str) -> tuple[float | str | None, str]:
        """Of the ways ``peer|way`` of a peer: the time, and the way. Reasons only where no way has a time."""
        ways = {n.partition("|")[2]: t for n, t in self.seconds.items() if n.partition("|")[0] == peer}
        timed = {way: t for way, t in ways.items() if isinstance(t, float)}
        way = min(timed, key=timed.__getitem__) if timed else next(iter(ways))
        return ways[way], way


class Bench:
    """A device that runs the ops. The base class does what all of them do."""

    kind = "cpu"
    time_unit, per_second = "ms", 1e3
    rate_unit, rate = "GB/s", 1e9
    flop_unit, flop_rate = "GFLOP/s", 1e9
    rounds = 5

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu")
        self.started = time.monotonic()
        torch.manual_seed(0)
        if options.quick:
            self.rounds = min(self.rounds, 3)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_()

    def ints(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def copies(self, nbytes: int) -> int:
        """Sets of inputs of this size that leave the caches cold."""
        return max(3, min(48, (400 << 20) // max(1, nbytes)))

    def fits(self, nbytes: int) -> bool:
        return True

    # --- timing -------------------------------------------------------------------------------------------------------

    def compare(
        self, runs: dict[str, Run], copies: int, *, pools: Callable[[int], Iterable[Tensor]] | None = None,
        touched: int | None = None, reset: Callable[[int], object] | None = None,
    ) -> Times:  # fmt: skip
        """Times of ``runs``. ``pools``: memory to stream through for the bandwidth, and what a call touches unless
        ``touched`` (bytes) says otherwise; ``reset``: undoes a call, not timed."""
        runs = {name: run for name, run in runs.items() if not isinstance(run, str)} | (
            {"stream": lambda c: stream(*pools(c))} if pools else {}
        )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():  # warm up: pages of memory, lazy initialisation
            run(0)
            if reset:
                reset(0)
        for i in range(self.rounds):
            order = list(runs)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                start = time.perf_counter()
                for c in range(copies):
                    if c >= 3 and time.perf_counter() - start > 0.3:
                        break
                    times[name].append(_seconds(runs[name], c))
                    if reset:
                        reset(c)
        found: dict[str, float | str | None] = {name: median(x) for name, x in times.items()}
        bandwidth = None
        if pools and isinstance(streamed := found.pop("stream"), float):
            bandwidth = sum(x.nbytes for x in pools(0)) / streamed
        return Times(found, bandwidth)

    def peak(self) -> float | None:
        """Floating-point operations per second: of one core, multiplied by the threads."""
        done = 0

        def run(_: int) -> None:
            nonlocal done
            done = _C.probe_fma(3_000_000)

        return max(done / _seconds(run, 0) for _ in range(5)) * torch.get_num_threads()

    def machine(self) -> dict[str, Any]:
        return {
            "cpu": platform.processor() or platform.machine(), "isa": _C.isa, "torch": torch.__version__,
            "threads": self.options.threads, "clock": "CPU time" if self.options.threads == 1 else "wall",
        }  # fmt: skip

    # --- results ------------------------------------------------------------------------------------------------------

    def row(
        self, cells: dict[str, Any], times: Times, *, nbytes: float = 0, flops: float = 0, ours: str = "ours",
        peers: Sequence[str] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """One line: what was run, ours against the limit, and each peer by the best of its ways."""
        unit, taken = self.time_unit, times.seconds[ours]
        row = {**cells, f"ours {unit}": self.shown(taken)}
        limits = []
        if nbytes and times.bandwidth:
            limits.append(nbytes / times.bandwidth)
            row["MB moved"] = nbytes / 1e6
            row[self.rate_unit] = nbytes / taken / self.rate if isinstance(taken, float) else None
            row[f"limit {self.rate_unit}"] = times.bandwidth / self.rate
        if flops and (peak := self.peak()):
            limits.append(flops / peak)
            row[self.flop_unit] = flops / taken / self.flop_rate if isinstance(taken, float) else None
            row[f"peak {self.flop_unit}"] = peak / self.flop_rate
        if limits:
            row["% of limit"] = 100 * max(limits) / taken if isinstance(taken, float) else None
        best: tuple[float, str] | None = None
        for peer in peers:
            theirs, way = times.best(peer)
            row[f"{peer} {unit}"] = self.shown(theirs)
            if isinstance(theirs, float) and (best is None or theirs < best[0]):
                best = theirs, f"{peer} {way}".strip()
        if peers:
            row["best peer"] = best[1] if best else None
            row["ratio"] = best[0] / taken if best and isinstance(taken, float) else None
        row["all"] = {name: self.shown(t) for name, t in times.seconds.items()}
        if times.notes:
            row["notes"] = ", ".join(times.notes)
        return row

    def shown(self, seconds: float | str | None) -> float | str | None:
        return seconds * self.per_second if isinstance(seconds, float) else seconds


class EmulatedBench(Bench):
    kind = "emulated"
    time_unit, per_second = "µs", 1e6

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        sys.path.insert(0, str(ROOT / "tests"))
        from support import emulation

        emulation.register()
        ops.set_backend("emulated")

    def copies(self, nbytes: int) -> int:
        return 2

    def compare(self, runs, copies, *, pools=None, touched=None, reset=None) -> Times:
        for run in runs.values():
            for c in range(0 if isinstance(run, str) else copies):
                run(c)
                if reset:
                    reset(c)
        return Times({name: run if isinstance(run, str) else None for name, run in runs.items()}, None)

    def peak(self) -> None:
        return None

    def machine(self) -> dict[str, Any]:
        return {
            "device": "CUDA kernels emulated on the host: they ran, no time means anything",
            "torch": torch.__version__,
        }


class CudaBench(Bench):
    kind = "cuda"
    time_unit, per_second = "µs", 1e6
    rate_unit, rate = "TB/s", 1e12
    flop_unit, flop_rate = "TFLOP/s", 1e12
    rounds = 15

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.cache = self.properties.L2_cache_size
        self.flusher = torch.empty(2 * self.cache, dtype=torch.uint8, device=self.device)
        self._peak: float | None = None
        self.bandwidth = self._read_bandwidth()

    def copies(self, nbytes: int) -> int:
        room = int(0.4 * torch.cuda.mem_get_info()[0]) // max(1, nbytes)
        cold = -(-5 * self.cache // max(1, nbytes))
        return max(1, min(room, max(3, min(256, cold))))

    def fits(self, nbytes: int) -> bool:
        return nbytes < 0.8 * torch.cuda.mem_get_info()[0]

    def compare(self, runs, copies, *, pools=None, touched=None, reset=None) -> Times:
        if self.options.profile:
            self._profile(runs, copies)
        touched = copies * (sum(x.nbytes for x in pools(0)) if touched is None and pools else touched or 0)
        rotating = touched >= 5 * self.cache or (copies == 1 and touched > 2 * self.cache)
        notes = [] if rotating else ["flushed"]
        found: dict[str, float | str | None] = {}
        graphs: dict[str, list[Callable[[], object]]] = {}
        for name, run in runs.items():
            if isinstance(run, str):
                found[name] = run
                continue
            try:
                graphs[name], captured = self._prepare(run, copies, rotating, reset)
            except Exception as error:  # a peer may not know this shape, device or dtype
                if name.startswith("ours"):
                    raise
                found[name] = f"failed: {type(error).__name__}"
                continue
            if not captured:
                notes.append(f"{name} not captured")
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for i in range(self.rounds):
            order = list(graphs)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                if reset:
                    for c in range(copies):
                        reset(c)
                calls = copies if rotating else 1
                times[name] += [self._timed(replay, rotating) / calls for replay in graphs[name]]
        found |= {name: median(x) for name, x in times.items()}
        return Times(found, self.bandwidth, notes)

    def _prepare(self, run, copies, rotating, reset):
        """What replays a contender: one graph of all its sets, or one for each; and whether they could be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up: lazy initialisation, compilation, tuning
            for _ in range(2):
                for c in range(min(copies, 3)):
                    run(c)
                    if reset:
                        reset(c)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        sets = [range(copies)] if rotating else [range(c, c + 1) for c in range(min(copies, 16))]
        replays = []
        try:
            for some in sets:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for c in some:
                        run(c)
                replays.append(graph.replay)
        except Exception:
            torch.cuda.synchronize()
            return [lambda some=some: [run(c) for c in some] for some in sets], False
        return replays, True

    def _timed(self, replay: Callable[[], object], rotating: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not rotating:
            self.flusher.zero_()
        torch.cuda._sleep(200_000)  # about 0.1 ms, in which the launch reaches the GPU
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _read_bandwidth(self) -> float:
        room = int(min(4 << 30, 0.5 * torch.cuda.mem_get_info()[0]))
        x = torch.ones(room // 4, dtype=torch.float32, device=self.device)
        best = min(self._timed(read, True) for read in (x.sum, x.amax) for _ in range(7))
        return x.nbytes / best

    def peak(self) -> float:
        if self._peak is None:
            n = 8192
            a, b = (self.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
            self._peak = 2 * n**3 / min(self._timed(lambda: a @ b, True) for _ in range(12))
        return self._peak

    def _profile(self, runs, copies) -> None:
        """Each contender in an NVTX range of its name, between cudaProfilerStart and cudaProfilerStop."""
        able = {name: run for name, run in runs.items() if not isinstance(run, str)}
        for run in able.values():
            for _ in range(2):
                run(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for name, run in able.items():
            torch.cuda.nvtx.range_push(name)
            for c in range(min(copies, 5)):
                run(c)
            torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(profile_command(self.options.profile))
        raise SystemExit(0)

    def machine(self) -> dict[str, Any]:
        p = self.properties
        return {
            "gpu": p.name, "multiprocessors": p.multi_processor_count, "l2_mb": self.cache / 2**20,
            "capability": f"{p.major}.{p.minor}", "torch": torch.__version__, "cuda": torch.version.cuda,
            "read_gb_per_s": self.bandwidth / 1e9,
            "peak_tflops": self._peak / 1e12 if self._peak else None,
        }  # fmt: skip


def _seconds(run: Callable[[int], object], c: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run(c)
    return clock() - start


def stream(*tensors: Tensor) -> None:
    for x in tensors:
        _C.probe_read(x.data_ptr(), x.nbytes)


def profile_command(tool: str) -> str:
    script = Path(sys.argv[0])
    run = shlex.join([Path(sys.executable).name, str(script), "--device", "cuda", "--profile", tool])
    if tool == "nsys":
        return f"nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx -o {script.stem} {run}"
    return f'ncu --profile-from-start off --nvtx --nvtx-include "ours/" --set full -o {script.stem} {run}'
