"""Tensor parallel: decisions that many heads take together are taken alike on every rank.

Each rank holds the kv heads of its shard in pages of its own. What a head decides for itself needs no other rank; what
the heads decide together (votes, similarities) is summed over the ranks first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorParallel:
    """The ranks that share the heads of one model."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, bit for bit the same on each of them: gathered, then added in rank order."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gather(self, x: Tensor, fill: float) -> Tensor:
        """``x`` [R, heads, n] of all ranks in their order, [R, all heads, most n]; shorter ones end in ``fill``."""
        width = torch.tensor([x.shape[2]], device=x.device)
        widths = [torch.empty_like(width) for _ in range(self.size)]
        dist.all_gather(widths, width, group=self.group)
        x = torch.nn.functional.pad(x, (0, int(torch.cat(widths).max()) - x.shape[2]), value=fill)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def own(self, x: Tensor) -> Tensor:
        """Of ``x`` [R, all heads, ...] the heads of this rank."""
        return x.chunk(self.size, 1)[dist.get_rank(self.group)]

    def __deepcopy__(self, memo: dict) -> TensorParallel:
        return self  # a process group is one thing per process


def tensor_parallel(model: PreTrainedModel) -> TensorParallel | None:
    """The ranks that share ``model``, as ``from_pretrained(..., tp_plan=...)`` left them; None: it is not shared.

    ValueError when a rank would hold part of a head, or heads of different number than the others.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ("tp",)
    if "tp" not in names:  # FSDP and pipelines share other things than heads
        return None
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    if mesh.size() == 1:
        return None
    config = model.config.get_text_config(decoder=True)
    heads = {"num_attention_heads": config.num_attention_heads}
    heads["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name, count in heads.items():
        if count % mesh.size():
            raise ValueError(
                f"{type(model).__name__} has {name}={count}, which {mesh.size()} tensor-parallel ranks cannot share "
                "evenly; kvcache needs whole heads, as many on every rank"
            )
    return TensorParallel(mesh.get_group())
