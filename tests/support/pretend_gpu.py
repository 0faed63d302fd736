"""A GPU that is not there: tensors that say they are on ``cuda:0`` and compute on the CPU.

What the tests of the Python side need on machines without a GPU. A tensor of the pretended device meets one of the CPU
only where torch allows it on a real one; anything else raises what torch raises. Native ops go to their kernels through
the CPU, or to the emulated CUDA kernels while that backend is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

import kvcache

GPU = torch.device("cuda", 0)
# A CPU tensor may index one on a GPU, and be copied from or to it.
_MIXED = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten.copy_.default"}


class PretendTensor(Tensor):
    """Wraps a CPU tensor and reports the GPU as its device.

    To torch's C++ side it is a meta tensor: a torch without CUDA has no device guard for a GPU.
    """

    inner: Tensor
    device = GPU  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_meta = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        out = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        out.inner = inner
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner!r})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes ``torch.zeros(..., device="cuda")`` and the like work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """torch.tensor() fills the memory itself, on the way past every dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


# What needs to know the contents of a tensor on the host, and so cannot be captured.
_SYNCHRONISING = {
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default",
    "aten._unique2.default", "aten.unique_dim.default", "aten.unique_consecutive.default",
    "aten.repeat_interleave.Tensor",
}  # fmt: skip


class PretendGraph:
    """torch.cuda.CUDAGraph: the ops of a capture with their memory, run again at every replay."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def record(self, func, args, kwargs):
        schema = func._schema
        run = _native(func) if func.namespace == "kvcache" else func
        written = []
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written += [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]
        self.before += [(x, x.clone()) for x in written]
        out = run(*args, **kwargs)
        if written or not any(r.alias_info is not None for r in schema.returns):  # a view stays one
            self.calls.append((run, args, kwargs, None if written and func.namespace == "aten" else out))
        return out

    def undo(self) -> None:
        """Capturing runs nothing."""
        for tensor, before in reversed(self.before):
            tensor.copy_(before)
        self.before.clear()

    def replay(self) -> None:
        for run, args, kwargs, out in self.calls:
            again = run(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0]):
                if isinstance(old, Tensor):
                    old.copy_(new)


_capture: PretendGraph | None = None


def _is_capturing() -> bool:
    return _capture is not None


@contextlib.contextmanager
def _capturing(graph: PretendGraph, pool=None, capture_error_mode="global"):
    global _capture
    _capture = graph
    try:
        yield
    finally:
        _capture = None
        graph.undo()


def _refuse_in_capture(func, tensors, on_gpu, gpu_asked) -> None:
    """What CUDA refuses while a stream is capturing: anything that waits for the device, copies of pageable memory."""
    waits = any(on_gpu) and str(func) in _SYNCHRONISING
    if any(on_gpu) and str(func) == "aten.index.Tensor":
        waits |= any(x.dtype == torch.bool for x in tensors[1:])
    crosses = any(x.dim() > 0 and not gpu for x, gpu in zip(tensors, on_gpu)) and (any(on_gpu) or gpu_asked)
    if waits or crosses:
        raise RuntimeError(f"{func}: operation not permitted when stream is capturing")


def _run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on_gpu = [isinstance(x, PretendTensor) for x in tensors]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    gpu_asked = asked is not None and asked.type in ("cuda", "meta")  # C++ asks for what it takes our device to be
    plain = {**kwargs, "device": torch.device("cpu")} if gpu_asked else kwargs
    if asked is None and not any(on_gpu):
        return func(*args, **kwargs)
    if any(on_gpu) and str(func) not in _MIXED:
        strangers = [x for x, gpu in zip(tensors, on_gpu) if not gpu and x.dim() > 0]
        if strangers:
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! ({strangers[0].shape})"
            )
    inputs = _unwrapped(args)
    if str(func) == "aten.histc.default":  # of integers on a GPU only
        inputs = (inputs[0].float(), *inputs[1:])
    if _capture is not None:
        to_host = asked is not None and not gpu_asked and any(on_gpu)
        _refuse_in_capture(func, tensors, on_gpu, gpu_asked)
        if to_host:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        out = _capture.record(func, inputs, _unwrapped(plain))
    elif func.namespace == "kvcache":
        out = _native(func)(*inputs, **_unwrapped(plain))
    else:
        out = func(*inputs, **_unwrapped(plain))
    if str(func) == "aten._local_scalar_dense.default":
        return out
    to_gpu = gpu_asked if asked is not None else on_gpu[0] if str(func) in _MIXED else any(on_gpu)
    if not to_gpu:
        return out
    out = tree_map_only(Tensor, PretendTensor, out)
    if func.namespace == "aten" and any(r.alias_info is not None for r in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def _unwrapped(tree):
    return tree_map_only(PretendTensor, lambda x: x.inner, tree)


def _native(func):
    name = func._schema.name.split("::")[1]
    kernels = kvcache.ops._backends.get("emulated") if _emulated else None
    return func if kernels is None else getattr(kernels, name)


_emulated = False


@contextlib.contextmanager
def pretend_gpu(emulated: bool = False) -> Iterator[torch.device]:
    """Within the block ``torch.device("cuda", 0)`` can be used; ``emulated``: native ops run the CUDA kernels."""
    global _emulated
    before, _emulated = _emulated, emulated
    info = kvcache._C.cuda_info
    try:
        # torch asks CUDA to start before it looks for a mode that handles the call.
        with (
            mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
            mock.patch.object(torch.cuda, "CUDAGraph", PretendGraph),
            mock.patch.object(torch.cuda, "graph", _capturing),
            mock.patch.object(torch.cuda, "graph_pool_handle", return_value=None),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", _is_capturing),
            mock.patch.object(kvcache._C, "cuda_info", return_value={**info(), "compiled": True}),
            _Tensors(),
            _Factories(),
        ):
            yield GPU
    finally:
        _emulated = before


def move(module: nn.Module) -> nn.Module:
    """``module.to("cuda")``, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(PretendTensor(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer)
    return module


def on_gpu(x: Tensor) -> Tensor:
    return PretendTensor(x.clone())
