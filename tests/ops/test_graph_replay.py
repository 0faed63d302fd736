"""CUDA graphs: captured once, replayed with other lengths, pages and values. Needs a GPU."""

import pytest
import torch
from paged_case import make_paged

import kvcache
from kvcache import ops
from kvcache.ops import reference
from kvcache.ops.two_stage import two_stage_selection

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and kvcache._C.cuda_info()["compiled"]),
        reason="no GPU, or kvcache built without nvcc",
    ),
]
ROWS, HEADS, TOKENS, WIDTH = 3, 2, 40, 60


def storage_step(x):
    """What a step does to the storage: new tokens, a choice, a victim, a compaction, a page copied; all in place."""
    ops.append(*x["args"], x["k"], x["v"], x["new_positions"], None, x["bounds"])
    ops.append(
        *x["args"], x["k"][:, :, :1], x["v"][:, :, :1], x["new_positions"][:, :1].contiguous(), None, x["bounds"]
    )
    k_pages, v_pages, table, counts, positions, columns = x["args"]
    scores = columns[0]
    victims = ops.choose_victims(scores, counts, positions, x["budgets"], x["first"], x["end"])
    ops.overwrite(*x["args"], victims, x["bounds"])
    lists = ([y] for y in (table, counts, positions, columns, scores, x["budgets"], x["first"], x["end"]))
    ops.evict(k_pages, v_pages, *lists, x["bounds"])
    index, index_counts = ops.topk(scores, counts, positions, x["budgets"], x["first"], x["end"], WIDTH)
    ops.compact(k_pages, v_pages, table, table, counts, positions, columns, index, index_counts, x["bounds"])
    ops.page_bounds(k_pages, table, counts, x["bounds"])
    ops.copy_pages(k_pages, v_pages, x["source"], x["target"], x["bounds"])
    listed, count = ops.active_rows(x["mask"])
    picked = ops.gather_rows(x["matrix"], listed)
    ops.scatter_rows(x["matrix"], picked * 2, listed)
    return victims, index, index_counts, listed, count


def inputs(seed, device):
    g = torch.Generator().manual_seed(seed)
    case = make_paged(
        rows=ROWS, heads=HEADS, page_size=4, k_dim=16, v_dim=8, dtype=torch.bfloat16, max_count=15, room=TOKENS + 1,
        seed=seed,
    )  # fmt: skip
    # One width and one pool for all seeds.
    pages, columns = ROWS * HEADS * 14 + 3, 14
    case.table = torch.nn.functional.pad(case.table, (0, columns - case.table.shape[2]), value=-1)
    more = columns * 4 - case.positions.shape[2]
    case.positions = torch.nn.functional.pad(case.positions, (0, more))
    case.columns = torch.nn.functional.pad(case.columns, (0, more)).nan_to_num(0.0)
    for name in ("k_pages", "v_pages"):
        x = getattr(case, name)
        setattr(case, name, torch.cat([x, torch.full((pages - len(x), *x.shape[1:]), float("nan"), dtype=x.dtype)]))
    new_positions = torch.arange(100, 100 + TOKENS, dtype=torch.int32).repeat(ROWS, 1)
    new_positions[torch.rand(ROWS, TOKENS, generator=g) < 0.4] = -1
    x = {
        "args": case.args,
        "k": torch.randn(ROWS, HEADS, TOKENS, 16, generator=g).bfloat16(),
        "v": torch.randn(ROWS, HEADS, TOKENS, 8, generator=g).bfloat16(),
        "new_positions": new_positions,
        "bounds": torch.zeros(pages, 2, 16, dtype=torch.bfloat16),
        "budgets": torch.randint(0, 30, (ROWS, HEADS), generator=g).int(),
        "first": torch.randint(0, 5, (ROWS,), generator=g).int(),
        "end": torch.full((ROWS,), 120, dtype=torch.int32),
        "source": case.table[0, 0, :1].clone(),
        "target": torch.tensor([pages - 1], dtype=torch.int32),
        "mask": torch.rand(50, generator=g) < 0.5,
        "matrix": torch.randn(50, 24, generator=g),
    }
    return {n: tuple(y.to(device) for y in z) if isinstance(z, tuple) else z.to(device) for n, z in x.items()}


def tensors(x):
    for value in x.values():
        yield from value if isinstance(value, tuple) else (value,)


def test_storage_ops_replay():
    static = inputs(0, "cuda")
    warm = inputs(0, "cuda")
    storage_step(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = storage_step(static)
    for seed in range(25):
        fresh, expected = inputs(seed % 8, "cuda"), inputs(seed % 8, "cpu")
        for mine, new in zip(tensors(static), tensors(fresh)):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        with ops.use_backend("reference"):
            wanted = storage_step(expected)
        for got, want in zip([*out, *tensors(static)], [*wanted, *tensors(expected)]):
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [1500, 9000, 100_000])
def test_topk_replays(n):
    """One capture for heads that hold anything from nothing to all."""
    g = torch.Generator().manual_seed(n)
    scores = torch.zeros(1, 2, n, device="cuda")
    positions = torch.zeros(1, 2, n, dtype=torch.int32, device="cuda")
    counts, k = (torch.zeros(1, 2, dtype=torch.int32, device="cuda") for _ in range(2))
    first, end = (torch.full((1,), value, dtype=torch.int32, device="cuda") for value in (4, n - 64))
    ops.topk(scores, counts, positions, k, first, end, 2048)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.topk(scores, counts, positions, k, first, end, 2048)
    for held in (0, 1, 63, n // 3, n - 1, n):
        scores.copy_(torch.randn(1, 2, n, generator=g) if held % 2 else torch.ones(1, 2, n))
        positions.copy_(torch.stack([torch.randperm(n, generator=g) for _ in range(2)])[None])
        counts.copy_(torch.tensor([[held, min(held, 5000)]]))
        k.copy_(torch.tensor([[1800, 7]]))
        graph.replay()
        torch.cuda.synchronize()
        want = reference.topk(*(x.cpu() for x in (scores, counts, positions, k, first, end)), 2048)
        for a, b in zip(out, want):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("n", [3000, 100_000])
def test_victims_replay(n):
    """Heads that one block reads, and heads cut into pieces: the cut does not depend on what they hold."""
    g = torch.Generator().manual_seed(n)
    scores = torch.zeros(1, 4, n, device="cuda")
    positions = torch.arange(n, dtype=torch.int32, device="cuda").expand(1, 4, n).contiguous()
    counts, budgets = (torch.zeros(1, 4, dtype=torch.int32, device="cuda") for _ in range(2))
    first, end = (torch.full((1,), value, dtype=torch.int32, device="cuda") for value in (4, n - 64))
    args = (scores, counts, positions, budgets, first, end)
    ops.choose_victims(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        victims = ops.choose_victims(*args)
    for held in (n, 0, n // 3, 1, n - 1):
        scores.copy_(torch.randn(1, 4, n, generator=g).round())  # ties everywhere
        counts.copy_(torch.tensor([[held, min(held, 50), n, n]]))
        budgets.copy_(torch.tensor([[10, 10, n - 1, n]]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(victims.cpu(), reference.choose_victims(*(x.cpu() for x in args)))


@pytest.mark.parametrize("n", [64, 20_000])
def test_evictions_of_a_model_replay(n):
    """One capture for whatever is evicted: who is over the budget and what scores say changes from step to step."""
    layers, page_size = 5, 16
    table = torch.arange(layers * 2 * n // page_size, dtype=torch.int32, device="cuda").view(layers, 1, 2, -1)
    g = torch.Generator().manual_seed(n)
    pages = [torch.randn(table.numel(), page_size, 64, generator=g).bfloat16().cuda() for _ in range(2)]
    counts, budgets = (torch.zeros(layers, 1, 2, dtype=torch.int32, device="cuda") for _ in range(2))
    positions = torch.arange(n, dtype=torch.int32, device="cuda").expand(layers, 1, 2, n).contiguous()
    columns = torch.zeros(layers, 1, 1, 2, n, device="cuda")
    first, end = (torch.full((layers, 1), value, dtype=torch.int32, device="cuda") for value in (4, n - 8))

    def lists(*tensors):
        return [list(x.unbind()) for x in tensors]

    mine = (*pages, *lists(table, counts, positions, columns, columns[:, 0], budgets, first, end))
    ops.evict(*mine)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.evict(*mine)
    for held in (n, 0, n // 3, 5, n - 1):
        columns.copy_(torch.randn(columns.shape, generator=g).round())  # ties everywhere
        positions.copy_(torch.stack([torch.randperm(n, generator=g) for _ in range(2 * layers)]).view(positions.shape))
        counts.copy_(torch.randint(0, held + 1, counts.shape, generator=g))
        budgets.copy_(torch.randint(0, held + 1, counts.shape, generator=g))
        written = [x.cpu() for x in (*pages, table, counts, positions, columns)]
        limits = lists(*(x.cpu() for x in (budgets, first, end)))
        reference.evict(*written[:2], *lists(*written[2:], written[5][:, 0].clone()), *limits)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip((*pages, table, counts, positions, columns), written):
            assert torch.equal(got.cpu(), want)


def test_two_stage_selection_replays():
    """Bounds, shortlist, exact vote, top k and attention in one graph: nothing of it asks the host."""
    case = make_paged(
        rows=2, heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=0, room=4000, seed=0
    )
    g = torch.Generator().manual_seed(0)
    case.k_pages.copy_(torch.randn(case.k_pages.shape, generator=g))
    case.v_pages.copy_(torch.randn(case.v_pages.shape, generator=g))
    case.positions.copy_(torch.arange(case.positions.shape[2]))
    case.counts.fill_(4000)
    bounds = torch.zeros(len(case.k_pages), 2, 64, dtype=torch.bfloat16)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    x = {name: getattr(case, name).cuda() for name in ("k_pages", "v_pages", "table", "counts", "positions")}
    q, bounds = torch.zeros(2, 8, 64, dtype=torch.bfloat16, device="cuda"), bounds.cuda()
    first, end = (torch.full((2,), value, dtype=torch.int32, device="cuda") for value in (4, 3900))

    def step():
        index, counts = two_stage_selection(
            q, x["k_pages"], bounds, x["table"], x["counts"], x["positions"], first, end, 0.125, 128, 40
        )
        return index, counts, ops.decode_attention(q, *x.values(), None, None, None, index, counts, None, 0.125)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for held in (4000, 700, 3999, 5):
        q.copy_(torch.randn(2, 8, 64, generator=g))
        x["counts"].fill_(held)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [y.clone() for y in out]
        for got, want in zip(replayed, step()):
            assert torch.equal(got, want)
