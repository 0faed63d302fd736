"""The scripts in bench/end_to_end on tiny sizes: what they count, promise and write."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

import kvcache
from kvcache.evaluation.bench.caches import Context, filled
from kvcache.evaluation.bench.shapes import SHAPES, Shape, build, shape_named
from kvcache.evaluation.bench.turns import median_ratio, timed_turns, write

ROOT = Path(__file__).resolve().parents[2]


def script(name):
    return runpy.run_path(str(ROOT / f"bench/end_to_end/{name}.py"))


@pytest.fixture(autouse=True)
def as_before():
    """Scripts pin the process and set threads; the other tests must not notice."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    assert torch.get_num_threads() == 1
    assert affinity is None or os.sched_getaffinity(0) == affinity


def rows_of(path, *names):
    found = json.loads(path.read_text())
    assert {"machine", "command", "settings", "rows"} <= set(found)
    assert all(set(names) <= set(row) for row in found["rows"])
    return found["rows"]


def test_skipdecode_promises_what_the_schedule_runs(tmp_path, monkeypatch):
    bench = script("skipdecode")
    positions = torch.arange(256)[None]
    policy = kvcache.parse_policy("skipdecode(min_layers=11, max_layers=22, horizon=256)")
    active = policy.layers(32, positions.int(), False)
    by_hand = sum(int(active[:, 0, t].sum()) for t in range(256)) / 256
    assert bench["ran"](policy, 32, positions) == (by_hand, by_hand)
    # The row that is least far runs most layers: what one row needs, all run.
    some, each = bench["ran"](policy, 32, torch.stack([positions[0], positions[0] + 128]))
    assert some == by_hand
    assert each < some
    sizes = {**SHAPES["opt-tiny"].sizes, "num_hidden_layers": 32}
    monkeypatch.setitem(SHAPES, "deep", Shape("deep", "OPTForCausalLM", sizes, torch.float32))
    options = ["--model", "deep", "--horizon", "24", "--repeats", "1", "--tokens", "4", "--batch", "1", "2"]
    assert bench["main"]([*options, "--out", str(tmp_path / "x.json")]) == 0
    rows = rows_of(tmp_path / "x.json", "table", "batch", "tokens/s", "x full", "x DynamicCache")
    assert [r["table"] for r in rows] == ["DynamicCache + sdpa", "full", "2x", "4x"] * 2
    by = {(r["table"], r["batch"]): r for r in rows}
    assert by["full", 1]["x full"] == 1
    assert 1.8 < by["2x", 1]["promise"] < 2.2
    assert 3.4 < by["4x", 1]["promise"] < 4.1
    assert by["4x", 1]["x full"] > 1.5  # 32 layers against 8
    assert by["2x", 2]["promise"] == by["2x", 1]["promise"]  # the shortest row's
    assert by["2x", 2]["by rows"] > by["2x", 2]["promise"]


def test_overhead_counts_calls_and_bytes(tmp_path):
    bench = script("overhead")
    assert bench["main"](["--layers", "2", "--rounds", "1", "--out", str(tmp_path / "x.json")]) == 0
    rows = rows_of(tmp_path / "x.json", "policy", "step ms", "all calls")
    assert len(rows) == 2 + len(bench["policies"](2))
    assert "our calls" not in rows[0]
    assert "our calls" not in rows[1]
    assert rows[0]["all calls"] < rows[1]["all calls"]
    for row in rows[2:]:
        assert row["above nothing ms"] < row["step ms"]
        assert 1 <= row["our calls"] <= row["all calls"]
        assert row["bytes"] > 0


def test_overhead_sees_an_allocation_that_grows():
    bench = script("overhead")
    for n in (1000, 4000):
        found, host = bench["allocated"](lambda n=n: (torch.empty(n), bytearray(50 * n)))
        assert found == 4 * n
        assert 50 * n <= host < 50 * n + 2000
    calls, every = bench["calls"](lambda: torch.zeros(3).add(1), 1)
    assert (calls, every) == (0, 2)


def test_overhead_contexts_stay_within_a_page():
    bench = script("overhead")
    for n in (bench["SMALL"], bench["LARGE"]):
        assert n // 16 == (n + 5) // 16
    model = kvcache.wrap(bench["small"](1))
    cache = filled(model, "full", Context.random(model, 1, bench["SMALL"]))
    assert cache.seen_tokens == bench["SMALL"]


def test_tokenselect_benches(tmp_path):
    bench = script("tokenselect")
    options = ["--model", "llama-tiny", "--context", "700", "--rounds", "1", "--tokens", "2", "--k", "8"]
    assert bench["main"](["decode", *options, "--out", str(tmp_path / "x.json")]) == 0
    rows = rows_of(tmp_path / "x.json", "cache", "context", "ms/token", "x full", "x DynamicCache", "read", "limit ms")
    assert len(rows) == 6
    assert rows[5]["selected"] < 0.5  # only the first steps
    assert rows[4]["cache"] == "tokenselect(k=8, shortlist=256)"
    assert rows[1]["cache"] == "full"
    assert rows[1]["x full"] == 1
    assert rows[3]["selected"] == 1
    assert rows[3]["read"] == 128 + 8 + 512
    assert rows[1]["limit ms"] > rows[3]["limit ms"]
    assert bench["main"](["prefill", "--length", "700", "1400", "--full", "700", "--k", "16",
                          "--out", str(tmp_path / "y.json")]) == 0  # fmt: skip
    rows = rows_of(tmp_path / "y.json", "cache", "length", "s", "us/token")
    assert [(r["cache"], r["length"]) for r in rows] == [
        ("tokenselect(k=16)", 700), ("tokenselect(k=16)", 1400), ("full", 700), ("DynamicCache + sdpa", 700),
    ]  # fmt: skip
    assert rows[1]["x longer"] == 2
    assert rows[1]["x before"] == pytest.approx(rows[1]["s"] / rows[0]["s"], rel=1e-4)
    assert "x before" not in rows[0] or rows[0]["x before"] is None


def test_h2o_batch_fits_the_memory_that_it_is_given(tmp_path):
    bench = script("h2o")
    assert bench["main"](["--model", "opt-tiny", "--prompt", "160", "--new", "24", "--full-rows", "2", "--rounds", "1",
                          "--tokens", "2", "--out", str(tmp_path / "x.json")]) == 0  # fmt: skip
    rows = rows_of(tmp_path / "x.json", "cache", "batch", "largest batch", "x batch", "decode tokens/s", "x full")
    by = {(r["cache"], r["batch"]): r for r in rows}
    assert by["full", 2]["largest batch"] == by["DynamicCache + sdpa", 2]["largest batch"] == 2
    h2o = next(r for r in rows if r["batch"] > 2)
    assert h2o["cache"].startswith("h2o")
    # 32 entries stay of 160 + 24, and one prompt must fit beside the others.
    assert h2o["largest batch"] == h2o["batch"] >= 5
    token = 2 * 2 * 4 * 16 * 4
    room = 2 * 192 * token / 2**20
    assert all(r["pool MiB"] <= room for r in rows if "pool MiB" in r)
    assert h2o["pool MiB"] > 0.7 * room  # others keep a page free for the token that they add before they evict


def test_threads(tmp_path):
    bench = script("threads")
    assert bench["main"](["--model", "llama-tiny", "--context", "64", "--batch", "2", "--rounds", "1", "--tokens", "2",
                          "--policy", "full", "--out", str(tmp_path / "x.json")]) == 0  # fmt: skip
    rows = rows_of(tmp_path / "x.json", "contender", "1 thread, ms", "2 threads, ms", "x", "memory x")
    assert [r["contender"] for r in rows] == ["DynamicCache + sdpa", "full"]
    assert all(r["x"] == pytest.approx(r["1 thread, ms"] / r["2 threads, ms"], rel=1e-4) for r in rows)


def test_turns_rotate_and_forget_the_first_round():
    order = []
    steps = [lambda i=i: order.append(i) for i in range(3)]
    spent = timed_turns(steps, 2, before=[lambda: order.append("b")] * 3)
    assert [x for x in order if x != "b"] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert order[::2] == ["b"] * 9
    assert [len(x) for x in spent] == [2, 2, 2]
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2


def test_rows_are_written_without_paths(tmp_path):
    write(
        tmp_path / "new" / "x.json", {"out": tmp_path, "rounds": 3, "none": None}, [{"a": 1 / 3, "b": None, "c": "x"}]
    )
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    assert found["settings"] == {"rounds": 3}
    assert found["rows"] == [{"a": 0.333333, "b": None, "c": "x"}]
    write(None, {}, [])


def test_contexts_are_the_same_for_the_same_seed():
    model = build(shape_named("llama-tiny"), 64)
    a, b = (Context.random(model, 2, 8, seed=4) for _ in range(2))
    assert torch.equal(a.sequence, b.sequence)
    assert torch.equal(a.keys, b.keys)
    assert a.prompt.shape == (2, 8)
