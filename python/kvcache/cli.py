"""The command ``kvcache``: demo, eval, bench, train-gates and doctor."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

__all__ = ["main"]

_DEMO = """\
Run the small language model that comes with kvcache under five cache policies, side by side: full cache, StreamingLLM,
H2O, TokenSelect and SkipDecode, on two retrieval tasks and on running text. Prints one question with every policy's
answer and a table (answers right, bits per byte, bytes of cache held, decode time against transformers' DynamicCache),
and writes report.json and demo.png. Everything is measured in the run; nothing is downloaded; about a minute."""

_EVAL = """\
Quality of policies at budgets of 1/2, 1/4, 1/8 and 1/16 of the context, side by side on the same questions and the same
text: answers right with 95 % intervals, answers worse and better than the full cache's, bits per byte, bytes really
held. Tasks are made by code and nothing is downloaded: the shipped byte-level model has passkey, recall, turns,
two_hop, frequent_words, copy and text; any other model of transformers has tasks built like RULER's and InfiniteBench's
(niah_*, vt, cwe, fwe, passkey, number_string, kv_retrieval) and text. Prints tables and writes report.json, eval.png,
bytes.png and report.html; measured.jsonl has every result, from which --resume goes on."""

_BENCH = """\
Decode time of generate() behind a context, on models with random weights: kvcache's policies against transformers'
DynamicCache (sdpa and eager), StaticCache (with and without torch.compile), QuantizedCache, and kvpress, with the
same weights and ids, next to the limit that this machine's memory sets. Contenders take turns; medians. Without
arguments: on a CPU a Llama of 8 layers on one thread, some minutes; on a GPU Qwen3-4B, Llama-3-8B and OPT-6.7B by
their shapes, batches of 1, 4 and 8 behind 4k, 32k and 128k tokens. Writes report.json and generate.png."""

_GATES = """\
Train the retention gates of the policy trimkv for a model, which stays as it is: what each gate lets a head forget must
not change what the model says. On tasks and documentation that are made on the spot, or on a text. Writes one
safetensors file. An interrupted training goes on with --resume."""

_DOCTOR = """\
Show versions, the backend and instruction set in use, what is known of CUDA, and check that every native op is
registered and agrees with its plain-torch reference. Exit code 1 if something is wrong."""


#: Options of train-gates: fields of kvcache.GateRecipe, which has their defaults.
_RECIPE = (
    (
        "capacity",
        int,
        "ENTRIES",
        "entries per kv head that a gate may let a head remember: near the budget that is to be used",
    ),
    ("steps", int, "N", "optimizer steps"),
    ("length", int, "TOKENS", "tokens per sequence"),
    ("batch", int, "ROWS", "sequences per step"),
    ("lr", float, "RATE", "learning rate of AdamW"),
    ("capacity_weight", float, "WEIGHT", "weight of the loss for what exceeds the capacity"),
    ("width", int, "UNITS", "hidden units of a gate"),
    ("bias", float, "VALUE", "with which gates begin: the higher, the more is remembered at first"),
    ("seed", int, "N", "another seed draws other data"),
)


def _share(text: str) -> float:
    """A budget as a share of the context: ``1/8`` or ``0.125``."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no share of the context; write 1/8 or 0.125") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a share of the context is in (0, 1], got {text}")
    return value


def _positive(text: str) -> int:
    """An int of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    from . import GateRecipe, __version__

    parser = argparse.ArgumentParser(
        prog="kvcache", description="A paged, policy-driven KV cache for Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"kvcache {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | eval | bench | train-gates | doctor"
    )

    def add(name: str, short: str, long: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=short, description=long, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def shared(command: argparse.ArgumentParser, name: str) -> None:
        command.add_argument(
            "--out", type=Path, default=Path(f"kvcache-{name}"), metavar="FOLDER", help="where to write (%(default)s)"
        )
        command.add_argument(
            "--threads", type=_positive, default=1, metavar="N", help="CPU threads (%(default)s: best for small models)"
        )
        command.add_argument("--seed", type=int, default=0, help="another seed draws other samples (%(default)s)")

    demo = add("demo", "a real model under five cache policies, side by side", _DEMO)
    shared(demo, "demo")
    demo.add_argument("--length", type=_positive, default=1024, help="tokens of context (%(default)s)")
    demo.add_argument("--samples", type=_positive, default=48, help="questions per task (%(default)s)")
    demo.add_argument("--windows", type=_positive, default=16, help="windows of text (%(default)s)")
    demo.add_argument("--budget", type=_share, default=1 / 8, metavar="SHARE", help="share of the context kept (1/8)")
    demo.add_argument("--model", metavar="FOLDER", help="another byte-level model, made by kvcache.evaluation.train")

    evaluate = add("eval", "quality of every policy at four budgets", _EVAL)
    shared(evaluate, "eval")
    evaluate.add_argument("--quick", action="store_true", help="two budgets, a third of the samples")
    evaluate.add_argument(
        "--length", type=_positive, default=1024, help="tokens of context, with the answer for models of your own "
        "(%(default)s)",
    )  # fmt: skip
    evaluate.add_argument("--task", nargs="+", default=[], metavar="NAME",
                          help="tasks (passkey recall text; other models: niah_single_2 niah_multikey_3 niah_turns vt "
                          "fwe text)")  # fmt: skip
    evaluate.add_argument("--compare", choices=("usual", "all", "none"), default="usual",
                          help="policies at every budget: the demo's and the baselines, every one that needs no "
                          "calibration, or only the full cache (%(default)s)")  # fmt: skip
    evaluate.add_argument("--samples", type=_positive, help="questions per task and seed (96; 32 with --quick)")
    evaluate.add_argument("--windows", type=_positive, help="windows of text per seed (64; 16 with --quick)")
    evaluate.add_argument("--seeds", type=_positive, default=1, metavar="N", help="seeds from --seed on (%(default)s)")
    evaluate.add_argument("--protocol", choices=("agnostic", "aware"), default="agnostic",
                          help="compress before the question is seen, or with it (%(default)s)")  # fmt: skip
    evaluate.add_argument("--model", metavar="NAME", help="any causal LM of transformers: a folder, or a name on the "
                          "hub; one made by kvcache.evaluation.train has the shipped one's tasks")  # fmt: skip
    evaluate.add_argument("--chat", action="store_true", help="through the tokenizer's chat template")
    evaluate.add_argument("--device", default="cpu", help="where the model runs (%(default)s)")
    evaluate.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and cache (as stored)"
    )
    evaluate.add_argument("--policy", action="append", metavar="TEXT", help="evaluate this next to the others, may be "
                          "repeated: a policy's text; a name such as snapkv, or a text with {budget} in it, for it at "
                          "every budget")  # fmt: skip
    evaluate.add_argument("--resume", action="store_true", help="go on with the results in FOLDER/measured.jsonl")

    bench = add("bench", "decode time of generate() against other caches", _BENCH)
    shared(bench, "bench")
    bench.add_argument("--model", nargs="+", default=[], metavar="NAME", help="shapes: llama-27m, qwen3-0.6b, "
                       "qwen3-4b, llama-3-8b, opt-6.7b, ... (by device)")  # fmt: skip
    bench.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (%(default)s)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and cache (by shape)")
    bench.add_argument("--batch", type=_positive, nargs="+", default=[], metavar="ROWS", help="batches (by device)")
    bench.add_argument("--context", type=_positive, nargs="+", default=[], metavar="TOKENS",
                       help="context lengths (CPU: 512 2048 8192)")  # fmt: skip
    bench.add_argument("--rounds", type=_positive, default=5, help="rounds, each with all contenders (%(default)s)")
    bench.add_argument("--tokens", type=_positive, default=12, help="tokens per contender and round (%(default)s)")
    bench.add_argument("--prefill", type=_positive, metavar="TOKENS",
                       help="longest prompt that is really read, to time the first token (CPU: 2048)")  # fmt: skip
    bench.add_argument("--policy", action="append", metavar="TEXT",
                       help="time this policy text instead of the default ones; may be repeated")  # fmt: skip
    bench.add_argument("--only", nargs="+", metavar="KIND", help="of dynamic, eager, static, compile, quanto, hqq, "
                       "fp8, kvpress, kvcache (all but hqq and fp8)")  # fmt: skip
    bench.add_argument("--kvpress-python", metavar="PATH", help="a Python that has kvpress and its transformers: "
                       "make peers builds build/peers/kvpress/bin/python")  # fmt: skip
    bench.add_argument("--seconds", type=float, help="begin no other setting after this long")

    gates = add("train-gates", "train the retention gates of trimkv for a model", _GATES)
    gates.add_argument("--out", type=Path, default=Path("gates.safetensors"), metavar="FILE", help="(%(default)s)")
    gates.add_argument(
        "--model", metavar="FOLDER", help="model and tokenizer, or a name (the model that comes with kvcache)"
    )
    gates.add_argument("--text", type=Path, metavar="FILE", help="train on this text")
    gates.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (%(default)s)")
    gates.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (as stored)")
    gates.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads (%(default)s)")
    gates.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted training")
    gates.add_argument(
        "--save-every", type=_positive, default=50, metavar="STEPS", help="between checkpoints (%(default)s)"
    )
    for name, kind, metavar, text in _RECIPE:
        default = getattr(GateRecipe, name)
        option = f"--{name.replace('_', '-')}"
        gates.add_argument(option, type=kind, metavar=metavar, default=default, help=f"{text} (%(default)s)")

    add("doctor", "check this installation", _DOCTOR)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ✓ shows ?, and goes on
    options = _parser().parse_args(arguments)
    if options.command == "doctor":
        from .evaluation.doctor import run as doctor

        return doctor()

    from .evaluation.console import MissingExtras, require_extras

    try:
        require_extras()
        import torch

        torch.set_num_threads(options.threads)
        _COMMANDS[options.command](options)
    except (MissingExtras, ValueError, FileNotFoundError) as error:
        print(f"kvcache {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _demo(o: argparse.Namespace) -> None:
    from .evaluation.demo import run

    run(
        o.out,
        length=o.length,
        samples=o.samples,
        windows=o.windows,
        share=o.budget,
        seed=o.seed,
        folder=o.model,
    )


def _eval(o: argparse.Namespace) -> None:
    import torch

    from .evaluation.evaluate import run

    run(
        o.out,
        quick=o.quick,
        length=o.length,
        samples=o.samples,
        windows=o.windows,
        protocol=o.protocol,
        seed=o.seed,
        seeds=o.seeds,
        folder=o.model,
        names=tuple(o.task),
        compare=o.compare,
        policies=tuple(o.policy or ()),
        chat=o.chat,
        device=o.device,
        dtype=None if o.dtype is None else getattr(torch, o.dtype),
        resume=o.resume,
    )


def _bench(o: argparse.Namespace) -> None:
    from .evaluation.bench.decode import run

    run(
        o.out,
        models=o.model,
        device=o.device,
        dtype=o.dtype,
        batches=o.batch,
        contexts=o.context,
        rounds=o.rounds,
        tokens=o.tokens,
        threads=o.threads,
        policies=tuple(o.policy or ()),
        prefill=o.prefill,
        kvpress_python=o.kvpress_python,
        seconds=o.seconds,
        seed=o.seed,
        **({"only": tuple(o.only)} if o.only else {}),
    )


def _train_gates(o: argparse.Namespace) -> None:
    from .evaluation.train_gates import run

    run(
        o.out,
        folder=o.model,
        text=o.text,
        device=o.device,
        dtype=o.dtype,
        resume=o.resume,
        save_every=o.save_every,
        **{name: getattr(o, name) for name, *_ in _RECIPE},
    )


_COMMANDS = {"demo": _demo, "eval": _eval, "bench": _bench, "train-gates": _train_gates}

if __name__ == "__main__":
    sys.exit(main())
