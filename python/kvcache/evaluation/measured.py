"""What was measured of a policy, the comparisons that the literature makes, and the file from which a run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import Contender
from .rows import Row
from .suite import Answers, Bits, Held, Timing

__all__ = ["Claim", "Ledger", "Measured", "claims"]


@dataclass
class Measured:
    """One policy on all tasks under one protocol; ``bits`` of the task "text"."""

    contender: Contender
    answers: dict[str, Answers] = field(default_factory=dict)
    bits: Bits | None = None
    time: Timing | None = None

    def rows(self, length: int, protocol: str, full: Measured | None = None) -> list[Row]:
        """Rows of ``report.json``, one a task; ``full``: the full cache on the same questions, to count flips."""
        c = self.contender
        common: dict[str, Any] = {"name": c.name, "budget": c.share, "length": length}
        if self.time is not None:
            common |= {"ms_per_token": self.time.ms, "ratio": self.time.ratio}
        rows = []
        for task, a in self.answers.items():
            row = Row(
                c.policy,
                task,
                accuracy=a.accuracy,
                interval=a.interval,
                samples=len(a.scores),
                protocol=protocol,
                **_held(a.held),
                **common,
            )
            if a.scores.shape[1] > 1:
                row.extra["by_turn"] = a.scores.mean(0).tolist()
            if full is not None and full is not self and task in full.answers:
                row.extra["worse_than_full"], row.extra["better_than_full"] = a.flips(full.answers[task])
            rows.append(row)
        if self.bits is not None:
            b = self.bits
            measured: dict[str, Any] = {"bits_per_byte": b.mean, "interval": b.interval, "samples": len(b.windows)}
            rows.append(Row(c.policy, "text", **measured, **_held(b.held), **common))
        return rows


def _held(held: Held) -> dict[str, Any]:
    return {"nbytes": held.nbytes, "full_nbytes": held.full_nbytes, "read": held.read}


# -- the comparisons ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """An expectation from the literature and what was measured; ``certain``: more than chance can explain."""

    text: str
    measured: str
    holds: bool
    certain: bool = True


def claims(found: Sequence[Measured], share: float = 1 / 8) -> list[Claim]:
    """The comparisons at a budget of ``share`` that ``found`` allows.

    Differences in bits per byte are paired: the same windows under both policies, with their 95 % interval.
    """
    by = {m.contender.name: m for m in found if m.contender.share in (share, 1.0)}
    made = []
    passkey = {name: m.answers["passkey"].accuracy for name, m in by.items() if "passkey" in m.answers}
    if "full" in passkey and "tokenselect" in passkey:
        full, ours = passkey["full"], passkey["tokenselect"]
        text = "passkey: TokenSelect keeps at least 95 % of the full cache's accuracy"
        made.append(Claim(text, f"{ours:.1%} of {full:.1%}", full > 0 and ours >= 0.95 * full))
    if "streamingllm" in passkey:
        a = passkey["streamingllm"]
        made.append(Claim("passkey: StreamingLLM falls below 20 %", f"{a:.1%}", a < 0.2))
    bits = {name: m.bits for name, m in by.items() if m.bits is not None}
    for better, worse, text in (
        ("streamingllm", "window", "text: StreamingLLM is better than a window without sinks"),
        ("h2o", "random", "text: H2O is better than random eviction"),
    ):
        if better in bits and worse in bits:
            gap = bits[worse].windows - bits[better].windows
            half = 1.96 * float(gap.std(ddof=1)) / np.sqrt(len(gap)) if len(gap) > 1 else 0.0
            made.append(
                Claim(
                    text,
                    f"{bits[better].mean:.3f} against {bits[worse].mean:.3f} bits/byte, "
                    f"difference {gap.mean():.3f} ± {half:.3f}",
                    holds=bool(gap.mean() > 0),
                    certain=bool(abs(gap.mean()) > half),
                )
            )
    return made


# -- going on with a run --------------------------------------------------------------------------------------------


class Ledger:
    """Every result as it was measured, one JSON line each, so that a run that was stopped goes on where it was.

    A result is found again by everything that it depends on, ``facts`` (the model, versions, ...) included.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, resume: bool) -> None:
        self.path, self.facts = path, facts
        self._known: dict[str, dict[str, Any]] = {}
        self._begin = "\n" if resume else ""  # the last line may have been cut off
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        elif path.exists():
            for line in path.read_text().split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was stopped
                    continue
                self._known[entry["key"]] = entry["result"]

    def __len__(self) -> int:
        return len(self._known)

    def _key(self, what: dict[str, Any]) -> str:
        return json.dumps({**self.facts, **what}, sort_keys=True)

    def find(self, **what: Any) -> Answers | Bits | None:
        """The result of this very measurement, if it is there."""
        result = self._known.get(self._key(what))
        if result is None:
            return None
        held = Held(**result["held"])
        if "windows" in result:
            return Bits(np.array(result["windows"]), held)
        tokens = [[np.array(x, np.int64) for x in said] for said in result["tokens"]]
        return Answers(tokens, np.array(result["scores"]), held)

    def add(self, found: Answers | Bits, **what: Any) -> None:
        """Write a result down."""
        result: dict[str, Any] = {"held": asdict(found.held)}
        if isinstance(found, Bits):
            result["windows"] = found.windows.tolist()
        else:
            result["scores"] = found.scores.tolist()
            result["tokens"] = [[x.tolist() for x in said] for said in found.tokens]
        key = self._key(what)
        self._known[key] = result
        with self.path.open("a") as file:
            file.write(self._begin + json.dumps({"key": key, "result": result}) + "\n")
        self._begin = ""
