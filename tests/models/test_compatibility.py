"""The compatibility sweep on a share of its classes, and that it notices what goes wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

import kvcache
from kvcache.evaluation import compatibility
from kvcache.evaluation.compatibility import KEPT, LIVELY, NEW, SINKS, TIERS
from kvcache.evaluation.tiny_models import tiny_model

FULL_ATTENTION = [
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "BertLMHeadModel",
    "BioGptForCausalLM",
    "BitNetForCausalLM",
    "CohereForCausalLM",
    "DbrxForCausalLM",
    "DiffLlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "GraniteForCausalLM",
    "HeliumForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "PersimmonForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
]
SLIDING = ["MistralForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"]


@pytest.fixture(scope="module")
def measured():
    """The row of a class, measured once."""
    rows: dict[str, dict] = {}

    def row(name):
        types = compatibility.classes()
        if name not in types:
            pytest.skip(f"transformers {transformers.__version__} has no {name} in its causal-LM mapping")
        return rows.setdefault(name, compatibility.measure(name, types[name]))

    return row


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_tokens_are_identical_with_and_without_eviction(name, measured):
    row = measured(name)
    assert row["outcome"] in TIERS, row
    assert (row["single"], row["padded"], row["eviction"]) == ("identical",) * 3, row
    assert row["distinct"] >= LIVELY


@pytest.mark.parametrize("name", SLIDING)
def test_tokens_are_identical_with_sliding_layers(name, measured):
    row = measured(name)
    assert row["outcome"] == "handle", row
    assert row["single"] == row["padded"] == "identical", row
    assert row["distinct"] >= LIVELY


@pytest.mark.parametrize("name", SLIDING)
def test_eviction_on_sliding_layers_follows_the_documented_form(name, measured):
    assert measured(name)["eviction"] == "identical"


def test_the_oracle_tells_one_entry_more_or_less():
    model = tiny_model(transformers.LlamaForCausalLM, "llama")
    kvcache.wrap(model, f"streamingllm(sinks={SINKS}, window={KEPT})")
    new = compatibility.continued(model, 1)
    kvcache.unwrap(model)
    assert torch.equal(compatibility.evicted_by_mask(model, new, SINKS, KEPT), new)
    for sinks, window in ((SINKS, KEPT - 1), (SINKS, KEPT + 1), (SINKS - 1, KEPT), (SINKS + 1, KEPT)):
        assert not torch.equal(compatibility.evicted_by_mask(model, new, sinks, window), new), (sinks, window)


def test_a_wrong_token_shows_in_its_row(monkeypatch):
    plain = compatibility.continued
    monkeypatch.setattr(
        compatibility,
        "continued",
        lambda model, rows: plain(model, rows) + (rows == 3 and hasattr(model, "_kvcache_state")),
    )
    row = compatibility.measure("LlamaForCausalLM", "llama")
    assert (row["outcome"], row["single"], row["padded"]) == ("different", "identical", "different")


def test_a_crash_or_a_hang_costs_one_row(monkeypatch):
    monkeypatch.setattr(compatibility, "measure", lambda *_: os._exit(3))
    assert compatibility.guarded("LlamaForCausalLM", "llama", 30)["outcome"] == "crashed"
    monkeypatch.setattr(compatibility, "measure", lambda *_: torch.multiprocessing.Event().wait())
    row = compatibility.guarded("LlamaForCausalLM", "llama", 0.5)
    assert row["outcome"] == "crashed"
    assert "0.5 s" in row["reason"]


def test_what_cannot_be_built_is_told_apart_from_what_is_refused():
    row = compatibility.measure("FalconMambaForCausalLM", "falcon_mamba")
    assert row["outcome"] in ("refused", "own")
    assert row["distinct"] >= LIVELY
    broken = compatibility.measure("LlamaModel", "no such type")
    assert broken["outcome"] in ("not built", "does not generate")
    assert broken["reason"]


def test_the_table_counts_what_it_shows():
    same = {"single": "identical", "padded": "identical", "eviction": "identical", "reason": "", "distinct": NEW}
    rows = {
        "A": same | {"outcome": "handle"},
        "B": same | {"outcome": "pre-hook", "distinct": 1},
        "C": {"outcome": "refused", "reason": "ValueError: a | b <c>", "distinct": 9},
    }
    text = compatibility.document(rows, {"transformers": "1", "torch": "2"})
    assert "**2 of 3 classes generate identical tokens**: 1 handle, 1 pre-hook. The rest: 1 refused." in text
    assert "Eviction: 2 identical." in text
    assert "| A | handle | identical | identical | identical |  |" in text
    assert "| B | pre-hook | identical | identical | identical | only 1 different tokens |" in text
    assert "| C | refused |  |  |  | ValueError: a \\| b &lt;c> |" in text
    old = {"A": same | {"outcome": "pre-hook"}, "C": {"outcome": "error", "reason": "KeyError: x"}}
    text = compatibility.document(rows, {"transformers": "2", "torch": "2"}, {"1": old})
    assert "whose mapping has 2 classes: **1 of them identical**" in text
    assert "| A | handle | identical | identical | identical | pre-hook |  |" in text
    assert "| B | pre-hook | identical | identical | identical |  | only 1 different tokens |" in text
    assert "| C | refused |  |  |  | error (KeyError: x) | ValueError: a \\| b &lt;c> |" in text


def test_the_committed_table_is_the_committed_measurement():
    root = Path(__file__).resolve().parents[2]
    newest, *rest = sorted((root / "bench/results/compatibility").glob("*.json"), reverse=True)
    assert rest
    found = json.loads(newest.read_text())
    others = {p.stem.removeprefix("transformers-"): json.loads(p.read_text())["classes"] for p in rest}
    text = compatibility.document(found["classes"], found["versions"], others)
    assert (root / "docs/compatibility.md").read_text() == text
