"""The CUDA kernels compiled for this machine's CPU (csrc/emulation), as a backend of the ops.

``KVCACHE_EMULATION`` picks the build: ``plain`` (the default), ``shuffled`` (the same, but threads, warps and blocks
run in a random order; ``KVCACHE_EMULATION_SEED`` is the seed), ``race`` (every access to memory is checked) or
``asan``. What ``asan`` needs beyond that says :func:`environment`; docs/emulation.md says what each build finds.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcache

ROOT = Path(__file__).resolve().parents[2]
SOURCE, BUILD = ROOT / "csrc/emulation", ROOT / "build/emulation"
BUILDS = ("plain", "shuffled", "race", "asan")


def with_build(build: str, *values: str) -> Any:
    """Parameters ``values``, ``build`` of a test; two of the builds take minutes to compile."""
    return pytest.param(*values, build, marks=[pytest.mark.slow] if build in ("race", "asan") else [])


def chosen() -> str:
    """The build that ``KVCACHE_EMULATION`` asks for."""
    name = os.environ.get("KVCACHE_EMULATION") or "plain"
    if name not in BUILDS:
        raise ValueError(f"KVCACHE_EMULATION={name!r}, must be one of {', '.join(BUILDS)}")
    return name


def environment(build: str) -> dict[str, str]:
    """What a process needs in its environment to run with a build."""
    settings = {"KVCACHE_EMULATION": build}
    if build == "asan":
        # Python is not instrumented, so that ASan must come first; without libstdc++ beside it the first C++ exception
        # ends the process.
        found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in _ASAN]
        settings |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    return settings


_ASAN = ("libasan.so", "libstdc++.so.6")


def _tool(name: str) -> str | None:
    """A program of the environment, or of the Python package of that name."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if found := shutil.which(name, path=beside):
        return found
    if importlib.util.find_spec(name):
        package = __import__(name)
        for folder in (getattr(package, "CMAKE_BIN_DIR", None), getattr(package, "BIN_DIR", None)):
            if folder and (Path(folder) / name).exists():
                return str(Path(folder) / name)
    return None


_failed: list[str] = []  # what went wrong with the build: every test fails at once, instead of trying it again


def _run(*command: str) -> None:
    if _failed:
        raise RuntimeError(_failed[0])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    if done.returncode:
        _failed.append(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-6000:]}")
        raise RuntimeError(_failed[0])


@cache
def path(build: str) -> Path:
    """The library of a build, compiled if it is not there or older than its sources."""
    target = f"kvcache_emulated_{'plain' if build == 'shuffled' else build}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist share one build
        cmake, ninja = _tool("cmake"), _tool("ninja")
        if cmake is None:
            raise RuntimeError("the emulated CUDA kernels need cmake")
        if not (BUILD / "CMakeCache.txt").exists():
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            _run(cmake, "-S", str(SOURCE), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=", *generator)
        _run(cmake, "--build", str(BUILD), "--target", target, "--parallel", str(os.cpu_count() or 2))
    return BUILD / f"lib{target}.so"


@cache
def library(build: str | None = None) -> ctypes.CDLL:
    """A build, loaded; of the chosen one also the ops are there, as ``torch.ops.kvcache_emulated``."""
    build = build or chosen()
    loaded = ctypes.CDLL(str(path(build)))
    loaded.kvcache_emulated_shuffle.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.kvcache_emulated_multiprocessors.argtypes = [ctypes.c_int]
    if build == "shuffled":
        loaded.kvcache_emulated_shuffle(1, int(os.environ.get("KVCACHE_EMULATION_SEED") or 0))
    if build == "race":
        loaded.kvcache_emulated_hide.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        loaded.kvcache_emulated_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


@cache
def register() -> None:
    """Make the chosen build a backend of the ops, named "emulated"."""
    loaded = library(chosen())
    loaded.kvcache_emulated_register.restype = ctypes.c_char_p
    if error := loaded.kvcache_emulated_register():
        raise RuntimeError(error.decode())
    kvcache.ops.fake.register("kvcache_emulated")
    namespace = torch.ops.kvcache_emulated
    kvcache.ops.register_backend("emulated", Narrowed(loaded) if chosen() == "race" else namespace)
    if folder := os.environ.get("KVCACHE_EMULATION_LAUNCHED"):
        loaded.kvcache_emulated_launched.restype = ctypes.c_char_p
        atexit.register(lambda: Path(folder, str(os.getpid())).write_bytes(loaded.kvcache_emulated_launched()))


#: Ops that leave the entries where they are: they may follow the table no further than the counts say.
_READERS = {
    "decode_attention",
    "latent_attention",
    "prefill_attention",
    "column_sums",
    "select_tokens",
    "selection_scores",
    "page_bounds",
}


def _tensors(given: dict) -> Iterator[tuple[str, Tensor]]:
    """All tensors among the arguments, also those in lists of them, each with its argument's name."""
    for argument, x in given.items():
        yield from ((argument, y) for y in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(y, Tensor))


class Narrowed:
    """The ops of the race build. A call may touch only the pages that its tables name, and write only what it says."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.library = loaded

    def __getattr__(self, name: str) -> SimpleNamespace:
        op = getattr(torch.ops.kvcache_emulated, name).default
        arguments = op._schema.arguments

        def call(*args, **kwargs):
            given = dict(zip((a.name for a in arguments), args)) | kwargs
            written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
            try:
                self._narrow(name, given, written)
                return op(*args, **kwargs)
            finally:
                self.library.kvcache_emulated_reveal()

        return SimpleNamespace(default=call)

    def _narrow(self, name: str, given: dict, written: set[str]) -> None:
        everything = [(argument, x) for argument, x in _tensors(given) if x.device.type == "cpu"]
        open_to_all = {x.untyped_storage().data_ptr() for argument, x in everything if argument in written}
        for _, x in everything:
            if x.numel() and x.untyped_storage().data_ptr() not in open_to_all:  # a view of what is written is fine
                last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
                self.library.kvcache_emulated_protect(x.data_ptr(), (last + 1) * x.element_size())
        owned = self._owned(name, given)
        for argument in ("k_pages", "v_pages", "bounds"):
            x = given.get(argument)
            if owned is None or not isinstance(x, Tensor) or x.dim() != 3 or not x.is_contiguous():
                continue
            size, begin = x.stride(0) * x.element_size(), 0
            for page in [*sorted(p for p in owned if 0 <= p < x.shape[0]), x.shape[0]]:
                self.library.kvcache_emulated_hide(x.data_ptr() + begin * size, (page - begin) * size)
                begin = page + 1

    @staticmethod
    def _owned(name: str, given: dict) -> set[int] | None:
        if name == "copy_pages":
            lists = [given["source"], given["target"]]
        else:
            lists = [x for t, x in _tensors(given) if t in ("table", "source_table", "target_table")]
        if not lists or any(x.dtype != torch.int32 for x in lists):
            return None  # not an op with pages, or a call that is about to be refused
        counts, keys = given.get("counts"), given.get("k_pages")
        if name in _READERS and isinstance(keys, Tensor) and keys.dim() == 3 and keys.shape[1] > 0:
            table = lists[0]
            if not isinstance(counts, Tensor) or table.dim() != 3 or counts.shape != table.shape[:2]:
                return None
            columns = torch.arange(table.shape[2]) * keys.shape[1]
            lists = [table[columns < counts[..., None]]]
        return {int(page) for x in lists for page in x.flatten().tolist()}
