"""Registers, shared memory and spills of every CUDA kernel, as the compiler reports them for each architecture.

    python bench/kernel_report.py [--archs 80,89,90a,100,120] [--out bench/results/nvcc/kernels.json] [sources]

Needs nvcc and no GPU. Prints a table, one line per kernel family, and exits with 1 where a kernel spills registers.
With sources named, their lines alone are replaced in the file, for the same architectures. (The build itself fails
where a decode kernel spills: CMakeLists.txt.)
``make kernel-report`` writes the JSON that docs/kernels.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHS = ("80", "89", "90a", "100", "120")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def compile_one(source: Path, arch: str, folder: Path) -> list[dict]:
    """One row per kernel of ``source``."""
    target = folder / f"{source.stem}_{arch}.cubin"
    command = [
        "nvcc",
        f"-arch=sm_{arch}",
        "-O3",
        "-std=c++17",
        "-cubin",
        "-Xptxas",
        "-v",
        str(source),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr[-3000:]}")
    rows: list[dict] = []
    for line in done.stderr.splitlines():
        if found := ENTRY.search(line):
            rows.append({"source": source.name, "arch": arch, "symbol": found[1], "shared": 0})
        elif found := SPILLS.search(line):
            if rows:
                rows[-1].update(stack=int(found[1]), spills=int(found[2]) + int(found[3]))
        elif (found := USED.search(line)) and rows:
            rows[-1]["registers"] = int(found[1])
            if shared := SHARED.search(line):
                rows[-1]["shared"] = int(shared[1])
    names = subprocess.run(
        ["c++filt"], input="\n".join(r["symbol"] for r in rows), capture_output=True, text=True, check=True
    )
    for row, name in zip(rows, names.stdout.splitlines()):
        row["kernel"] = re.sub(r"\(anonymous namespace\)::|kvcache::cuda::|^void ", "", name).split("(")[0]
    return rows


def families(rows: list[dict]) -> list[dict]:
    """The instances of each template together: how many, and the largest numbers for each architecture."""
    out: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = (row["source"], row["kernel"].split("<")[0])
        line = out.setdefault(key, {"source": key[0], "kernel": key[1], "instances": 0, "registers": {}, "spills": 0})
        most = line["registers"]
        most[row["arch"]] = max(most.get(row["arch"], 0), row["registers"])
        line["spills"] = max(line["spills"], row["spills"])
        line["instances"] = sum(
            r["arch"] == row["arch"] and (r["source"], r["kernel"].split("<")[0]) == key for r in rows
        )
    return list(out.values())


def merged(before: dict, table: list[dict], archs: list[str], sources: list[Path]) -> list[dict]:
    """The lines of a report with those of ``sources`` replaced by ``table``; files that are gone have none."""
    if list(archs) != before["archs"]:
        raise SystemExit(f"the report is of {','.join(before['archs'])}: ask for those, or for all sources")
    new = {source.name for source in sources}
    kept = [x for x in before["kernels"] if x["source"] not in new and (SOURCES / x["source"]).exists()]
    return sorted([*kept, *table], key=lambda line: line["source"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=lambda text: text.split(","), default=ARCHS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("sources", nargs="*", type=Path, default=sorted(SOURCES.glob("*.cu")))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, s, a, Path(folder)) for s in options.sources for a in options.archs]
        rows = [row for job in jobs for row in job.result()]
    table = families(rows)
    print(f"{'kernel':44} {'instances':>9} " + " ".join(f"{'sm_' + a:>7}" for a in options.archs) + f" {'spills':>7}")
    for line in table:
        used = " ".join(f"{line['registers'].get(a, 0):>7}" for a in options.archs)
        print(f"{line['kernel']:44} {line['instances']:>9} {used} {line['spills']:>7}")
    if options.out:
        if options.out.exists() and len(options.sources) < len(list(SOURCES.glob("*.cu"))):
            table = merged(json.loads(options.out.read_text()), table, options.archs, options.sources)
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"nvcc": release[1] if release else "", "archs": list(options.archs), "kernels": table}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    spilling = sorted({f"{r['kernel']} (sm_{r['arch']})" for r in rows if r["spills"]})
    if spilling:
        print("spills registers: " + ", ".join(spilling), file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
