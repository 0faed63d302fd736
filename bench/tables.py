"""Fills the tables of README.md and docs/ from the committed JSON in bench/results/, and the catalogue of policies from
their classes.

    python bench/tables.py [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; NAME is a key of TABLES, or ``cpu_KERNEL`` or
``GPU/KERNEL`` for that JSON in ``bench/results/``. ``--check`` changes nothing and exits with 1 where a table does not
agree.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcache import policies
from kvcache.evaluation.contenders import BASELINES, DEMO, label
from kvcache.policies.card import defaults, needs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/results.md", "docs/kernels.md", "docs/policies.md")
MISSING = "*Not measured yet.*"

Rows = list[dict[str, Any]]


def markdown(head: list[str], body: list[list[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text and the others numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def machine(row: dict[str, Any]) -> str:
    """The line below a table: where its numbers come from."""
    threads = row.get("threads", 1)
    parts = [
        str(row.get("gpu") or row.get("cpu", "")),
        "" if "gpu" in row else f"{threads} thread{'s' if threads != 1 else ''}",
        f"{row['isa']} kernels" if "isa" in row else "",
        f"torch {row['torch']}" if "torch" in row else "",
        f"transformers {row['transformers']}" if "transformers" in row else "",
        f"{row['read_gb_per_s']:.1f} GB/s read" if "read_gb_per_s" in row else "",
    ]
    return "*" + ", ".join(p for p in parts if p) + ".*"


def size(n: float) -> str:
    if n >= 2**30:
        return f"{n / 2**30:.2f} GiB"
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.0f} KiB"


def demo(rows: Rows) -> str:
    """One line a policy, as the demo prints it."""
    base = next(r for r in rows if r["policy"] == "DynamicCache")
    body = [
        [
            "`DynamicCache`, unwrapped",
            "",
            "",
            "",
            size(base["nbytes"]),
            "100%",
            "",
            f"{base['ms_per_token']:.2f}",
            "1.00",
        ]
    ]
    for name in dict.fromkeys(r["name"] for r in rows if r["name"] in (*DEMO, *BASELINES)):
        by = {r["task"]: r for r in rows if r["name"] == name}
        p = by["passkey"]
        body.append(
            [
                label(name),
                f"{p['accuracy']:.0%}",
                f"{by['recall']['accuracy']:.0%}",
                f"{by['text']['bits_per_byte']:.3f}",
                size(p["nbytes"]),
                f"{p['nbytes'] / p['full_nbytes']:.0%}",
                f"{p['read']:.0f}",
                f"{p['ms_per_token']:.2f}",
                f"{p['ratio']:.2f}",
            ]
        )
    head = ["Policy", "Passkey right", "Recall right", "Text, bits/byte", "Cache held", "of full", "Read per step",
            "Decode, ms/token", "Ratio to DynamicCache"]  # fmt: skip
    p = next(r for r in rows if r["task"] == "passkey")
    note = f"{p['samples']} questions per task, context {p['length']:,} tokens. {machine(rows[0])}"
    return f"{markdown(head, body)}\n\n{note}"


def generate(rows: Rows) -> str:
    """Decode time of the first model behind its longest contexts, in short: what README.md shows."""
    timed = [r for r in rows if "ms_per_token" in r and r.get("batch", 1) == rows[0].get("batch", 1)]
    timed = [r for r in timed if r.get("model") == timed[0].get("model")]
    shown = sorted({r["length"] for r in timed})[-2:]
    body = []
    for r in timed:
        if r["length"] not in shown:
            continue
        theirs, ratio = r["backend"] in ("transformers", "kvpress"), f"{r['ratio']:.2f}"
        body.append(
            [
                f"`{r['policy']}`",
                f"{r['length']:,}",
                size(r["nbytes"]),
                f"{r['ms_per_token']:.1f}",
                ratio if theirs else f"**{ratio}**",
                f"{r['limit_ms']:.1f}",
                f"{r['of_limit']:.0%}",
            ]
        )
    head = ["Cache", "Context", "Held", "ms/token", "Ratio to DynamicCache", "Limit, ms", "of limit"]
    return f"{markdown(head, body)}\n\n{machine(timed[0])}"


def decode(rows: Rows) -> str:
    """Decode time behind a context, against the baselines and the limit; one table for each model and batch."""
    parts = []
    for model, batch in dict.fromkeys((r.get("model", "llama-27m"), r.get("batch", 1)) for r in rows):
        mine = [r for r in rows if (r.get("model", "llama-27m"), r.get("batch", 1)) == (model, batch)]
        head = ["Cache", "Context", "Held", "Peak", "First token, s", "ms/token", "Tokens/s", "Ratio to DynamicCache",
                "Limit, ms", "of limit"]  # fmt: skip
        dtype = next((r["dtype"] for r in mine if "dtype" in r), "float32")
        body = [_decode_line(r) for r in mine]
        parts.append(f"`{model}`, {dtype}, batch {batch}:\n\n{markdown(head, body)}")
    timed = next((r for r in rows if "ms_per_token" in r), {})
    return "\n\n".join([*parts, machine(timed)])


def _decode_line(r: dict[str, Any]) -> list[str]:
    start = [f"`{r['policy']}`", f"{r['length']:,}"]
    if "ms_per_token" not in r:
        return [start[0] + f", left out: {r['left_out']}".replace("|", "\\|"), start[1], *[""] * 8]
    batch, theirs = r.get("batch", 1), r["backend"] in ("transformers", "kvpress")
    ratio = "" if "ratio" not in r else f"{r['ratio']:.2f}"
    return [
        *start,
        size(r["nbytes"] * batch),
        size(r["peak_nbytes"]) if r.get("peak_nbytes") is not None else "",
        f"{r['first_token_s']:.2f}" if "first_token_s" in r else "",
        f"{r['ms_per_token']:.1f}",
        f"{batch * 1e3 / r['ms_per_token']:.1f}",
        ratio if theirs else f"**{ratio}**",
        f"{r['limit_ms']:.1f}",
        f"{r['of_limit']:.0%}",
    ]


def script(found: dict[str, Any]) -> str:
    """A bench of bench/end_to_end: its command, and its rows as they are; what a row does not have stays empty."""
    rows = found["rows"]
    head = list(dict.fromkeys(name for r in rows for name, value in r.items() if value is not None))
    body = [[f"`{r[name]}`" if i == 0 else _number(r.get(name)) for i, name in enumerate(head)] for r in rows]
    return f"`{found['command']}`\n\n{markdown(head, body)}\n\n{machine(found['machine'])}"


def budgets(task: str) -> Callable[[Rows], str]:
    """Policies down, budgets across."""

    def render(rows: Rows) -> str:
        mine = [r for r in rows if r["task"] == task]
        shares = sorted({r["budget"] for r in mine if r["budget"] != 1.0}, reverse=True)
        body = []
        for name in dict.fromkeys(r["name"] for r in mine):
            cells = {r["budget"]: cell(r) for r in mine if r["name"] == name}
            values = [cells[1.0], *[""] * (len(shares) - 1)] if 1.0 in cells else [cells.get(s, "") for s in shares]
            body.append(
                [
                    (label(name) if label(name) != name else f"`{name}`") + (" (no budget)" if 1.0 in cells else ""),
                    *values,
                ]
            )
        head = ["Policy", *(f"1/{round(1 / s)}" for s in shares)]
        first = mine[0]
        unit = "windows" if task == "text" else "questions"
        note = f"{first['samples']} {unit}, context {first['length']:,} tokens. {machine(first)}"
        return f"{markdown(head, body)}\n\n{note}"

    return render


def cell(row: dict[str, Any]) -> str:
    if "accuracy" not in row:
        return f"{row['bits_per_byte']:.3f}"
    low, high = row["interval"]
    return f"{row['accuracy']:.0%} ({low * 100:.0f}–{high * 100:.0f})"


def kernel(found: dict[str, Any]) -> str:
    """Any kernel bench: its rows as they are."""
    rows = found["rows"]
    head = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    body = [[_number(r.get(name)) for name in head] for r in rows]
    return f"{markdown(head, body)}\n\n{machine(found.get('machine', {}))}"


def compiled(found: dict[str, Any]) -> str:
    """What nvcc says of the CUDA kernels, the largest of each family."""
    head = ["Kernel", "File", "Instances", *(f"sm_{a}" for a in found["archs"]), "Bytes spilled"]
    body = [
        [f"`{k['kernel']}`", f"`{k['source']}`", str(k["instances"])]
        + [str(k["registers"].get(a, "")) for a in found["archs"]]
        + [str(k["spills"])]
        for k in found["kernels"]
    ]
    return f"{markdown(head, body, left=2)}\n\n*Registers per thread, nvcc {found['nvcc']}.*"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def bars(_: Any) -> str:
    """What issue 5 asks of a CPU, and what the committed numbers say; a bar without its numbers is left out."""
    body: list[list[str]] = []

    def line(what: str, wanted: float, measured: float, most: bool = False, note: str = "") -> None:
        met = measured <= wanted if most else measured >= wanted
        body.append([what, f"{'≤' if most else '≥'} {wanted:g}", f"{measured:.3g}{note}", "yes" if met else "**no**"])

    for r in _committed("generate/report.json"):
        one = r.get("threads", 1) == r.get("batch", 1) == 1 and r["length"] >= 512
        if r["policy"] == "full" and one and "ratio" in r:
            what = f"`full`, {r['length']:,} tokens: time over DynamicCache + sdpa"
            line(what, 0.7 if r["length"] >= 8192 else 1.0, r["ratio"], most=True)
    overhead = [r for r in _committed("end_to_end/overhead.json") if "our calls" in r]
    for name, bar, what in (
        ("step ms", 0.15, "the whole step without its arithmetic, ms per layer and token"),
        ("above nothing ms", 0.15, "the cache's and attention's part of it"),
        ("above DynamicCache ms", 0.15, "above DynamicCache's"),
        ("our calls", 3, "op calls per layer"),
        ("bytes more at 4x", 0, "bytes of a step that grow with the context"),
    ):
        for r in (r for r in overhead if name in r):
            line(f"{what}: `{r['policy']}`", bar, r[name], most=True)
    for r in _committed("end_to_end/skipdecode.json"):
        if r.get("bar") is not None:
            line(f"SkipDecode's {r['table']} table: x `full`", r["bar"], r["x full"])
    for r in _committed("end_to_end/tokenselect_decode.json"):
        if r.get("bar") is not None:
            line(f"`{r['cache']}`, {r['context']:,} tokens: x `full`", r["bar"], r["x full"])
    for r in _committed("end_to_end/h2o.json"):
        if r["cache"].startswith("h2o") and r["batch"] == r["largest batch"]:
            line("H2O 20 %: x the batch that fits the full cache (a bar for GPUs)", 4.5, r["x batch"])
    for r in _committed("end_to_end/threads.json"):
        if r["contender"] == "full":
            line(f"`full`, two threads, batch {r['batch']}: x one", 1.7, r["x"], note=f" (memory {r['memory x']:.3g})")
    return markdown(["Bar on a CPU", "Wanted", "Measured", "Met"], body) if body else MISSING


def catalogue(_: Any) -> str:
    """What every policy says of itself: ``Policy.card``."""
    classes = [x for x in (getattr(policies, name) for name in policies.__all__) if isinstance(x, type)]
    stock = [x for x in classes if issubclass(x, policies.Policy) and x is not policies.Policy]
    if missing := [x.__name__ for x in stock if x.card is None]:
        raise ValueError(f"{', '.join(missing)} must have a card (kvcache/policies/card.py)")
    short, long = [], []
    for policy in sorted(stock, key=lambda x: (x.__name__ != "Full", x.__name__.lower())):
        name, card = f"`{policy.__name__.lower()}`", policy.card
        given = defaults(policy)
        short.append([name, card.source, f"`{given}`" if given else "", card.holds, needs(policy)])
        long.append([name, card.rule, card.cost, card.use])
    first = markdown(["Policy", "Source", "Defaults", "Holds per kv head", "Needs"], short, left=5)
    second = markdown(["Policy", "Rule", "A step costs beyond reading what is held", "Use"], long, left=4)
    return f"{first}\n\n{second}"


def quality(found: dict[str, Any]) -> str:
    """Answers and bytes beside kvpress' policies of the same name."""
    body = []
    for r in found["rows"]:
        line = [f"`{r['policy']}`", r["press"], r["task"], r["protocol"], f"{r['accuracy']:.0%}"]
        if "left_out" in r:
            body.append([*line, "left out: " + r["left_out"].replace("|", "\\|"), "", size(r["nbytes"]), ""])
            continue
        flips = f"{r['only_ours']} / {r['only_theirs']}"
        body.append([*line, f"{r['peer_accuracy']:.0%}", flips, size(r["nbytes"]), size(r["peer_nbytes"])])
    head = ["Policy", "kvpress", "Task", "Protocol", "Right", "kvpress right", "Right in ours alone / theirs", "Held",
            "kvpress holds"]  # fmt: skip
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    samples = found["rows"][0]["samples"]
    note = f"*{samples} questions, context {found['length']:,} tokens; {versions} on the other side.*"
    return f"{markdown(head, body, left=4)}\n\n{note}"


def _committed(file: str) -> Rows:
    """The rows of a committed JSON; none if it is not there."""
    path = RESULTS / file
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    return found if isinstance(found, list) else found["rows"]


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "demo": ("demo/report.json", demo),
    "generate": ("generate/report.json", generate),
    "e2e-generate": ("generate/report.json", decode),
    "eval-passkey": ("eval/report.json", budgets("passkey")),
    "eval-recall": ("eval/report.json", budgets("recall")),
    "nvcc": ("nvcc/kernels.json", compiled),
    **{
        f"e2e-{name}": (f"end_to_end/{name}.json", script)
        for name in ("overhead", "skipdecode", "tokenselect_decode", "tokenselect_prefill", "h2o", "threads")
    },
    "e2e-bars": (".", bars),
    "catalogue": (".", catalogue),
    "beside-kvpress": ("quality/beside_kvpress.json", quality),
    "eval-text": ("eval/report.json", budgets("text")),
}


def render(name: str) -> str:
    """The table called ``name``, in Markdown."""
    if name.startswith("cpu_") or "/" in name:
        file, function = f"{name}.json", kernel
    else:
        file, function = TABLES[name]
    path = RESULTS / file
    if path == RESULTS:
        return function(None)
    return function(json.loads(path.read_text())) if path.is_file() else MISSING


def filled(text: str) -> str:
    """``text`` with every table made anew."""
    return re.sub(
        r"(<!-- table ([\w/-]+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{render(m[2])}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale.append(page)
            if not check:
                path.write_text(new)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python bench/tables.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
