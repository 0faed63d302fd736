"""CriticalKV: an example by hand, and where the output projection is found. The rule over whole conversations is in
test_observation_window.py."""

import pytest
import torch
from support.engines import engine, held, step, unit
from support.models import build, prompt
from support.runs import run

import kvcache
from kvcache import CriticalKV, SnapKV
from kvcache.layers import wrapped_state


class Given:
    """An output projection by hand, [query heads * 8, hidden]."""

    def __init__(self, weight):
        self.weight = weight

    def of(self, layer):
        return self.weight


def kept(policy, attention, norms, projection):
    """What of a prompt stays whose last query gives ``attention`` to the tokens before it; values have ``norms``."""
    n = len(attention)
    q = torch.zeros(1, 1, n + 1, 8)
    q[0, 0, -1, :n] = torch.tensor(attention).log()
    q[0, 0, -1, n] = -1e4
    keys = torch.cat([unit(i) for i in range(n + 1)], 2)
    values = unit(0).expand(1, 1, n + 1, 8) * torch.tensor([*norms, 1.0])[:, None]
    e = engine(policy, projections=Given(projection))
    step(e, q, keys, values)
    return held(e)


def test_the_second_half_of_the_budget_goes_to_values_that_matter(backend):
    """Attention .4, .3, .2, .1 and values of norm 1, 1, 1, 10: .3, .2 and 1.0 compete for what the first half left."""
    attention, norms = [0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 1.0, 10.0]
    identity = torch.eye(8)
    assert kept(CriticalKV(3, 1, 1), attention, norms, identity) == [0, 3, 4]
    assert kept(CriticalKV(3, 1, 1, share=1.0), attention, norms, identity) == [0, 1, 4]
    assert kept(CriticalKV(2, 1, 1, share=0.0), attention, norms, identity) == [3, 4]
    # What the model's projection ignores matters no more: it reads channel 0 as 0.
    assert kept(CriticalKV(3, 1, 1), attention, norms, torch.diag(torch.tensor([0.0] + [1.0] * 7))) == [0, 1, 4]


def test_an_entry_without_attention_is_worth_a_ten_thousandth_of_its_value(backend):
    """(.0002 + .0001) * 1 = .0003 against (0 + .0001) * 4 = .0004."""
    attention = [0.9998, 0.0002, 1e-30]
    assert kept(CriticalKV(3, 1, 1), attention, [1.0, 1.0, 4.0], torch.eye(8)) == [0, 2, 3]
    assert kept(CriticalKV(3, 1, 1), attention, [1.0, 1.0, 2.0], torch.eye(8)) == [0, 1, 3]


def test_query_heads_of_a_group_have_projections_of_their_own(backend):
    """Two query heads per kv head: the mean of the L1 norms, (|3| + |4| + |1|) / 2 = 4 for the value (1, 0, ...)."""
    weight = torch.zeros(16, 2)
    weight[0], weight[8, 0] = torch.tensor([3.0, -4.0]), 1.0
    e = engine(CriticalKV(3, 1, 1), projections=Given(weight))
    step(e, torch.zeros(1, 2, 1, 8), unit(0), unit(0))
    assert e.layers[0].view().column("projected")[0, 0, 0] == 4.0


@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-mha", "qwen3", "gpt2", "opt", "gpt-neox", "phi3", "gemma2", "gpt-oss"]
)
def test_the_projection_of_a_model_is_the_one_it_uses(name):
    """Through it the model's own attention output becomes what the attention module returns."""
    model = kvcache.wrap(build(name), CriticalKV(13, 6, 3))
    found = wrapped_state(model).projections(model, CriticalKV())
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    given = {}
    handles = [m.register_forward_hook(lambda m, args, out: given.update({m: (args[0], out)})) for m in linear]
    result = run(model, prompt(30), 24)
    for handle in handles:
        handle.remove()
    for i in range(model.config.num_hidden_layers):
        weight = found.of(i)
        heads = model.config.num_attention_heads
        used = [(x, out, m) for m, (x, out) in given.items() if m.weight.data_ptr() == weight.data_ptr()]
        ((x, out, module),) = used
        bias = 0.0 if module.bias is None else module.bias
        assert torch.allclose(x @ weight + bias, out, atol=1e-4)
        assert weight.shape == (heads * result.cache.engine.layers[i].store.storage.v_pages.shape[2], out.shape[-1])


def test_models_without_a_known_projection_are_refused_by_name():
    with pytest.raises(ValueError, match=r"criticalkv\(.*needs values .* makes them of what is cached \(MLA\)"):
        kvcache.wrap(build("deepseek-v3"), CriticalKV())
    model = build("llama-gqa")
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(ValueError, match="that of layer 1 of LlamaForCausalLM is not one plain weight"):
        kvcache.wrap(model, "criticalkv")
    kvcache.wrap(model, SnapKV())  # which does without


def test_a_policy_must_say_that_it_reads_the_projection():
    class _Silent(kvcache.Policy):
        budget = 4

        def score(self, layer):
            return layer.output_projection

        def __str__(self):
            return "silent"

    model = kvcache.wrap(build(num_hidden_layers=1), _Silent())
    with pytest.raises(ValueError, match="silent does not say needs_output_projection"):
        run(model, prompt(9), 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("criticalkv(share=1.5)", r"share must be a share in \[0, 1\], got 1.5"),
        ("criticalkv(share=True)", r"share must be a share in \[0, 1\], got True"),
        ("criticalkv(keep=8, window=8)", "keep must be more than window"),
    ],
)
def test_bad_arguments_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        kvcache.parse_policy(text)
