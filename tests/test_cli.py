"""The command line as a user runs it."""

import builtins
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kvcache import __version__
from kvcache.cli import main

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rich", "matplotlib")), reason="needs kvcache[demo]"
)
FAST = ["--length", "128", "--samples", "2", "--windows", "2"]


def kvcache(*arguments, **environment):
    """The command in a process of its own, with its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "kvcache.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_version_and_help(capsys):
    for arguments in (
        ["--version"],
        ["--help"],
        ["demo", "--help"],
        ["eval", "--help"],
        ["bench", "--help"],
        ["train-gates", "--help"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"kvcache {__version__}" in out
    for word in (
        "demo",
        "eval",
        "bench",
        "train-gates",
        "doctor",
        "--out",
        "--quick",
        "--context",
        "--capacity-weight",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["dmeo"], "invalid choice"),
        (["demo", "--budget", "2"], "in (0, 1]"),
        (["demo", "--budget", "much"], "write 1/8 or 0.125"),
        (["demo", "--samples", "0"], "must be at least 1"),
        (["bench", "--context", "8k"], "is no whole number"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@needs_extras
def test_bad_values_are_errors_without_a_traceback(capsys, tmp_path):
    assert main(["eval", "--policy", "h3o", "--out", str(tmp_path)]) == 2
    assert "unknown policy 'h3o'" in capsys.readouterr().err
    assert main(["bench", "--policy", "h2o(heavi=1)", "--out", str(tmp_path)]) == 2
    assert "did you mean 'heavy'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_say_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find(name, *a))
    assert main(["demo"]) == 2
    assert "pip install kvcache[demo]" in capsys.readouterr().err


def test_doctor_needs_no_extras_and_checks_the_installation(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("rich", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "transformers", "backend", "instruction set", "CUDA", "ops registered", "Everything works."):
        assert word in out


def test_doctor_reports_what_fails(monkeypatch, capsys):
    from kvcache.evaluation import doctor

    def broken(device):
        raise RuntimeError("top-k counts backwards")

    monkeypatch.setattr(doctor, "CHECKS", (broken, *doctor.CHECKS[:1]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  cpu: top-k counts backwards" in out
    assert "1 of 2 checks failed" in out


@needs_extras
def test_demo_writes_table_report_and_plot(tmp_path):
    done = kvcache("demo", *FAST, "--out", str(tmp_path), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(len(line) for line in done.stdout.splitlines() if str(tmp_path) not in line) <= 80
    for word in ("Full cache", "StreamingLLM", "H2O", "TokenSelect", "SkipDecode", "DynamicCache", "bits/byte"):
        assert word in done.stdout
    rows = json.loads((tmp_path / "report.json").read_text())
    assert len(rows) == 5 * 3 + 1
    for row in rows:
        assert {"policy", "task", "nbytes", "full_nbytes", "ms_per_token", "ratio", "backend", "device"} <= set(row)
        assert ("accuracy" in row) == (row["task"] in ("passkey", "recall"))
        assert ("bits_per_byte" in row) == (row["task"] == "text")
    held = {row["name"]: row["nbytes"] / row["full_nbytes"] for row in rows if row["task"] == "passkey"}
    assert held["h2o"] < 0.2 < 1 <= held["full"] == held["tokenselect"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@needs_extras
def test_eval_measures_budgets_and_a_policy_of_the_user(tmp_path):
    named = ("h2o(heavy=0.2, recent=0.2)", "snapkv", "h2o", "window", "tokenselect", "streamingllm")
    own = [
        "--compare",
        "none",
        *(x for name in named for x in ("--policy", name)),
        "--task",
        "passkey",
        "text",
        "turns",
    ]
    done = kvcache("eval", "--quick", *FAST, *own, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())
    budgets = {(row["name"], row["budget"]) for row in rows}
    assert {("full", 1.0), ("h2o", 0.5), ("h2o", 0.125), ("window", 0.125), ("snapkv", 0.5)} <= budgets
    assert {row["task"] for row in rows} == {"passkey", "text", "turns"}
    assert all(len(row["by_turn"]) == 4 for row in rows if row["task"] == "turns")
    assert any(row["policy"] == "h2o(heavy=0.2, recent=0.2)" for row in rows)
    assert "TokenSelect keeps at least 95 %" in done.stdout
    for plot in ("eval.png", "bytes.png"):
        assert (tmp_path / plot).stat().st_size > 10_000
    assert "StreamingLLM" in (tmp_path / "report.html").read_text()


@needs_extras
def test_bench_pairs_every_cache_with_dynamic_cache(tmp_path):
    done = kvcache(
        "bench", "--context", "160", "--rounds", "2", "--tokens", "3", "--out", str(tmp_path),
        "--only", "dynamic", "eager", "static", "kvcache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["policy"]: row for row in json.loads((tmp_path / "report.json").read_text())}
    assert len(rows) == 6
    assert rows["DynamicCache + sdpa"]["ratio"] == 1.0
    assert rows["full"]["nbytes"] > 4 * rows["h2o(heavy=0.1, recent=0.1)"]["nbytes"]
    assert rows["h2o(heavy=0.1, recent=0.1)"]["read"] == 32
    for row in rows.values():
        assert row["ms_per_token"] > 0
        assert row["limit_ms"] > 0
        assert 0 < row["of_limit"] < 2
