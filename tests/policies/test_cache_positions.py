"""Keys and queries rotated by their place in the cache: against dense attention over the kept set, moved together by
hand."""

import pytest
import torch
from support.dense import dense_logits
from support.entries import EntryOracle
from support.models import build, continued, greedy, padded, prompt
from support.runs import kept, own_log, run

import kvcache
from kvcache import H2O, CachePositions, KeyDiff, SkipDecode, SnapKV, StreamingLLM, TokenSelect

PROMPT, TOTAL = 30, 40
POLICIES = {
    "streamingllm": StreamingLLM(sinks=3, window=8),
    "h2o": H2O(6, 5),
    "snapkv": SnapKV(11, 4, 3),
    "adakv": kvcache.AdaKV(11, 4, 1, generated="evict"),
    "keydiff-slack": KeyDiff(11, recent=2, slack=3),
    "emasink": kvcache.EMASink(sinks=3, window=8, alpha=0.6),
    "d2o": kvcache.D2O(6, 5),
}


def wrapped(policy, kind="llama-gqa", **options):
    return kvcache.wrap(build(kind), policy | CachePositions(), page_size=4, **options)


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mqa"])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_dense_attention_over_the_kept_set_moved_together(name, kind, backend):
    model, ids = wrapped(POLICIES[name], kind), prompt(TOTAL, seed=3)
    result = run(model, ids, PROMPT)
    kvcache.unwrap(model)
    frequencies = model.model.rotary_emb.inv_freq
    oracle = EntryOracle(own_log(result), PROMPT, POLICIES[name], frequencies, by_index=True)
    assert (result.logits[0] - dense_logits(model, ids, oracle)).abs().max() < 5e-5
    original = dense_logits(model, ids, EntryOracle(own_log(result), PROMPT, POLICIES[name], frequencies))
    assert (result.logits[0] - original).abs().max() > 0.1


ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}


@pytest.mark.parametrize("style", [*ROPE, "partial"])
def test_styles_of_rotation(style, backend):
    """Scaled frequencies, a factor on cosine and sine that must not be applied twice, channels that are not rotated."""
    if style == "partial":
        model = build("gpt-neox", num_hidden_layers=2)
    else:
        model = build("llama-gqa", num_hidden_layers=2, rope_parameters={**ROPE[style], "rope_theta": 1e4})
    (rotary,) = (m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor))
    assert (getattr(rotary, "attention_scaling", 1.0) != 1.0) == (style == "yarn")
    for policy in (POLICIES["d2o"], POLICIES["d2o"] | CachePositions()):
        result = run(kvcache.wrap(model, policy, page_size=4), prompt(36, seed=3), PROMPT)
        kvcache.unwrap(model)
        oracle = EntryOracle(own_log(result), PROMPT, POLICIES["d2o"], rotary.inv_freq, by_index=policy.relocates)
        assert (result.logits[0] - dense_logits(model, prompt(36, seed=3), oracle)).abs().max() < 5e-5


def test_far_beyond_the_window(backend):
    """StreamingLLM token by token by hand: keys without rotation in lists, rotated anew at every step."""
    model, ids, new = build("llama-gqa", num_hidden_layers=2), prompt(12, seed=5), 60
    kvcache.wrap(model, "streamingllm(sinks=2, window=9) | cachepositions")
    found = greedy(model, ids, new=new, output_logits=True)
    kvcache.unwrap(model)
    tokens, decoder, dim = found.sequences[0], model.model, 16
    held = [[] for _ in range(2)]  # per layer: (key, value) [heads, D] of the first 2 and the last 9 tokens

    def turned(x, place):
        cos, sin = (y[0, 0] for y in decoder.rotary_emb(x[None], torch.tensor([[place]])))
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    with torch.no_grad():
        for t in range(12 + new - 1):
            x = decoder.embed_tokens(tokens[t])
            for i, layer in enumerate(decoder.layers):
                y = layer.input_layernorm(x)
                q, k, v = (getattr(layer.self_attn, f"{n}_proj")(y).view(-1, dim) for n in "qkv")
                held[i].append((k, v))
                q = turned(q, len(held[i]) - 1)
                keys = torch.stack([turned(key, place) for place, (key, _) in enumerate(held[i])])
                values = torch.stack([value for _, value in held[i]])
                heads = [(keys[:, h // 2] @ q[h] / 4).softmax(0) @ values[:, h // 2] for h in range(4)]
                x = x + layer.self_attn.o_proj(torch.cat(heads))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
                if t >= 11 and len(held[i]) > 11:
                    del held[i][2]
            if t >= 11:
                logits = model.lm_head(decoder.norm(x))
                assert (found.logits[t - 11][0] - logits).abs().max() < 1e-3, t
                assert int(logits.argmax()) == int(tokens[t + 1])


@pytest.mark.parametrize("policy", [kvcache.Full(), H2O(100, 100), StreamingLLM(2, 100)])
def test_nothing_changes_before_something_is_evicted(policy, backend):
    model, ids = build("qwen3"), prompt(TOTAL)
    with torch.no_grad():
        expected = model(ids).logits
    found = run(kvcache.wrap(model, policy | CachePositions()), ids, PROMPT).logits
    assert (found - expected).abs().max() < 5e-5


def test_no_position_exceeds_what_a_head_holds(monkeypatch, backend):
    from kvcache.rotation import Rotation

    asked = []
    angles = Rotation.angles

    def remember(self, positions, sign=1.0):
        asked.append(positions)
        return angles(self, positions, sign)

    model = wrapped(StreamingLLM(3, 8))
    cache = run(model, prompt(TOTAL), PROMPT).cache
    monkeypatch.setattr(Rotation, "angles", remember)
    with torch.no_grad():
        model(prompt(1), past_key_values=cache)
    read = [x for x in asked if x.ndim == 3 and x.shape[2] == 12]
    assert len(read) == 3  # one per layer
    assert all(x[0, 0].sort().values.tolist() == list(range(12)) for x in read)


def test_policies_that_look_at_keys_see_them_as_the_model_rotated_them(backend):
    """Before anything is read at another place, the decisions are those of the policy alone."""
    for policy in (KeyDiff(11, recent=2), kvcache.LagKV(13, sinks=1, lag=4), kvcache.ExpectedAttention(11, horizon=9)):
        with_it, without = (
            kept(run(kvcache.wrap(build("llama-gqa"), p, page_size=4), prompt(PROMPT), PROMPT).cache)
            for p in (policy | CachePositions(), policy)
        )
        assert with_it == without


@pytest.mark.parametrize("name", ["streamingllm", "h2o", "adakv", "emasink"])
def test_two_turns_and_padding(name, backend):
    """A second prompt of several tokens reads a cache that has lost some; rows as they would be alone."""
    model = wrapped(POLICIES[name])
    rows = [prompt(TOTAL, seed=20 + i) for i in range(2)]
    ids, mask = padded([rows[0][0, :PROMPT], rows[1][0, :23]], "left")
    turn = torch.cat([rows[0][:, PROMPT : PROMPT + 5], rows[1][:, 23:28]])
    later = torch.cat([rows[0][:, PROMPT + 5 : PROMPT + 9], rows[1][:, 28:32]])

    def converse(parts, real):
        cache, out, start = kvcache.KVCache(model), [], 0
        places = (real.cumsum(1) - 1).clamp(min=0)
        for part in parts:
            end = start + part.shape[1]
            with torch.no_grad():
                out.append(
                    model(
                        part,
                        attention_mask=real[:, :end],
                        position_ids=places[:, start:end],
                        past_key_values=cache,
                    ).logits
                )
            start = end
        return torch.cat(out, 1)[:, -9:]

    real = torch.nn.functional.pad(mask, (0, 9), value=1)
    both = converse([ids, turn, *later.split(1, 1)], real)
    for r, n in enumerate((PROMPT, 23)):
        row = rows[r]
        parts = [row[:, :n], row[:, n : n + 5], *row[:, n + 5 : n + 9].split(1, 1)]
        alone = converse(parts, torch.ones(1, n + 9, dtype=torch.long))
        assert (both[r] - alone[0]).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["streamingllm", "h2o", "emasink"])
def test_drafts(name, backend):
    """Attention of drafts counts once they are accepted, at the places where it was computed."""
    model = wrapped(POLICIES[name])
    a = run(model, prompt(PROMPT), PROMPT).cache
    b = a.fork()
    a.activate_past_recording()
    with torch.no_grad():
        model(prompt(1, seed=7), past_key_values=a)
        model(prompt(1, seed=7), past_key_values=b)
    a.crop(0)
    assert kept(a) == kept(b)
    for x, y in zip(a.engine.layers, b.engine.layers, strict=True):
        assert torch.allclose(x.store.columns[0], y.store.columns[0], atol=1e-5)
    ids = torch.cat([prompt(12, seed=3), prompt(5, seed=4), prompt(12, seed=3)], 1)
    out = continued(model, ids, None, 10, prompt_lookup_num_tokens=3)
    assert torch.equal(out, continued(model, ids, None, 10, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral", "gemma2", "deepseek-v3"])
def test_models_whose_keys_cannot_be_moved_are_refused(kind):
    reasons = {"gpt2": "needs rotary", "opt": "needs rotary", "deepseek-v3": "transforms its keys"}
    why = reasons.get(kind, "sliding windows")
    model = build(kind)
    for policy in (H2O(6, 5) | CachePositions(), CachePositions() | SkipDecode(1, 2)):
        with pytest.raises(ValueError, match=f"positions='cache'.*{why}"):
            kvcache.wrap(model, policy)


def test_what_cannot_be_combined():
    with pytest.raises(ValueError, match=r"cannot combine tokenselect.* \| cachepositions: TokenSelect says itself"):
        CachePositions() | TokenSelect()
    with pytest.raises(ValueError, match="both decide the positions"):
        CachePositions() | CachePositions()
    policy = H2O(6, 5) | CachePositions() | SkipDecode(1, 2)
    assert kvcache.parse_policy(str(policy)) == policy
    assert str(kvcache.Full() | CachePositions()) == "cachepositions"
