"""The tables of docs/results.md from the JSON that the end-to-end benches write."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def put(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_what_was_not_measured_says_so(tables):
    assert tables.render("e2e-h2o") == tables.render("generate") == tables.render("e2e-bars") == tables.MISSING


def test_rows_of_a_script_with_different_columns(tables, tmp_path):
    rows = [{"table": "full", "ms": 2.0, "bar": None}, {"table": "2x", "ms": 1.0, "promise": 1.94}]
    put(tmp_path, "end_to_end/skipdecode.json", {"command": "python x.py", "machine": {"cpu": "C"}, "rows": rows})
    text = tables.render("e2e-skipdecode")
    assert text.splitlines()[0] == "`python x.py`"
    assert "| table | ms | promise |" in text
    assert "| `full` | 2 |  |" in text
    assert "| `2x` | 1 | 1.94 |" in text
    assert "*C, 1 thread.*" in text


def test_decode_rows_with_reasons_and_batches(tables, tmp_path):
    base = {"length": 512, "model": "llama-27m", "batch": 2, "device": "cpu"}
    timed = {**base, "policy": "full", "backend": "native", "nbytes": 1 << 20, "peak_nbytes": 3 << 30,
             "ms_per_token": 4.0, "ratio": 0.5, "limit_ms": 2.0, "of_limit": 0.5, "cpu": "C", "torch": "2"}  # fmt: skip
    missing = {**base, "policy": "QuantizedCache quanto int4", "backend": "native", "left_out": "a | b"}
    put(tmp_path, "generate/report.json", [timed, missing])
    text = tables.render("e2e-generate")
    assert "`llama-27m`, float32, batch 2:" in text
    assert "| `full` | 512 | 2.0 MiB | 3.00 GiB |  | 4.0 | 500.0 | **0.50** | 2.0 | 50% |" in text
    assert "| `full` | 512 | 1.0 MiB | 4.0 | **0.50** | 2.0 | 50% |" in tables.render("generate")
    assert "Quantized" not in tables.render("generate")
    assert "| `QuantizedCache quanto int4`, left out: a \\| b | 512 |" in text


def test_bars_show_every_loss(tables, tmp_path):
    row = {"policy": "full", "length": 8192, "batch": 1, "threads": 1}
    put(tmp_path, "generate/report.json", [{**row, "ratio": 0.71}, {**row, "length": 512, "ratio": 1.0}])
    rows = [{"policy": "h2o", "step ms": 0.16, "our calls": 3, "bytes more at 4x": 8}]
    put(tmp_path, "end_to_end/overhead.json", {"rows": rows})
    put(tmp_path, "end_to_end/skipdecode.json", {"rows": [{"table": "2x", "bar": 1.8, "x full": 1.8}]})
    put(tmp_path, "end_to_end/threads.json", {"rows": [{"contender": "full", "batch": 1, "x": 1.6, "memory x": 1.5}]})
    lines = [x for x in tables.render("e2e-bars").splitlines() if x.startswith("|")][2:]
    met = {x.split("|")[1].strip(): x.split("|")[4].strip() for x in lines}
    assert met == {
        "`full`, 8,192 tokens: time over DynamicCache + sdpa": "**no**",
        "`full`, 512 tokens: time over DynamicCache + sdpa": "yes",
        "the whole step without its arithmetic, ms per layer and token: `h2o`": "**no**",
        "op calls per layer: `h2o`": "yes",
        "bytes of a step that grow with the context: `h2o`": "**no**",
        "SkipDecode's 2x table: x `full`": "yes",
        "`full`, two threads, batch 1: x one": "**no**",
    }
