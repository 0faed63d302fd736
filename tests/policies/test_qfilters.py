"""QFilters: an example by hand, and the calibration of filters against dense queries. The rule in whole models is in
test_key_policies.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dense import Oracle, dense_logits
from support.engines import engine, held, step
from support.models import build, prompt
from support.policies import filters_of
from support.runs import run

import kvcache
from kvcache import QFilters

FILTERS = filters_of(3, 2)


def test_of_an_example(backend):
    """Filter (-1, 0): keys score 3, -1, 2, 0 by their first channel, whatever their second."""
    e = engine(QFilters([[[-1.0, 0.0]]], 2))
    keys = torch.tensor([[3.0, 9], [-1, 0], [2, -9], [0, 5]])[None, None]
    step(e, torch.zeros(1, 1, 4, 2), keys, keys)
    assert held(e) == [0, 2]
    new = torch.tensor([[[[2.5, 0.0]]]])
    step(e, torch.zeros(1, 1, 1, 2), new, new)
    assert held(e) == [0, 4]


class Queries(Oracle):
    """The rotated queries of every layer, [Hq, T, D]."""

    def __init__(self):
        self.found = {}

    def attend(self, layer, q, k, v, causal, logits):
        self.found[layer] = q
        return super().attend(layer, q, k, v, causal, logits)


def directions(model, texts, heads):
    """Filters [layers, heads, D] by the singular value decomposition of dense queries."""
    seen = []
    for text in texts:
        for row in text:
            oracle = Queries()
            dense_logits(model, row[None], oracle)
            seen.append(oracle.found)
    filters = []
    for layer in sorted(seen[0]):
        q = torch.cat([found[layer] for found in seen], 1)
        main = torch.stack([torch.linalg.svd(x, full_matrices=False).Vh[0] for x in q])
        main = torch.stack([u if float(x.mean(0) @ u) > 0 else -u for u, x in zip(main, q)])
        filters.append(-torch.stack([group.mean(0) for group in main.split(len(q) // heads)]))
    return torch.stack(filters)


@pytest.mark.parametrize(("name", "heads"), [("llama-gqa", 2), ("llama-mqa", 1), ("qwen3", 2), ("gpt2", 4)])
def test_calibration_finds_the_main_direction_of_the_queries(name, heads, tmp_path):
    model, texts = build(name), [prompt(40, seed=3, rows=2), prompt(23, seed=5)]
    if name == "gpt2":  # no rotation is needed, known or not
        texts = [texts[1]]
    path = kvcache.calibrate_qfilters(model, texts, tmp_path / "filters.safetensors")
    found = load_file(path)["q_filters"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), directions(model, texts, heads), rtol=1e-3, atol=1e-4)
    policy = QFilters(path, 10, recent=2)
    assert kvcache.parse_policy(str(policy)) == policy
    result = run(kvcache.wrap(model, policy), prompt(40, seed=9), 34)
    assert all(len(head) == 10 for layer in result.log[40][0] for head in layer)


def test_calibration_leaves_the_model_as_it_was(tmp_path):
    model = build()
    before = set(model.__dict__), model.config._attn_implementation
    one = kvcache.calibrate_qfilters(model, prompt(20), tmp_path / "one.safetensors")
    assert (set(model.__dict__), model.config._attn_implementation) == before
    model.train()
    kvcache.wrap(model, "h2o(heavy=4, recent=4)")
    two = kvcache.calibrate_qfilters(model, prompt(20), tmp_path / "two.safetensors")
    assert model.training
    assert str(kvcache.KVCache(model).policy) == "h2o(heavy=4, recent=4)"
    assert torch.equal(load_file(one)["q_filters"], load_file(two)["q_filters"])


@pytest.mark.parametrize(
    ("ids", "path", "message"),
    [
        (prompt(9), "filters.json", "path must end in .safetensors"),
        (prompt(9)[0], "f.safetensors", r"input_ids must be token ids \[rows, tokens\].*got \[9\]"),
        ([prompt(9), "text"], "f.safetensors", "got 'text'"),
        ([], "f.safetensors", "input_ids is empty"),
    ],
)
def test_what_cannot_be_calibrated_on(ids, path, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kvcache.calibrate_qfilters(build(), ids, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_calibrated(tmp_path):
    model = build("deepseek-v3")
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        kvcache.calibrate_qfilters(model, prompt(9), tmp_path / "f.safetensors")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError, match="PreTrainedModel"):
        kvcache.calibrate_qfilters(torch.nn.Linear(2, 2), prompt(9), tmp_path / "f.safetensors")


def test_filters_are_given_in_many_ways(tmp_path):
    expected = QFilters(FILTERS)
    assert expected == QFilters(torch.tensor(FILTERS))
    assert hash(expected) == hash(kvcache.parse_policy(str(expected)))
    (tmp_path / "f.json").write_text(json.dumps(FILTERS))
    save_file({"any": torch.tensor(FILTERS)}, tmp_path / "f.safetensors")
    kept = []
    for filters in (FILTERS, tmp_path / "f.json", str(tmp_path / "f.safetensors")):
        kept.append(run(kvcache.wrap(build(), QFilters(filters, 9)), prompt(30), 24).log)
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ("nowhere.json", ValueError, "filters: there is no file nowhere.json"),
        (__file__, ValueError, "filters: .* must be a .json or a .safetensors file"),
        (3, ValueError, r"filters must be numbers .*got the shape \[\]"),
        ([[1.0]], ValueError, r"got the shape \[1, 1\]"),
        ([], ValueError, r"got the shape \[0\]"),
        ([[["a"]]], TypeError, "filters must be numbers"),
        ([[[1.0], [1.0, 2.0]]], TypeError, "filters must be numbers"),
        ([[[float("nan")]]], ValueError, "not finite"),
    ],
)
def test_filters_that_are_none(filters, error, message):
    with pytest.raises(error, match=message):
        QFilters(filters)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (None, "qfilters: filters must be given.*calibrate_qfilters makes one"),
        (filters_of(4, 2), "qfilters: filters has 4 layers, the model 3"),
        (filters_of(3, 1), "qfilters: filters has 1 kv heads, a layer of the model 2"),
    ],
)
def test_filters_of_another_model_are_refused_at_wrap(filters, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model, QFilters(filters))
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model, QFilters(filters) | kvcache.SkipDecode(1, 3))


def test_keys_of_another_size_are_refused_by_the_first_forward():
    e = engine(QFilters([[[1.0, 2.0]]]))
    keys = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match="filters has 1 kv heads of 2 channels, layer 0 of the model 1 of 8"):
        step(e, keys, keys, keys)
