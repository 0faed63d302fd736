"""The output projection of attention: what the values of each head add to the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .tiers import index_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tiers import LayerPlan

#: Names under which transformers' attention modules keep their output projection.
NAMES = ("o_proj", "out_proj", "dense", "c_proj")


class OutputProjections:
    """The weights by which a model's attention layers bring what they read back to the hidden size.

    Looked for once, read live: a weight that is changed later is the one that counts. ``ranks``: how many
    tensor-parallel ranks share the heads. Raises ValueError saying what a policy that goes by them "needs" and the
    model does not have.
    """

    def __init__(self, model: PreTrainedModel, plan: LayerPlan, ranks: int = 1) -> None:
        name = type(model).__name__
        config = model.config.get_text_config(decoder=True)
        wanted = {i for i, tier in plan.tiers.items() if tier != "own"}
        if {plan.tiers[i] for i in wanted} != {"handle"}:
            raise ValueError(
                f"needs values that the output projection reads as they are cached, but {name} "
                + ("computes attention itself" if plan.self_attending else "makes them of what is cached (MLA)")
            )
        self._modules: dict[int, nn.Linear | Conv1D] = {}
        for module in model.modules():
            index = index_of(module)
            found = [x for x in (getattr(module, n, None) for n in NAMES) if isinstance(x, (nn.Linear, Conv1D))]
            if index not in wanted or len(found) != 1:
                continue
            size = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
            weight = _plain(found[0])
            if weight is not None and len(weight) * ranks == config.num_attention_heads * size:
                self._modules[index] = found[0]
        missing = sorted(wanted - self._modules.keys())
        if missing:
            raise ValueError(
                f"needs the output projection of every attention layer; that of layer {missing[0]} of {name} is not "
                f"one plain weight [hidden, query heads * head size] named {', '.join(NAMES)}"
            )

    def of(self, layer: int) -> Tensor:
        """The weight of ``layer`` for the query heads that are here, [query heads * head size, hidden]."""
        weight = _plain(self._modules[layer])
        assert weight is not None
        return weight


def _plain(module: nn.Linear | Conv1D) -> Tensor | None:
    """The part of a weight that is here, [inputs, outputs]; None if it is quantised."""
    weight: Any = module.weight
    if hasattr(weight, "to_local"):  # a DTensor, of tensor-parallel ranks
        weight = weight.to_local()
    if weight.ndim != 2 or not weight.is_floating_point():
        return None
    return weight if isinstance(module, Conv1D) else weight.T
