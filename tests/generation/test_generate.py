"""Everything that ``generate()`` can do with a cache, with ``full`` against the unwrapped model."""

import copy
import gc
import threading

import pytest
import torch
from support.models import build, continued, greedy, padded, prompt
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer

import kvcache

ROWS = [prompt(n, seed=20 + n)[0] for n in (30, 19, 25)]
POLICIES = [
    "full",
    "streamingllm(sinks=2, window=10)",
    "h2o(heavy=5, recent=4)",
    "tokenselect(k=8, sinks=2, local=6, reuse=0.4, chunk=5)",
    "skipdecode(min_layers=1, max_layers=3, horizon=60)",
]


def batch(side="left"):
    return padded(ROWS, side)


def pools(cache):
    return [s.pool for s in cache.engine.storages.values()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_generous_policies_equal_the_unwrapped_model_on_padded_batches(side, backend):
    model = build()
    ids, mask = batch(side)
    expected = continued(model, ids, mask)
    for policy in ("streamingllm", "h2o(heavy=90, recent=9)", "tokenselect", "tokenselect(k=32, sinks=1, local=21)"):
        kvcache.wrap(model, policy)
        assert torch.equal(continued(model, ids, mask), expected), policy


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_generate_what_they_generate_alone(policy, backend):
    model = kvcache.wrap(build(), policy)
    together = continued(model, *batch())
    for r, row in enumerate(ROWS):
        assert torch.equal(continued(model, row[None])[0], together[r]), r


def test_beam_search_equals_unwrapped(backend):
    model = build()
    ids, mask = batch()
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    expected = greedy(model, ids, mask, **options)
    kvcache.wrap(model, "full", page_size=4)
    out = greedy(model, ids, mask, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.allclose(out.sequences_scores, expected.sequences_scores, atol=1e-4)
    assert not torch.equal(out.sequences[::2], greedy(model, ids, mask).sequences)  # beams found something else


def test_beams_share_pages_until_they_write(backend):
    model = kvcache.wrap(build(), "full", page_size=4)
    with torch.no_grad():
        cache = model(prompt(30), use_cache=True).past_key_values
        one = cache.nbytes
        pages = pools(cache)[0].used
        cache.batch_repeat_interleave(4)
        assert cache.nbytes == one
        assert pools(cache)[0].used == pages
        cache.reorder_cache(torch.tensor([3, 1, 0, 0]))
        assert cache.nbytes == one
        # 30 entries fill 7 pages of 4 and half of an eighth: only that one is copied.
        model(prompt(1, rows=4), past_key_values=cache)
        assert pools(cache)[0].used == pages + 3 * 2 * 3
        assert cache.nbytes == one // 8 * 11


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_beam_search_of_one_beam_each_is_greedy(policy, backend):
    """Beams that start equal and are reordered must stay the policy's own: a beam forced to the greedy path."""
    model = kvcache.wrap(build(), policy, page_size=4)
    ids, mask = batch()
    plain = greedy(model, ids, mask).sequences
    forced = {tuple(row[:n].tolist()): int(row[n]) for row in plain for n in range(ids.shape[1], plain.shape[1])}

    def follow(row, tokens):
        return [forced[tuple(tokens.tolist())]] if tuple(tokens.tolist()) in forced else list(range(97))

    out = greedy(model, ids, mask, num_beams=3, prefix_allowed_tokens_fn=follow)
    assert out.sequences.shape == plain.shape
    assert torch.equal(out.sequences, plain)


def test_sampling_equals_unwrapped_with_the_same_seed(backend):
    model = build()
    ids, mask = batch()

    def sample():
        torch.manual_seed(7)
        return model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=16)

    expected = sample()
    assert len({tuple(r) for r in expected.tolist()}) == 6
    kvcache.wrap(model)
    assert torch.equal(sample(), expected)


class Letters:
    def decode(self, ids, **kwargs):
        return "".join(chr(200 + int(i)) for i in ids)


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_streaming(policy, capsys, backend):
    model = kvcache.wrap(build(), policy)
    ids = prompt(30)
    expected = Letters().decode(continued(model, ids)[0])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        streamer=TextStreamer(Letters(), skip_prompt=True),
    )
    assert capsys.readouterr().out.strip("\n") == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["single", "padded"])
def test_chat_continues_with_a_kept_cache(policy, shape, backend):
    """Two turns through one cache; for ``full`` the same as everything at once, without kvcache."""
    model = kvcache.wrap(build(), policy)
    ids, mask = (prompt(30), torch.ones(1, 30, dtype=torch.long)) if shape == "single" else batch()
    cache = kvcache.KVCache(model)
    first = greedy(model, ids, mask, 8, past_key_values=cache).sequences
    turns = [prompt(9, seed=40 + r)[0][: 9 - 3 * r] for r in range(len(ids))]
    more, more_mask = padded(turns, "left")
    sequence = torch.cat([first, more], 1)
    real = torch.cat([mask, torch.ones(len(ids), 8, dtype=torch.long), more_mask], 1)
    seen = cache.seen_tokens
    second = greedy(model, sequence, real, 12, past_key_values=cache)
    assert second.past_key_values is cache
    assert seen == ids.shape[1] + 7
    assert cache.seen_tokens == sequence.shape[1] + 11
    new = second.sequences[:, -12:]
    if policy == "full":
        kvcache.unwrap(model)
        assert torch.equal(continued(model, sequence, real, 12), new)
        kvcache.wrap(model, policy)
    # Every row is what it is without the others and without padding, turn by turn.
    for r in range(len(ids) if shape == "padded" else 0):
        alone = kvcache.KVCache(model)
        row = greedy(model, ROWS[r][None], None, 8, past_key_values=alone).sequences
        row = torch.cat([row, turns[r][None]], 1)
        assert torch.equal(continued(model, row, None, 12, past_key_values=alone)[0], new[r]), r


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [5, 10, 50])
def test_prefill_in_chunks(policy, size, backend):
    model = kvcache.wrap(build(), policy)
    ids = prompt(30)  # chunks of 5 and 10 are multiples of TokenSelect's own
    assert torch.equal(continued(model, ids, prefill_chunk_size=size), continued(model, ids))


@pytest.mark.parametrize("policy", ["full", POLICIES[1], POLICIES[2], POLICIES[4]])
def test_prefill_in_chunks_of_a_padded_batch(policy, backend):
    model = kvcache.wrap(build(), policy)
    assert torch.equal(continued(model, *batch(), prefill_chunk_size=7), continued(model, *batch()))


# -- speculation ----------------------------------------------------------------------------------------------------


def repetitive():
    piece = prompt(9, seed=3)
    return torch.cat([piece, prompt(4, seed=4), piece, prompt(3, seed=5), piece[:, :5]], 1)


@pytest.mark.parametrize("policy", ["full", POLICIES[1], POLICIES[4]])
def test_prompt_lookup_is_greedy(policy, backend):
    model = kvcache.wrap(build(), policy)
    assert torch.equal(continued(model, repetitive(), prompt_lookup_num_tokens=3), continued(model, repetitive()))


def test_an_assistant_that_is_right_or_wrong_changes_nothing(backend):
    model = kvcache.wrap(build(), "full")
    ids = prompt(30)
    expected = continued(model, ids)
    for assistant in (build(), build(seed=5)):
        assert torch.equal(continued(model, ids, assistant_model=assistant), expected)
        kvcache.wrap(assistant, "streamingllm(sinks=1, window=8)")
        assert torch.equal(continued(model, ids, assistant_model=assistant), expected)


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[2], POLICIES[4]])
def test_an_assistant_leaves_an_evicting_policy_within_its_budget(policy, backend):
    """Drafts are checked together: they read what would have been evicted between them, and their first tokens come
    with the prompt. So the tokens may differ from those of plain decoding; they do not depend on the assistant's cache,
    and what is kept afterwards is within the budget."""
    model, assistant = kvcache.wrap(build(), policy), build()
    expected = greedy(model, prompt(30), assistant_model=assistant)
    kvcache.wrap(assistant, "full")
    out = greedy(model, prompt(30), assistant_model=assistant)
    assert torch.equal(out.sequences, expected.sequences)
    cache = out.past_key_values
    plain = greedy(model, prompt(30)).past_key_values
    cache.crop(0)
    assert cache.seen_tokens in (53, 54)
    if policy != POLICIES[4]:
        assert cache.kept(1).tolist() == plain.kept(1).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_after_speculation_a_cache_evicts_again(policy, backend):
    model = kvcache.wrap(build(), policy)
    cache = kvcache.KVCache(model)
    first = greedy(model, prompt(30), new=8, assistant_model=build(seed=5), past_key_values=cache).sequences
    more = torch.cat([first, prompt(4, seed=6)], 1)
    out = greedy(model, more, new=12, past_key_values=cache)
    assert not cache.engine.recording
    assert not any(layer.pending for layer in cache.engine.layers)
    assert cache.seen_tokens == 30 + 8 + 4 + 11
    budget = {POLICIES[1]: 12, POLICIES[2]: 9}.get(policy)
    if budget:
        assert (cache.kept(1) == budget).all()
    if policy == "full":
        kvcache.unwrap(model)
        assert torch.equal(greedy(model, more, new=12).sequences, out.sequences)


# TokenSelect's chunks vote together: what a draft reads depends on all of it.
@pytest.mark.parametrize("policy", [POLICIES[i] for i in (0, 1, 2, 4)])
def test_a_crop_takes_back_what_was_recorded(policy, backend):
    """Accepting a draft in part leaves the cache as if only the accepted tokens had come, in one forward."""
    model = kvcache.wrap(build(), policy)
    ids, draft = prompt(30), prompt(5, seed=77)

    def after(cropped):
        cache = kvcache.KVCache(model)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.activate_past_recording()
            model(draft if cropped else draft[:, :2], past_key_values=cache)
            cache.crop(-3 if cropped else 0)
            cache.engine.recording = False
            logits = [model(prompt(1, seed=s), past_key_values=cache).logits for s in range(6)]
        return torch.cat(logits), [cache.positions(i, 0, h).tolist() for i in range(3) for h in range(2)], cache

    logits, positions, cache = after(cropped=True)
    expected, same, _ = after(cropped=False)
    assert cache.seen_tokens == 30 + 2 + 6
    assert positions == same
    assert (logits - expected).abs().max() < 5e-5


# -- other caches and modes -----------------------------------------------------------------------------------------


def test_without_a_cache(backend):
    model = build()
    ids, mask = batch()
    expected = continued(model, ids, mask, 8)
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    out = greedy(model, ids, mask, 8, use_cache=False)
    assert torch.equal(out.sequences[:, -8:], expected)
    assert out.past_key_values is None


def test_a_cache_implementation_that_the_user_names_wins(backend):
    model = build()
    expected = continued(model, *batch())
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    out = greedy(model, *batch(), cache_implementation="static")
    assert type(out.past_key_values).__name__ == "StaticCache"
    assert torch.equal(out.sequences[:, -24:], expected)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt-oss", "gemma2"])
def test_a_dynamic_cache_that_the_user_passes_is_used(name, backend):
    model = build(name)
    expected = continued(model, *batch())
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    cache = DynamicCache(config=model.config)
    out = greedy(model, *batch(), past_key_values=cache)
    assert out.past_key_values is cache
    assert torch.equal(out.sequences[:, -24:], expected)


def test_two_models_that_share_a_config_object(backend):
    first = build()
    second = AutoModelForCausalLM.from_config(first.config).eval()
    second.load_state_dict(build(seed=9).state_dict())
    shared = second.config = first.config
    ids = prompt(30)
    expected = continued(first, ids), continued(second, ids)
    assert not torch.equal(*expected)
    kvcache.wrap(first, "full")
    assert torch.equal(continued(second, ids), expected[1])  # not wrapped, but its config is
    kvcache.wrap(second, "full")
    assert torch.equal(continued(first, ids), expected[0])
    assert torch.equal(continued(second, ids), expected[1])
    kvcache.unwrap(first)
    kvcache.unwrap(second)
    assert shared._attn_implementation == "sdpa"
    assert torch.equal(continued(first, ids), expected[0])
    assert torch.equal(continued(second, ids), expected[1])


def test_wrapping_again_replaces_the_policy(backend):
    model = build()
    ids = prompt(40)
    expected = continued(model, ids)
    kvcache.wrap(model, "skipdecode(min_layers=1, max_layers=2, horizon=9, prompt='schedule')")
    skipped = continued(model, ids)
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    out = greedy(model, ids)
    assert out.past_key_values.kept(1).tolist() == [[5, 5]]
    kvcache.wrap(model, "full")
    assert torch.equal(continued(model, ids), expected)
    assert not torch.equal(skipped, expected)
    kvcache.unwrap(model)
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_direct_calls_without_generate(backend):
    model = build()
    ids = prompt(30)
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, :2]], 1)).logits[:, 30:]
        hidden = model.model(ids).last_hidden_state
        kvcache.wrap(model, "full")
        out = model(ids)
        assert type(out.past_key_values) is kvcache.KVCache
        two = [model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(2)]
        assert (torch.cat(two, 1) - expected).abs().max() < 5e-5
        inner = model.model(ids)
        assert type(inner.past_key_values) is kvcache.KVCache
        assert (inner.last_hidden_state - hidden).abs().max() < 5e-5
        assert model(ids, use_cache=False).past_key_values is None
        positional = model(ids, torch.ones_like(ids))
        assert positional.past_key_values.seen_tokens == 30


def test_input_embeddings(backend):
    model = build()
    ids, mask = batch()
    embeddings = model.get_input_embeddings()(ids).detach()
    expected = continued(model, ids, mask)
    kvcache.wrap(model)
    out = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert torch.equal(out, expected)


def test_gradients_are_those_of_the_unwrapped_model(backend):
    model = build().train()
    ids, mask = batch()

    def gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    found = gradients()
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert any(bool(g.abs().max() > 1e-3) for g in expected.values())


def test_a_deep_copy_is_a_model_of_its_own(backend):
    model = kvcache.wrap(build(), "skipdecode(min_layers=1, max_layers=2, horizon=9)")
    ids = prompt(30)
    expected = continued(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(continued(twin, ids), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(continued(model, ids), expected)
    assert not torch.equal(continued(twin, ids), expected)
    kvcache.unwrap(twin)
    assert torch.equal(continued(model, ids), expected)
    assert type(greedy(twin, ids).past_key_values) is DynamicCache


def test_a_saved_wrapped_model_loads_as_a_plain_one(tmp_path, backend):
    model = build()
    ids = prompt(30)
    expected = continued(model, ids)
    kvcache.wrap(model, "h2o(heavy=3, recent=2)")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert "kvcache" not in (tmp_path / "config.json").read_text()
    out = greedy(again, ids)
    assert type(out.past_key_values) is DynamicCache
    assert torch.equal(out.sequences[:, 30:], expected)


@pytest.mark.parametrize("policy", ["full", POLICIES[2], POLICIES[4]])
def test_threads_on_one_wrapped_model(policy, backend):
    model = kvcache.wrap(build(), policy)
    prompts = [prompt(20 + 3 * i, seed=i) for i in range(4)]
    expected = [continued(model, p) for p in prompts]
    found = [None] * 4

    def work(i):
        for _ in range(2):
            found[i] = continued(model, prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


# -- failures in the middle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_inside_a_layer_leaves_the_cache_as_it_was(policy, backend):
    model = kvcache.wrap(build(), policy)
    ids = prompt(30)

    class Boom(Exception):
        pass

    def explode(module, args, output):
        raise Boom

    def content(cache):
        stores = [x.store for x in cache.engine.layers if x.store is not None]
        scores = [s.columns[0, r, h, :n].tolist() for s in stores for r, h, n in live(s)]
        return cache.seen_tokens, [cache.kept(x).tolist() for x in range(3)], cache.nbytes, scores

    def live(store):
        return [(r, h, int(n)) for r, row in enumerate(store.counts) for h, n in enumerate(row)]

    def logits(fail):
        cache, out = kvcache.KVCache(model), []
        with torch.no_grad():
            for i, piece in enumerate([ids, *prompt(6, seed=4).split(1, 1), prompt(4, seed=6), prompt(1, seed=8)]):
                if fail and i in (0, 3, 7):
                    before = content(cache)
                    handle = model.model.layers[2].mlp.register_forward_hook(explode)
                    with pytest.raises(Boom):
                        model(piece, past_key_values=cache)
                    handle.remove()
                    if i == 0:  # nothing binds an empty cache to the number of rows of what failed
                        model(prompt(7, rows=2), past_key_values=cache.fork())
                    assert content(cache) == before
                out.append(model(piece, past_key_values=cache).logits)
        return torch.cat(out, 1)

    assert (logits(True) - logits(False)).abs().max() < 5e-5
    assert kvcache.attention.current_frame() is None


@pytest.mark.parametrize("policy", ["full", POLICIES[2]])
def test_out_of_pages_changes_nothing(policy, backend):
    model = kvcache.wrap(build(), policy, page_size=4, max_tokens=40)
    ids = prompt(30)
    with torch.no_grad():
        cache = model(ids).past_key_values
        step = prompt(1, seed=4)
        expected = model(step, past_key_values=cache.fork()).logits
        before = cache.seen_tokens, cache.kept(0).tolist(), cache.nbytes, cache.positions(2, 0, 1).tolist()
        with pytest.raises(kvcache.OutOfPages, match="max_tokens"):
            model(prompt(60), past_key_values=cache)
        assert (cache.seen_tokens, cache.kept(0).tolist(), cache.nbytes, cache.positions(2, 0, 1).tolist()) == before
        assert torch.equal(model(step, past_key_values=cache).logits, expected)
    if policy == "full":
        with pytest.raises(kvcache.OutOfPages):
            greedy(model, ids, new=24)
    else:
        assert greedy(model, ids, new=24).past_key_values.seen_tokens == 53  # eviction makes room
    with pytest.raises(ValueError, match="41 tokens.*max_tokens=40"):
        greedy(model, prompt(41))
    assert torch.equal(greedy(model, ids, new=4).sequences[:, :30], ids)


# -- copies, rows, lifetime -----------------------------------------------------------------------------------------


def steps(model, cache, rows=1, seeds=range(5)):
    with torch.no_grad():
        return torch.cat([model(prompt(1, seed=s, rows=rows), past_key_values=cache).logits for s in seeds], 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_fork_export_and_import_continue_alike(policy, backend):
    model = kvcache.wrap(build(), policy, page_size=4)
    ids, mask = batch()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    steps(model, cache, 3, [50, 51])
    state = cache.export_state()
    frozen = copy.deepcopy(state)
    twin, deep = cache.fork(), copy.deepcopy(cache)
    used = pools(cache)[0].used
    expected = steps(model, cache, 3)
    assert pools(cache)[0].used > used or policy != "full"  # written pages were copied, not shared
    moved = kvcache.KVCache.import_state(model, state)
    for other in (twin, deep, moved):
        assert other.seen_tokens == 32
        assert (steps(model, other, 3) - expected).abs().max() < 5e-5
        assert [other.kept(i).tolist() for i in range(3)] == [cache.kept(i).tolist() for i in range(3)]
        assert all(torch.equal(other.positions(2, r, 1), cache.positions(2, r, 1)) for r in range(3))
    for a, b in zip(state["layers"], frozen["layers"]):  # what was exported stays as it was
        assert all(torch.equal(a[n], b[n]) for n in ("keys", "values", "counts", "positions", "columns"))
        assert all(
            torch.equal(a["state"][n], b["state"][n]) for n in a["state"] if isinstance(a["state"][n], torch.Tensor)
        )


# One more each whose rows remember something of their own: a selection that is never renewed, a share of the prompt.
@pytest.mark.parametrize(
    "policy",
    [*POLICIES, "tokenselect(k=4, sinks=2, local=4, reuse=-1, chunk=4)", "h2o(heavy=0.3, recent=0.2)"],
)
def test_rows_can_be_reordered_repeated_and_selected(policy, backend):
    model = kvcache.wrap(build(), policy, page_size=4)
    ids, mask = batch()

    def start():
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
        steps(model, cache, 3, [60])
        return cache

    places = mask.sum(1)[:, None] + 1

    def logits(cache, rows):
        with torch.no_grad():
            out = []
            for s in range(4):
                token = prompt(1, seed=s).expand(len(rows), -1)
                out.append(model(token, past_key_values=cache, position_ids=places[rows] + s).logits)
        return torch.cat(out, 1)

    expected = logits(start(), [0, 1, 2])
    changes = {
        (2, 0, 1): lambda c: c.reorder_cache(torch.tensor([2, 0, 1])),
        (1, 1, 0): lambda c: c.reorder_cache(torch.tensor([1, 1, 0])),
        (0, 0, 1, 1, 2, 2): lambda c: c.batch_repeat_interleave(2),
        (2, 1): lambda c: c.batch_select_indices(torch.tensor([2, 1])),
    }
    for rows, change in changes.items():
        cache = start()
        change(cache)
        found = logits(cache, list(rows))
        assert (found - expected[list(rows)]).abs().max() < 5e-5, rows
        if len(set(rows)) < len(rows):
            twins = [r for r in range(len(rows)) if rows.index(rows[r]) != r]
            assert all(torch.equal(found[r], found[rows.index(rows[r])]) for r in twins)


@pytest.mark.parametrize("policy", POLICIES)
def test_crop_and_reset(policy, backend):
    model = kvcache.wrap(build(), policy)
    with torch.no_grad():
        cache = model(prompt(12)).past_key_values
        if policy in (POLICIES[0], POLICIES[4]):
            expected = steps(model, cache)
            cache.crop(-5)
            assert cache.seen_tokens == 12
            assert (steps(model, cache) - expected).abs().max() < 5e-5
        cache.crop(-3)
        assert all(int(p) < cache.seen_tokens for i in range(3) for p in cache.positions(i, 0, 0))
        cache.reset()
        assert (cache.seen_tokens, cache.nbytes, cache.kept(0).numel()) == (0, 0, 0)
        again = model(prompt(20, seed=3), past_key_values=cache).logits
        assert (again - model(prompt(20, seed=3)).logits).abs().max() < 5e-5
    for bad in (1, -21):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(bad)
    with pytest.raises(TypeError, match="tokens_to_remove"):
        cache.crop(1.5)


@pytest.mark.parametrize("policy", POLICIES)
def test_pages_return_when_caches_die(policy, backend):
    gc.collect()
    gc.disable()  # pages must not wait for the garbage collector
    try:
        model = kvcache.wrap(build(), policy, page_size=4)
        out = greedy(model, *batch(), num_beams=2)
        cache = out.past_key_values
        (pool,) = pools(cache)
        twin = cache.fork()
        steps(model, twin, 6, [1])
        del out, cache
        assert pool.used > 0
        del twin
        assert pool.used == 0
    finally:
        gc.enable()
