"""Bad arguments: the same exception with the same words from both backends, and nothing written."""

import copy

import pytest
import torch
from paged_case import make_paged

from kvcache import ops


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def good_calls():
    """name -> dict of arguments of a call that is fine; R=2, H=2, Hq=4, T=3, C=16, Dk=8, Dv=6, P=19, N=1."""
    case = make_paged(rows=2, heads=2, page_size=4, k_dim=8, v_dim=6, max_count=12, room=4, same_counts=True, seed=4)
    assert case.counts.min() > 2
    storage = dict(zip(("k_pages", "v_pages", "table", "counts", "positions", "columns"), case.args))
    read = {name: storage[name] for name in ("k_pages", "v_pages", "table", "counts", "positions")}
    keys = {name: storage[name] for name in ("k_pages", "table", "counts", "positions")}
    capacity = case.positions.shape[2]
    latent = make_paged(rows=2, heads=1, page_size=4, k_dim=8, v_dim=6, max_count=12, room=4, seed=4)
    latent = dict(zip(("k_pages", "v_pages", "table", "counts", "positions"), latent.args))
    keep = ints([0, 2, -1]).expand(2, 2, 3).contiguous()
    two = ints([[2, 2], [2, 2]])
    q, q_positions = torch.randn(2, 4, 3, 8), ints([[1, 2, 3], [4, 5, 6]])
    extras = {"sinks": torch.zeros(4), "bias": torch.zeros(2, 4, capacity)}
    listed = {"index": keep, "index_counts": two}
    bounds = {"first": ints([0, 1]), "end": ints([20, 30])}
    mask = torch.ones(2, 2, 3, capacity, dtype=torch.bool)
    second = make_paged(rows=2, heads=1, page_size=4, k_dim=8, v_dim=6, max_count=6, same_counts=True, seed=5)
    layers = {name: [storage[name], getattr(second, name)] for name in ("table", "counts", "positions", "columns")}
    ranked = {"scores": torch.randn(2, 2, capacity), "counts": storage["counts"], "positions": storage["positions"]}
    return {
        "append": storage
        | {"k": torch.randn(2, 2, 3, 8), "v": torch.randn(2, 2, 3, 6), "new_positions": q_positions}
        | {"new_columns": torch.zeros(1, 2, 2, 3), "bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "copy_pages": {"k_pages": storage["k_pages"], "v_pages": storage["v_pages"]}
        | {"source": ints([0, 1]), "target": ints([2, 3]), "bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "compact": {("source_table" if name == "table" else name): x for name, x in storage.items()}
        | {"target_table": storage["table"].clone(), "keep": keep, "keep_counts": two}
        | {"bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "overwrite": storage | {"victims": ints([[0, -1], [1, 2]]), "bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "prefill_attention": {"q": q}
        | read
        | {"q_positions": q_positions, "window_start": q_positions - 3}
        | extras
        | {"mask": mask}
        | listed
        | {"scale": 0.5, "softcap": 10.0},
        "decode_attention": {"q": q[:, :, 0]}
        | read
        | {"window_start": ints([0, 1])}
        | extras
        | listed
        | {"statistics": torch.zeros(2, 2, capacity), "scale": 0.5, "softcap": 10.0},
        "latent_attention": {"q_latent": torch.randn(2, 4, 1, 8), "q_rope": torch.randn(2, 4, 1, 6)}
        | latent
        | {"q_positions": ints([[3], [6]]), "window_start": ints([[0], [1]])}
        | {"statistics": torch.zeros(latent["positions"].shape), "scale": 0.5, "softcap": 10.0},
        "column_sums": {"q": q}
        | keys
        | {"q_positions": q_positions, "lse": torch.zeros(2, 4, 3), "window_start": q_positions - 3}
        | {"bias": extras["bias"], "mask": mask, "scale": 0.5, "softcap": 10.0, "last": 2},
        "selection_scores": {"q": q[:, :, 0]}
        | keys
        | bounds
        | {"scale": 0.5, "pages": ints([[[0, -1]], [[0, -1]]]), "page_counts": ints([[1], [1]])},
        "page_scores": {"q": q[:, :, 0], "bounds": torch.zeros(len(case.k_pages), 2, 8)}
        | {name: x for name, x in keys.items() if name != "k_pages"}
        | bounds
        | {"scale": 0.5},
        "query_similarity": {"a": q[:, :, 0], "b": q[:, :, 1]},
        "select_tokens": {"q": q[:, :, 0]}
        | keys
        | {"q_positions": ints([20, 30]), "cos": torch.ones(2, 3), "sin": torch.zeros(2, 3)}
        | {"bounds": torch.zeros(len(case.k_pages), 2, 8), "query": torch.randn(2, 4, 8)}
        | {"index": ints([[[0, 1, 2, 0, 0]], [[0, 1, 0, 0, 0]]]), "index_counts": ints([[3], [2]])}
        | {"until": ints([3, 2]), "at": ints([2, 0]), "events": ints([0, 0])}
        | {"sinks": 1, "k": 1, "local": 2, "reuse": 0.5, "shortlist": 4},
        "topk": ranked | {"k": two} | bounds | {"width": capacity},
        "choose_victims": ranked | {"budgets": two} | bounds,
        "evict": {"k_pages": storage["k_pages"], "v_pages": storage["v_pages"]}
        | layers
        | {"scores": [x[0].nan_to_num() for x in layers["columns"]], "budgets": [two, ints([[1], [1]])]}
        | {name: [x, x] for name, x in bounds.items()}
        | {"bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "page_bounds": {name: storage[name] for name in ("k_pages", "table", "counts")}
        | {"bounds": torch.zeros(len(case.k_pages), 2, 8)},
        "active_rows": {"mask": torch.tensor([True, False])},
        "gather_rows": {"x": torch.randn(3, 4), "index": ints([2, -1])},
        "scatter_rows": {"x": torch.randn(3, 4), "rows": torch.randn(2, 4), "index": ints([2, -1])},
    }


def change_for(name, op):
    """Generic damage: (label, exception, function of the good value)."""
    storage_dtype = name in ("k_pages", "v_pages", "k", "v", "q", "q_latent", "q_rope", "query")
    yield (
        "float64" if storage_dtype else "dtype",
        TypeError,
        lambda x: x.double() if x.dtype != torch.int32 else x.long(),
    )
    yield "rank", ValueError, lambda x: x[..., None]
    yield "more in dimension 0", ValueError, lambda x: torch.cat([x, x[:1]])
    if (op not in ("topk", "choose_victims") and (op, name) != ("evict", "budgets")) or name in ("first", "end"):
        yield "stride", ValueError, lambda x: torch.stack([x, x], -1)[..., 0]


def bad_lists(op, name, value, free, defining):
    """The same to the last tensor of a list, and to the list."""
    for label, error, damage in change_for(name, op):
        if not (label.startswith("more") and (name in defining or (op, name) in free)):
            yield f"{op}-{name}-{label}", op, {name: [*value[:-1], damage(value[-1])]}, error
    yield f"{op}-{name}-one short", op, {name: value[:-1]}, ValueError
    yield f"{op}-{name}-not a list", op, {name: 3}, TypeError


def bad_calls():
    # These define R, P or H, so that the damage shows at others, or their first dimension is nobody's business.
    defining = ("k_pages", "v_pages", "bounds", "table", "source_table", "scores", "source")
    free = {("compact", "columns"), ("overwrite", "columns"), ("choose_victims", "positions"), ("active_rows", "mask")}
    free |= {("gather_rows", "x"), ("gather_rows", "index"), ("scatter_rows", "x")}
    for op, good in good_calls().items():
        for name, value in good.items():
            if isinstance(value, list):
                yield from bad_lists(op, name, value, free, defining)
            if not isinstance(value, torch.Tensor):
                continue
            for label, error, damage in change_for(name, op):
                if label.startswith("more") and (name in defining or (op, name) in free):
                    continue
                yield f"{op}-{name}-{label}", op, {name: damage(value)}, error
            yield f"{op}-{name}-not a tensor", op, {name: 3}, TypeError

    def values(op, error=ValueError, /, **changes):
        return f"{op}-{'-'.join(changes)}-{error.__name__}", op, changes, error

    good = good_calls()
    table, counts = good["append"]["table"], good["append"]["counts"]
    capacity = good["topk"]["width"]
    n = int(counts[0, 0])
    hole = table.clone()
    hole[1, 1, 0] = -1
    far = table.clone()
    far[0, 1, 0] = 10**6
    ends = torch.where(table >= 0, table, 0)
    ends[1, 0, int(counts[1, 0]) // 4] = -1
    many = counts.clone()
    many[1, 1] = capacity + 1
    for op in (
        "append",
        "overwrite",
        "prefill_attention",
        "decode_attention",
        "column_sums",
        "selection_scores",
        "page_scores",
    ):
        yield values(op, counts=many)
        yield values(op, counts=-counts)
    for op in ("prefill_attention", "decode_attention", "column_sums", "selection_scores", "page_scores"):
        yield values(op, table=hole)
        yield values(op, table=far)
        yield values(op, q=good[op]["q"][:, :3].contiguous())
    latent = good["latent_attention"]
    yield values("latent_attention", counts=latent["counts"] + 100)
    yield values("latent_attention", counts=latent["counts"] - 100)
    yield values("latent_attention", table=torch.full_like(latent["table"], -1))
    yield values("latent_attention", table=table, counts=counts, positions=good["append"]["positions"])
    yield values("latent_attention", k_pages=torch.zeros(len(latent["k_pages"]), 4, 513))
    yield values("latent_attention", v_pages=torch.zeros(len(latent["k_pages"]), 4, 129))
    yield values("latent_attention", TypeError, q_rope=latent["q_rope"].half())
    yield values("latent_attention", q_rope=latent["q_rope"][:, :3].contiguous())
    yield values("latent_attention", softcap=-1.0)
    two_tokens = {name: latent[name].expand(2, 4, 2, -1).contiguous() for name in ("q_latent", "q_rope")}
    yield values("latent_attention", **two_tokens, q_positions=None, window_start=None)
    for op in ("topk", "choose_victims", "page_bounds"):
        yield values(op, counts=many)
    yield values("append", table=ends)
    yield values("append", counts=torch.full_like(counts, capacity - 2))
    yield values("append", TypeError, v_pages=good["append"]["v_pages"].half())
    yield values("append", k_pages=torch.zeros(5, 4, 300), v_pages=torch.zeros(5, 4, 6))
    yield values("append", k_pages=torch.zeros(5, 0, 8), v_pages=torch.zeros(5, 0, 6))
    yield values("copy_pages", source=ints([0, -1]))
    yield values("copy_pages", target=ints([2, 10**6]))
    yield values("copy_pages", target=ints([2, 2]))
    yield values("copy_pages", target=ints([2, 1]))
    keep = good["compact"]["keep"]
    yield values("compact", keep=ints([2, 0, 1]).expand(2, 2, 3).contiguous())
    yield values("compact", keep=ints([1, 1, 1]).expand(2, 2, 3).contiguous())
    yield values("compact", keep=keep + n)
    yield values("compact", keep_counts=ints([[2, 2], [2, 4]]))
    yield values("compact", keep_counts=ints([[2, 2], [-1, 2]]))
    yield values("compact", source_table=hole)
    yield values("compact", target_table=hole)
    yield values("compact", target_table=torch.empty(2, 2, 0, dtype=torch.int32))
    yield values("overwrite", victims=ints([[n, 0], [0, 0]]))
    yield values("overwrite", table=hole)
    for op in ("prefill_attention", "decode_attention"):
        yield values(op, index=None)
        yield values(op, index_counts=None)
        yield values(op, index=keep + n)
        yield values(op, index=ints([2, 2, 0]).expand(2, 2, 3).contiguous())
        yield values(op, index_counts=ints([[2, 2], [4, 2]]))
        yield values(op, index_counts=ints([[2, -2], [2, 2]]))
        yield values(op, index=keep[:, :1].expand(2, 3, 3).contiguous(), index_counts=ints([[2] * 3] * 2))
    for op in ("prefill_attention", "decode_attention", "column_sums"):
        yield values(op, bias=torch.zeros(2, 3, capacity))
        yield values(op, softcap=-1.0)
        yield values(op, softcap=float("nan"))
    for op in ("prefill_attention", "column_sums"):
        yield values(op, mask=torch.ones(2, 3, 3, capacity, dtype=torch.bool))
    yield values("column_sums", last=-1)
    for op in ("selection_scores", "page_scores"):
        yield values(op, counts=counts - ints([[0, 1], [0, 0]]))
    yield values("selection_scores", pages=None)
    yield values("selection_scores", page_counts=ints([[1], [3]]))
    yield values("selection_scores", pages=ints([[[0, -1]], [[9, -1]]]))
    yield values("selection_scores", pages=ints([[[1, 0]], [[0, -1]]]), page_counts=ints([[2], [1]]))
    for change in ({"counts": many}, {"counts": -counts}, {"counts": counts - ints([[0, 1], [0, 0]])}):
        yield values("select_tokens", **change)
    yield values("select_tokens", table=hole)
    yield values("select_tokens", q=good["select_tokens"]["q"][:, :3].contiguous())
    yield values("select_tokens", TypeError, query=good["select_tokens"]["query"].half())
    yield values("select_tokens", cos=None)
    yield values("select_tokens", cos=torch.ones(2, 5), sin=torch.zeros(2, 5))
    yield values("select_tokens", shortlist=0)
    yield values("select_tokens", sinks=-1)
    yield values("select_tokens", k=0)
    yield values("select_tokens", local=0)
    yield values("select_tokens", k=4, index=good["select_tokens"]["index"])
    yield values("select_tokens", index_counts=ints([[3], [6]]))
    yield values("select_tokens", index_counts=ints([[3], [-1]]))
    yield values("select_tokens", until=ints([2, 2]))
    yield values("page_scores", positions=good["page_scores"]["positions"][..., :-1].contiguous())
    yield values("page_scores", bounds=torch.zeros(5, 2, 300))
    listed = {"pages": ints([[[0, 2], [1, -1]]] * 2), "page_counts": ints([[2, 1]] * 2), "page_size": capacity // 2}
    yield values("topk", pages=listed["pages"])
    yield values("topk", page_counts=listed["page_counts"])
    yield values("topk", **listed | {"page_size": 0})
    yield values("topk", **listed | {"page_size": 3})
    yield values("topk", **listed)  # there is no page 2
    yield values("topk", **listed | {"pages": ints([[[1, 0], [1, -1]]] * 2)})
    yield values("topk", **listed | {"page_counts": ints([[2, 3]] * 2)})
    evicted = good["evict"]
    rest = {name: evicted[name][1] for name in ("table", "counts")}
    yield values("evict", table=[evicted["table"][0], torch.full_like(rest["table"], -1)])
    yield values("evict", table=[far, rest["table"]], budgets=[ints([[0, 0], [0, 0]]), ints([[0], [0]])])
    yield values("evict", counts=[many, rest["counts"]])
    yield values("evict", counts=[evicted["counts"][0], -rest["counts"]])
    for op in ("append", "copy_pages", "compact", "overwrite", "evict", "page_bounds"):
        yield values(op, bounds=torch.zeros(5, 2, 8))
        yield values(op, TypeError, bounds=good["append"]["bounds"].half())
    yield values("page_bounds", table=hole)
    for op in ("gather_rows", "scatter_rows"):
        yield values(op, index=ints([3, 0]))
        yield values(op, index=ints([0, -2]))
    yield values("scatter_rows", TypeError, rows=torch.zeros(2, 4).half())
    yield values("topk", width=-1)
    yield values("topk", width=1)


BAD = list(bad_calls())


@pytest.mark.parametrize("op", sorted(good_calls()))
def test_the_good_calls_are_good(backend, op):
    getattr(ops, op)(**good_calls()[op])


@pytest.mark.parametrize(("op", "changes", "error"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_call(op, changes, error):
    messages = []
    for backend in ("reference", "native"):
        args = copy.deepcopy(good_calls()[op]) | copy.deepcopy(changes)
        before = copy.deepcopy(args)
        with ops.use_backend(backend), pytest.raises(error) as raised:
            getattr(ops, op)(**args)
        messages.append(str(raised.value))
        for name, value in args.items():
            for mine, old in zip(value, before[name]) if isinstance(value, list) else [(value, before[name])]:
                if isinstance(mine, torch.Tensor):
                    assert torch.equal(mine.nan_to_num(), old.nan_to_num()), f"{name} was written to"
    if 3 not in [x for x in changes.values() if isinstance(x, int)]:
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"{op}: ")
        assert any(name in messages[0] for name in args)  # it says which argument is wrong


def test_backend_switch():
    assert ops.backend() == "native"
    with ops.use_backend("reference"):
        assert ops.backend() == "reference"
        with pytest.raises(ValueError, match="unknown backend 'gpu', must be one of native, reference"):
            ops.set_backend("gpu")
        assert ops.backend() == "reference"
    assert ops.backend() == "native"
