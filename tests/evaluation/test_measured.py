"""A run that goes on where it was, and reports of it."""

import json

import numpy as np
import pytest

from kvcache.evaluation.contenders import Contender
from kvcache.evaluation.evaluate import run
from kvcache.evaluation.html import write_html
from kvcache.evaluation.measured import Ledger, Measured
from kvcache.evaluation.plots import plot_budgets, plot_bytes
from kvcache.evaluation.suite import Answers, Bits, Held

HELD = Held(2, 400, 800, 64.0)


def answers(*scores):
    return Answers([[np.array([1, 2])] for _ in scores], np.array(scores, float)[:, None], HELD)


def test_results_are_found_again(tmp_path):
    path, facts = tmp_path / "new" / "measured.jsonl", {"model": "m"}
    ledger = Ledger(path, facts, resume=False)
    ledger.add(answers(1, 0), task="passkey", seed=1)
    ledger.add(Bits(np.array([1.5, 2.5]), HELD), task="text", seed=1)
    with path.open("a") as file:
        file.write('{"key": "half a li')  # stopped in the middle of a write
    again = Ledger(path, facts, resume=True)
    assert len(again) == 2
    found = again.find(task="passkey", seed=1)
    assert found.scores.tolist() == [[1.0], [0.0]]
    assert found.tokens[0][0].tolist() == [1, 2]
    assert found.held == HELD
    assert again.find(task="text", seed=1).mean == 2.0
    assert again.find(task="passkey", seed=2) is None
    assert Ledger(path, {"model": "another"}, resume=True).find(task="passkey", seed=1) is None
    assert len(Ledger(path, facts, resume=False)) == 0
    assert not path.exists()


def test_a_line_added_behind_a_torn_one_is_read(tmp_path):
    path = tmp_path / "measured.jsonl"
    path.write_text('{"key": "half a li')
    Ledger(path, {}, resume=True).add(answers(1), task="passkey")
    assert Ledger(path, {}, resume=True).find(task="passkey") is not None


def test_rows_count_flips_against_the_full_cache(tmp_path):
    full = Measured(Contender("full", "Full cache", "full", 1.0), {"passkey": answers(1, 1, 0, 1)})
    less = Measured(
        Contender("h2o", "H2O", "h2o(heavy=4, recent=4)", 0.5), {"passkey": answers(1, 0, 1, 0)}, Bits(np.ones(2), HELD)
    )
    rows = [row for m in (full, less) for row in m.rows(128, "agnostic", full)]
    assert [r.task for r in rows] == ["passkey", "passkey", "text"]
    assert "worse_than_full" not in rows[0].extra
    assert rows[1].as_dict()["worse_than_full"] == 2
    assert rows[1].as_dict()["better_than_full"] == 1
    plots = [plot_budgets(rows, tmp_path / "a.png"), plot_bytes(rows, tmp_path / "b.png")]
    page = write_html(tmp_path / "report.html", rows, [], plots).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "h2o(heavy=4, recent=4)" in page
    assert "http" not in page  # nothing beside it is needed


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """What was measured is not measured again, and the report is the same as of a run in one go."""
    from kvcache.evaluation import evaluate

    options = {"length": 96, "samples": 2, "windows": 1, "names": ("passkey", "text"), "compare": "none", "seeds": 2}
    policies = ["streamingllm(sinks=2, window=14)"]
    whole = run(tmp_path / "whole", policies=policies, **options)
    real, calls = evaluate.text_bits, []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate, "text_bits", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", policies=policies, **options)
    lines = (tmp_path / "parts/measured.jsonl").read_text().splitlines()
    assert len(lines) == 6  # full: two seeds of two tasks; the other: two seeds of passkey
    parts = run(tmp_path / "parts", policies=policies, resume=True, **options)
    assert len(calls) == 5
    keys = ("policy", "task", "accuracy", "bits_per_byte", "nbytes", "samples")
    assert [[getattr(r, k) for k in keys] for r in parts] == [[getattr(r, k) for k in keys] for r in whole]
    assert {r.samples for r in whole if r.task == "passkey"} == {4}
    assert len(json.loads((tmp_path / "parts/report.json").read_text())) == 4


def test_bad_values_are_named_before_anything_is_measured(tmp_path):
    for options, message in (
        ({"names": ("needles",)}, "unknown task 'needles' for this model; one of passkey"),
        ({"compare": "some"}, "compare must be one of usual, all, none"),
        ({"protocol": "kind"}, "protocol must be one of agnostic, aware"),
        ({"policies": ("h3o",)}, "unknown policy 'h3o'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
