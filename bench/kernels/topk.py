"""The k best entries of each head, protected ranges included, as ascending slots: against torch.topk and FlashInfer's.

    python bench/kernels/topk.py [options: bench/kernels/common.py]

Peers return values and places, in no useful order, of every entry; ours leaves protected ranges to itself, sorts the
slots and breaks ties by position. "equal" scores are the worst case of a radix search. Bytes: scores and positions.
"""

import torch
from common import NOT_INSTALLED, main
from devices import Bench
from peers import module

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """rows, lists per row, entries, k, all scores equal"""
    if bench.kind == "emulated":
        return [(2, 1, 700, 64, False), (1, 2, 300, 50, True)]
    if bench.kind == "cpu":
        some = [(1, 1, 8192, 1024, False), (1, 1, 32768, 2048, False), (1, 8, 32768, 2048, False)]
    else:
        some = [(1, 1, 131072, 2048, False), (1, 8, 131072, 2048, False), (1, 1, 32768, 2048, False),
                (32, 8, 8192, 1024, False), (1, 1, 131072, 2048, True), (1, 1, 1 << 20, 2048, False)]  # fmt: skip
    if bench.options.full:
        some += [(b, h, n, k, False) for b in (1, 4, 32) for h in (1, 8) for n in (4096, 65536) for k in (512, 2048)]
    return some[:2] if bench.options.quick else some


def measure(bench, rows, lists, entries, k, equal):
    nbytes = rows * lists * entries * 8
    copies = bench.copies(nbytes)
    positions = [torch.arange(entries, device=bench.device).int().repeat(rows, lists, 1) for _ in range(copies)]
    scores = [torch.zeros(rows, lists, entries, device=bench.device) for _ in range(copies)]
    for x in () if equal else scores:
        x.normal_()
    counts, best = (bench.ints([[n] * lists] * rows) for n in (entries, k))
    first, end = bench.ints([0] * rows), bench.ints([entries] * rows)

    def ours(c):
        return ops.topk(scores[c], counts, positions[c], best, first, end, k)[0]

    flashinfer = module("flashinfer")
    find = getattr(flashinfer, "top_k", None)
    peers = {
        "torch|": lambda c: scores[c].topk(k, sorted=False)[1],
        "FlashInfer|": NOT_INSTALLED if flashinfer is None else "has no top_k" if find is None else
        (lambda c: find(scores[c].view(rows * lists, entries), k)) if bench.kind == "cuda" else "needs a GPU",
    }  # fmt: skip
    mine, theirs = (scores[0].gather(2, x.long()).sort(-1)[0] for x in (ours(0), peers["torch|"](0)))
    assert torch.equal(mine, theirs)
    times = bench.compare({"ours": ours, **peers}, copies, pools=lambda c: (scores[c], positions[c]))
    cells = {"rows": rows, "lists": lists, "entries": entries, "k": k, "scores": "equal" if equal else "random"}
    return [
        bench.row(cells, times, nbytes=nbytes, peers=("torch", "FlashInfer") if bench.kind != "cpu" else ("torch",))
    ]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
