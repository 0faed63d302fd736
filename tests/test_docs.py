"""The documentation keeps its word: code runs as written, tables are the committed numbers, links lead somewhere."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import kvcache
from kvcache.policies.base import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WITH_CODE = [p for p in PAGES if "```python" in p.read_text()]


def blocks(page):
    """The Python blocks of a page with the line that each begins on."""
    text = page.read_text()
    return [
        (text[: m.start(1)].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_code_runs_as_written(page):
    known = dict(REGISTRY)
    names: dict = {"__name__": "docs"}
    try:
        for line, code in blocks(page):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    finally:
        REGISTRY.clear()
        REGISTRY.update(known)


def test_the_policy_example_has_about_twenty_lines():
    code = next(code for _, code in blocks(ROOT / "docs/writing-a-policy.md") if "class KeyNorm" in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_every_policy_is_in_the_catalogue_with_its_defaults():
    catalogue = (ROOT / "docs/policies.md").read_text()
    stock = [cls for cls in REGISTRY.values() if cls.__module__.startswith("kvcache.policies")]
    assert len(stock) >= 6
    for cls in stock:
        assert cls.card is not None
        assert all(len(getattr(cls.card, f.name)) > 0 for f in fields(cls.card))
        row = re.search(rf"^\| `{cls.__name__.lower()}` \|.*$", catalogue, re.M)
        assert row, cls.__name__
        for default in re.findall(r"(\w+)=([^,`]+)", row[0].split("|")[3]):
            assert repr(getattr(cls(), default[0])) == default[1].replace('"', "'"), (cls.__name__, default)


def test_tables_are_the_committed_numbers():
    done = subprocess.run([sys.executable, ROOT / "bench/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_op_has_a_row_in_the_kernel_table():
    text = (ROOT / "docs/kernels.md").read_text()
    for name in kvcache.ops.OPS:
        assert f"| `{name}` |" in text, name


def test_every_test_that_a_bug_is_said_to_have_exists():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs/emulation.md").read_text())
    assert len({name for _, name in named}) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / f"tests/ops/{file}.py").read_text(), (file, name)
