"""``kvcache bench`` on tiny shapes: caches behind a context, what is held and read, contenders that cannot run."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support.pretend_gpu import move, on_gpu, pretend_gpu
from transformers import DynamicCache, StaticCache

import kvcache
from kvcache import KVCache
from kvcache.attention import CACHE
from kvcache.evaluation.bench import contender, decode, limits, setting
from kvcache.evaluation.bench.caches import Context, filled, needs_prompt
from kvcache.evaluation.bench.contender import Ours, Transformers
from kvcache.evaluation.bench.shapes import SHAPES, Shape, build, shape_named
from kvcache.evaluation.bench.timing import Peak
from kvcache.evaluation.rows import Row
from kvcache.layers import decoder_layers

FILLED = ("full", "streamingllm(sinks=2, window=14)", "h2o(heavy=8, recent=8)", "tokenselect(k=8, sinks=4, local=4)")
TINY = ("llama-tiny", "qwen3-tiny", "opt-tiny")


def tiny(name="llama-tiny", **options):
    return build(shape_named(name), 256, **options)


@pytest.mark.parametrize("name", [n for n, shape in SHAPES.items() if "config.json" in shape.source])
def test_shapes_have_the_published_sizes(name):
    """Parameters in billions, counted on the meta device."""
    model = build(SHAPES[name], 2048, device="meta")
    counted = sum(p.numel() for p in model.parameters()) / 1e9
    published = {"qwen3-0.6b": 0.596, "qwen3-4b": 4.02, "llama-3-8b": 8.03, "opt-6.7b": 6.66}[name]
    assert counted == pytest.approx(published, rel=0.005)
    assert model.dtype == SHAPES[name].dtype


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="unknown model shape 'llama-4'; one of llama-tiny"):
        shape_named("llama-4")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("policy", FILLED)
def test_a_filled_cache_is_one_that_read_a_prompt(name, policy):
    """The same entries, kept and seen; and it goes on like one whose entries came through ``update``."""
    model = kvcache.wrap(tiny(name))
    context = Context.random(model, 2, 40, seed=1)
    cache = filled(model, policy, context)
    assert cache.seen_tokens == 40
    kept = 16 if cache.policy.retains else 40
    assert all(bool((cache.kept(i) == kept).all()) for i in range(2))
    if not cache.policy.retains:
        store = cache.engine.layers[1].store
        assert torch.equal(store.gather("keys"), context.keys)
    read = KVCache(model, policy)
    with torch.inference_mode():
        model(context.prompt, **{CACHE: read})
        for c in (cache, read):
            mask = torch.ones_like(context.sequence)
            model.generate(context.sequence, attention_mask=mask, **{CACHE: c}, max_new_tokens=4)
    assert cache.seen_tokens == read.seen_tokens == 44
    assert [cache.kept(i).tolist() for i in range(2)] == [read.kept(i).tolist() for i in range(2)]
    assert cache.nbytes == read.nbytes


def test_a_filled_full_cache_says_what_dynamic_cache_says():
    model = tiny()
    context = Context.random(model, 2, 40, seed=1)
    with torch.inference_mode():
        dense = context.fill(DynamicCache(config=model.config))
        want = model(context.sequence[:, -1:], **{CACHE: dense}).logits
        kvcache.wrap(model)
        got = model(context.sequence[:, -1:], **{CACHE: filled(model, "full", context)}).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_some_policies_need_a_real_prompt():
    assert needs_prompt("tokenselect(k=8, sinks=4, local=4, positions='compact')", 2)
    assert needs_prompt("skipdecode(min_layers=1, max_layers=2, prompt='schedule')", 2)
    assert not needs_prompt("skipdecode(min_layers=1, max_layers=2)", 2)
    model = kvcache.wrap(tiny())
    context = Context.random(model, 1, 20)
    cache = filled(model, "tokenselect(k=8, sinks=4, local=4, positions='compact')", context)
    assert cache.seen_tokens == 20


@pytest.mark.parametrize("name", TINY)
def test_bytes_of_a_step(name):
    model = tiny(name)
    heads, dim = limits.kv_heads(model)
    assert limits.entry_bytes(model) == 2 * 2 * heads * dim * 4
    parameters = sum(p.nbytes for p in model.parameters())
    embedded = 256 * 64 * 4 if name != "opt-tiny" else model.model.decoder.embed_positions.weight.nbytes
    assert limits.weight_bytes(model) == parameters - embedded
    layer = sum(p.nbytes for p in decoder_layers(model, model.config.num_hidden_layers)[0].parameters())
    assert limits.weight_bytes(model, 1.5) == parameters - embedded - layer // 2
    context = Context.random(model, 3, 20)
    cache = context.fill(DynamicCache(config=model.config))
    assert limits.cache_bytes(cache) == 3 * 20 * limits.entry_bytes(model)
    weights = limits.weight_bytes(model)
    assert limits.step_bytes(model, cache, 3, 20.0) == weights + 60 * limits.entry_bytes(model)
    kvcache.wrap(model)
    ours = filled(model, "streamingllm(sinks=2, window=6)", context)
    assert limits.step_bytes(model, ours, 3, 0.0) == weights + 24 * limits.entry_bytes(model)
    skipping = filled(model, "skipdecode(min_layers=1, max_layers=2, horizon=10)", context)
    assert limits.step_bytes(model, skipping, 3, 0.0) == weights - layer + 60 * limits.entry_bytes(model) / 2


def test_tied_embeddings_are_read_as_the_output_projection():
    shape = Shape("tied", "LlamaForCausalLM", {**SHAPES["llama-tiny"].sizes, "tie_word_embeddings": True})
    model = build(shape, 32, dtype=torch.float32)
    assert limits.weight_bytes(model) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_plausible(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert 1e8 < limits.read_bandwidth(size=8 << 20, repeats=3) < 1e12
    finally:
        torch.set_num_threads(before)


def test_peak_sees_memory_that_is_gone_again():
    with Peak() as peak:
        block = bytearray(64 << 20)
        del block
    if Path("/proc/self/clear_refs").exists():
        assert 60 << 20 < peak.nbytes < 80 << 20


def run(tmp_path, **options):
    settings = {"models": ("llama-tiny",), "contexts": (24, 48), "rounds": 2, "tokens": 2, "prefill": 24}
    rows = decode.run(tmp_path, **{**settings, "only": ("dynamic", "static", "kvcache"), **options})
    assert [r.as_dict() for r in rows] == json.loads((tmp_path / "report.json").read_text())
    return rows


def test_a_run_pairs_contenders_and_reports_them(tmp_path, capsys):
    rows = run(tmp_path, batches=(1, 2))
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        x = row.extra
        assert row.ms_per_token > 0
        assert x["tokens_per_s"] == pytest.approx(x["batch"] * 1e3 / row.ms_per_token)
        assert x["of_limit"] == pytest.approx(x["limit_ms"] / row.ms_per_token)
        assert ("first_token_s" in x) == (row.length <= 24)
        assert x["peak_nbytes"] >= row.nbytes * x["batch"]
        assert (row.ratio == 1.0) == (row.policy == contender.BASELINE)
        assert x["paired"]
    assert {r.policy for r in rows} >= {"full", "h2o(heavy=0.1, recent=0.1)", "StaticCache + sdpa"}
    full = [r for r in rows if r.policy == "full" and r.extra["batch"] == 2]
    assert full[1].extra["limit_ms"] > full[0].extra["limit_ms"]
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
    assert "Decode behind 48 tokens of context, batch 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen3-tiny", "opt-tiny"])
def test_other_shapes_and_half_precision(tmp_path, name):
    rows = run(tmp_path, models=(name,), contexts=(24,), dtype="bfloat16", policies=["full"])
    assert [r.extra["dtype"] for r in rows] == ["bfloat16"] * 3
    full = next(r for r in rows if r.policy == "full")
    assert full.full_nbytes == (24 + decode_room() + 24) * 2 * 2 * full_heads(name) * 2


def decode_room():
    return (2 + 1) * (2 + 2) + 8


def full_heads(name):
    return {"qwen3-tiny": 2 * 32, "opt-tiny": 4 * 16}[name]


def test_one_after_the_other_where_memory_is_short(tmp_path, monkeypatch):
    """As on a GPU whose memory one cache fills: each contender is made, timed and let go."""
    alive, most = [], []
    prepare, close = Transformers.prepare, Transformers.close

    def counted(self):
        prepare(self)
        alive.append(self)
        most.append(len(alive))

    def closed(self):
        if self in alive:
            alive.remove(self)
        close(self)

    need = limits.entry_bytes(tiny()) * (24 + decode_room())
    monkeypatch.setattr(decode, "free_memory", lambda device: 3 * need)
    for cls in (Transformers, Ours):
        monkeypatch.setattr(cls, "prepare", counted if cls is Transformers else cls.prepare)
        monkeypatch.setattr(cls, "close", closed)
    rows = run(tmp_path, contexts=(24,))
    assert max(most) == 1
    assert len(rows) == 5
    assert all(r.ms_per_token > 0 and not r.extra["paired"] for r in rows)


def test_what_does_not_fit_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys):
    need = limits.entry_bytes(tiny()) * (24 + decode_room())
    monkeypatch.setattr(decode, "free_memory", lambda device: need + 1)
    monkeypatch.setattr(contender, "free_memory", lambda device: need + 1)
    rows = run(tmp_path, contexts=(24, 48))
    assert [r.policy for r in rows if r.length == 48] == ["every cache"]
    assert "needs" in rows[-1].extra["left_out"]
    assert rows[-1].ms_per_token is None
    assert "left out" in capsys.readouterr().out


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such compiler\nand much more")

    monkeypatch.setattr(setting, "StaticCache", broken)
    rows = run(tmp_path, contexts=(24,), only=("dynamic", "static", "hqq", "kvpress", "kvcache"), policies=["full"])
    reasons = {r.policy: r.extra["left_out"] for r in rows if r.ms_per_token is None}
    assert reasons["StaticCache + sdpa"] == "RuntimeError: no such compiler"
    assert reasons["kvpress SnapKV 20%"].startswith("no --kvpress-python")
    assert {r.policy for r in rows if r.ms_per_token} >= {"full", contender.BASELINE}


def test_a_python_without_kvpress_is_said(tmp_path):
    options = {"only": ("dynamic", "kvpress"), "contexts": (24,)}
    for python, why in ((sys.executable, "kvpress"), (str(tmp_path / "none"), "does not start")):
        rows = run(tmp_path, kvpress_python=python, **options)
        assert len(rows) == 3
        assert all(why in r.extra["left_out"] for r in rows[1:])


def test_kvpress_worker_times_like_the_parent(tmp_path, monkeypatch):
    """The worker with a press that a folder in its path defines: same weights, clock and protocol."""
    (tmp_path / "kvpress.py").write_text(
        "import contextlib\n"
        "class SnapKVPress:\n"
        "    def __init__(self, compression_ratio): self.compression_ratio = compression_ratio\n"
        "    @contextlib.contextmanager\n"
        "    def __call__(self, model):\n"
        "        yield\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    presses = (("SnapKVPress", {"compression_ratio": 0.5}),)
    rows = run(tmp_path, only=("dynamic", "kvpress"), presses=presses, kvpress_python=sys.executable)
    theirs = [r for r in rows if r.backend == "kvpress"]
    assert [r.policy for r in theirs] == ["kvpress SnapKV 50%"] * 2, theirs
    read, filled_ = theirs
    assert read.extra["first_token_s"] > 0  # a prompt was read; this press keeps all of it
    assert read.read == 24 + decode_room() - 8 + 6
    assert "first_token_s" not in filled_.extra  # too long: random entries, as many as the press would keep
    assert filled_.read == 24 + decode_room() - 8 + 6
    assert all(r.ms_per_token > 0 and r.extra["peak_nbytes"] >= r.nbytes for r in theirs)


def test_bad_values_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown contenders \['vllm'\]; known: dynamic"):
        run(tmp_path, only=("vllm",))
    with pytest.raises(ValueError, match="unknown model shape"):
        run(tmp_path, models=("gpt-5",))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here"):
            run(tmp_path, device="cuda")


def test_static_cache_and_quantised_tensors_count_their_bytes():
    model = tiny()
    context = Context.random(model, 1, 20)
    static = context.fill(StaticCache(config=model.config, max_cache_len=32))
    assert 0 <= limits.cache_bytes(static) - 32 * limits.entry_bytes(model) < 100  # and its own counters
    layer = type("Layer", (), {})()
    layer.keys, layer.state = (torch.zeros(4), {"scale": torch.zeros(2)}), "text"
    assert limits.cache_bytes(type("Cache", (), {"layers": [layer]})()) == 24


def test_what_only_a_gpu_has(monkeypatch):
    """The lines that ask torch.cuda, with a pretended GPU."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...
        def synchronize(self): ...
        def elapsed_time(self, end):
            return 2.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert limits._cuda_bandwidth(torch.device("cpu"), 4 << 20, 3) == (4 << 20) / 2e-3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert limits.free_memory("cuda") == 7
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 140)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with Peak("cuda") as peak:
        pass
    assert peak.nbytes == 40
    assert "h2o(heavy=512, recent=512)" in setting.default_policies(32768, "cuda")
    assert setting.DEFAULTS["cuda"]["contexts"] == (4096, 32768, 131072)


def test_the_script_takes_what_was_fetched(tmp_path):
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench/end_to_end/generate.py"))
    completed = script["completed"]
    completed.__globals__["PEERS"] = tmp_path
    assert completed([]) == ["--out", "bench/results/generate"]
    assert completed(["--out=x"]) == ["--out=x"]
    python = tmp_path / "kvpress/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert completed(["--out", "x"]) == ["--out", "x", "--kvpress-python", str(python)]
    assert completed(["--out", "x", "--kvpress-python", "y"]) == ["--out", "x", "--kvpress-python", "y"]


def test_plot_of_rows_without_a_baseline(tmp_path):
    from kvcache.evaluation.plots import plot_contexts

    extra = {"model": "llama-tiny", "batch": 1, "limit_ms": 1.0}
    rows = [
        Row("full", "generate", name="full", ms_per_token=m, length=n, extra=extra) for n, m in ((8, 2.0), (16, 3.0))
    ]
    rows.append(Row("StaticCache + torch.compile", "generate", length=8, extra={**extra, "left_out": "no compiler"}))
    assert plot_contexts(rows, tmp_path / "x.png").stat().st_size > 5000


@pytest.fixture
def pretended(monkeypatch):
    """kvcache bench on a GPU that is not there: tensors that say they are on it, and what torch.cuda would answer."""
    real, on_host = build, Context.random

    def there(model, rows, length, seed=0):
        state = [p.inner for p in model.parameters()]
        assert state
        model_like = real(shape_named("llama-tiny"), 256)
        c = on_host(model_like, rows, length, seed)
        return Context(model, rows, length, on_gpu(c.sequence), on_gpu(c.keys), on_gpu(c.values))

    monkeypatch.setattr(
        decode, "build", lambda shape, positions, **o: move(real(shape, positions, dtype=torch.float32))
    )
    monkeypatch.setattr(Context, "random", staticmethod(there))
    monkeypatch.setattr(decode, "_cuda_works", lambda: True)
    monkeypatch.setattr(decode, "read_bandwidth", lambda device, **o: 1e12)
    for module in (decode, contender):
        monkeypatch.setattr(module, "free_memory", lambda device: 1 << 40)
    values = {"get_device_name": "Pretended", "reset_peak_memory_stats": None, "memory_allocated": 0,
              "max_memory_allocated": 5, "empty_cache": None}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    with torch.no_grad(), pretend_gpu(emulated=False):
        yield


def test_a_run_on_a_pretended_gpu(pretended, tmp_path):
    rows = run(tmp_path, device="cuda", contexts=(24,), batches=(1, 2), only=("dynamic", "kvcache"))
    assert len(rows) == 2 * 4
    assert [r.extra.get("left_out") for r in rows] == [None] * 8
    for row in rows:
        assert row.device == "cuda"
        assert row.extra["gpu"] == "Pretended"
        assert row.extra["clock"] == "wall"
        assert row.extra["limit_ms"] < 0.01
        assert row.extra["first_token_s"] > 0
        assert row.extra["prefill_peak_nbytes"] == 5
    assert {r.read for r in rows if r.policy.startswith("h2o")} == {4}


@pytest.mark.parametrize("policy", FILLED)
def test_a_cache_filled_on_a_gpu_goes_on_as_on_the_cpu(policy):
    found = []
    context = Context.random(tiny(), 2, 40, seed=1)
    for pretend in (False, True):
        model, place = tiny(), on_gpu if pretend else lambda x: x
        with torch.no_grad(), pretend_gpu(emulated=False) if pretend else contextlib.nullcontext():
            wrapped = kvcache.wrap(move(model) if pretend else model)
            torch.manual_seed(3)
            there = Context(wrapped, 2, 40, place(context.sequence), place(context.keys), place(context.values))
            cache = filled(wrapped, policy, there)
            mask = torch.ones_like(there.sequence)
            options = {"max_new_tokens": 6, "do_sample": False}
            out = wrapped.generate(there.sequence, attention_mask=mask, **{CACHE: cache}, **options)
            found.append((out.inner if pretend else out, [cache.kept(i).tolist() for i in range(2)]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
