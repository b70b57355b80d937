"""The `bench` verb: its options, and what each measurement is started with. Imports no torch."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltakd.base.errors import RunError
from deltakd.bench.arms import ARMS
from deltakd.bench.case import NAMES, Case
from deltakd.bench.shapes import PAIRS

CANDIDATES = "; ".join(f"{name}: {text}" for name, text in NAMES.items())
MEASUREMENTS = {
    "losses": "time and memory of the chunked loss beside plain torch, torch.compile, TRL and Liger",
    "variants": "train the eight parallelogram variants side by side, with and without the remedies",
    "payloads": "how far 16-bit numbers and top k move the delta target at alpha 0.5",
    "cluster": "simulate students and teachers beside runs of this machine, and foretell 8 to 1,024 GPUs",
    "growth": "how a step's time and memory grow with the length of documents and with the vocabulary",
    "rollouts": "how fast a student under ZeRO-3 writes its own answers, with a whole copy of it and without",
    "methods": "every method and baseline on the same models, data and steps, from several seeds, in one table",
    "pictures": "draw the pictures of docs/concepts.md, computed by the code that trains",
    "step": "a training step beside SFT and TRL, with references from a service, this process, disk and a cache",
    "transport": "from one process to another: shared memory beside TCP, queues and pickle, as a share of memcpy",
}

INTO_FOLDERS = ("variants", "pictures")
DRAWN = ("variants", "growth", "pictures")  # with plots beside the numbers


def add_bench(verbs: Any, example: Mapping[str, Any]) -> None:
    """Add `bench` and everything that it measures to the command line; its help ends with `example`."""
    text = f"measure: {', '.join(MEASUREMENTS)}; results go to a file and the terminal"
    bench = verbs.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".", **example)
    kinds = bench.add_subparsers(dest="measurement", required=True, metavar="WHAT")

    def kind(name: str, out: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = kinds.add_parser(
            name, help=MEASUREMENTS[name], description=MEASUREMENTS[name][0].upper() + MEASUREMENTS[name][1:] + "."
        )
        command.add_argument("--out", type=Path, default=Path(out), help=f"where the results go; default {out}")
        return command

    def of_recipe(command: argparse.ArgumentParser) -> None:
        command.add_argument("recipe", help="a name from recipes/, or a path; its models must be there")
        command.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that win over the recipe's"
        )

    losses = kind("losses", "bench/losses.json")
    losses.add_argument("--tokens", type=int, default=2048, help="supervised tokens; default 2048")
    losses.add_argument("--hidden", type=int, default=1536, help="the student's hidden size; default 1536")
    losses.add_argument("--teacher-hidden", type=int, default=3584, help="the teacher's; default 3584")
    losses.add_argument("--vocab", type=int, default=151_936, help="shared vocabulary; default 151936")
    losses.add_argument("--chunk-tokens", type=int, default=512, help="tokens per chunk; default 512")
    losses.add_argument("--repeats", type=int, default=2, help="measurements, in turns with the products; default 2")
    losses.add_argument("--dtypes", default="float32,bfloat16", help="default float32,bfloat16")
    losses.add_argument(
        "--only", default="deltakd,plain,compiled,trl,liger", help=f"candidates, by commas: {CANDIDATES}"
    )
    losses.add_argument("--device", default="cpu", help="cpu or cuda:0; default cpu")
    variants = kind("variants", "bench/variants")
    variants.add_argument("--steps", type=int, default=200, help="optimizer steps of each run; default 200")
    variants.add_argument("--variants", default="v1,v2,v3,v4,v5,v6,v7,v8", help="default: all eight")
    variants.add_argument("--alphas", default="0.25,0.5,1.0", help="default 0.25,0.5,1.0")
    of_recipe(variants)
    of_recipe(kind("payloads", "bench/payloads.json"))
    kind("pictures", "bench/pictures")
    _add_of_shapes(kind)
    _add_methods(kind("methods", "bench/methods.json"))


def _add_methods(methods: argparse.ArgumentParser) -> None:
    methods.add_argument("--bases", default="quickstart", help="recipes, by commas; default quickstart")
    methods.add_argument("--chat-data", metavar="TRAIN,VALIDATION", help="the rows of small_chat")
    methods.add_argument(
        "--math-data",
        metavar="TRAIN,VALIDATION",
        help="the rows of small_math; of either, VALIDATION may be left out where it lies beside TRAIN as the recipe "
        "names it",
    )
    methods.add_argument(
        "--methods", help="by commas; default: sft, forward_kl, delta and every recipe in recipes/baselines"
    )
    methods.add_argument("--seeds", default="1,2,3", help="of the students' training; default 1,2,3")
    methods.add_argument(
        "--steps", help="updates of every student: a number, or one for each base; default: the base's train.steps"
    )
    methods.add_argument(
        "--learning-rates",
        metavar="RATE,RATE",
        help="each method has the one with the least cross-entropy on held-out rows behind those of the table; "
        "default: the base's, for all",
    )
    methods.add_argument("--jobs", type=int, default=1, help="trainings at a time, of one thread each; default 1")
    methods.add_argument(
        "--engine", default="single", help="default single, with frozen models beside the student in its process"
    )
    methods.add_argument("--root", type=Path, default=Path("runs"), help="holds a folder for each base; default runs")
    methods.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over every recipe's")


def _add_of_shapes(kind: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the measurements that make their models themselves."""
    step = kind("step", "bench/step.json")
    step.add_argument("--shape", choices=list(PAIRS), default="small", help="of student and teacher; default small")
    step.add_argument("--data", help="rows with messages: a file or pattern; default: the quickstart's world")
    step.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}; default: all")
    step.add_argument("--steps", type=int, default=8, help="steps that are counted, a multiple of 4; default 8")
    step.add_argument("--rounds", type=int, default=3, help="turns that each arm takes; default 3")
    step.add_argument("--seed", type=int, default=17, help="which rows the steps take; default 17")
    step.add_argument("--peak-tflops", type=float, help="of the device; default: a large product's, measured")
    rollouts = kind("rollouts", "bench/rollouts.json")
    rollouts.add_argument("--shape", choices=list(PAIRS), default="small", help="of the student; default small")
    rollouts.add_argument("--ranks", type=int, default=2, help="processes that share the student out; default 2")
    rollouts.add_argument("--prompts", type=int, default=16, help="that each rank answers in a step; default 16")
    rollouts.add_argument("--new-tokens", type=int, default=64, help="of each answer: none ends before; default 64")
    rollouts.add_argument("--rounds", type=int, default=5, help="turns that each arm takes; default 5")
    rollouts.add_argument(
        "--train-steps",
        type=int,
        default=2,
        help="trained before each round; default 2: after 1 DeepSpeed takes the answers for a part of the step",
    )
    rollouts.add_argument(
        "--refresh-steps", type=int, default=8, help="steps that the copy writes with the same weights; default 8"
    )
    rollouts.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    growth = kind("growth", "bench/growth.json")
    growth.add_argument("--steps", type=int, default=3, help="steps that are counted at each point; default 3")
    growth.add_argument("--points", type=int, default=5, help="of each axis, the smallest first; default 5: all")
    cluster = kind("cluster", "bench/cluster.json")
    cluster.add_argument("--steps", type=int, default=8, help="steps that are counted of each run; default 8")
    cluster.add_argument("--rounds", type=int, default=2, help="turns that each run takes; default 2")
    transport = kind("transport", "bench/transport.json")
    transport.add_argument("--sizes", default="1,16,64,256", help="payloads in MiB; default 1,16,64,256")
    transport.add_argument("--repeats", type=int, default=20, help="measurements, in turns with memcpy; default 20")


def run_bench(options: argparse.Namespace) -> None:
    """Start the measurement that the options name.

    Raises RunError, before it, where nothing could draw its plots, or where a folder has its file's name.
    """
    if options.measurement in DRAWN and find_spec("matplotlib") is None:
        raise RunError(f"bench {options.measurement}: matplotlib is not installed. Run `make install-dev`.")
    if options.measurement not in INTO_FOLDERS and options.out.is_dir():
        raise RunError(f"--out: {options.out} is a folder. Write the name of a file.")
    if options.measurement == "losses":
        from deltakd.bench import losses

        sizes = {key: getattr(options, key) for key in ("tokens", "hidden", "teacher_hidden", "vocab", "device")}
        template = Case("deltakd", **sizes, chunk_tokens=options.chunk_tokens, repeats=options.repeats)
        losses.bench(template, options.dtypes.split(","), options.only.split(","), options.out)
        return
    if options.measurement in ("variants", "payloads"):
        _run_of_recipe(options)
        return
    if options.measurement == "methods":
        _run_methods(options)
        return
    if options.measurement in ("growth", "cluster", "pictures"):
        _run_alone(options)
        return
    if options.measurement == "step":
        from deltakd.bench import step

        arms, out, seed = options.arms.split(","), options.out, options.seed
        step.bench(options.shape, options.data, arms, options.steps, options.rounds, options.peak_tflops, out, seed)
        return
    if options.measurement == "rollouts":
        from deltakd.bench import rollouts

        turns = rollouts.Turns(*(getattr(options, field.name) for field in fields(rollouts.Turns)))
        rollouts.bench(options.shape, turns, options.out)
        return
    if options.measurement == "transport":
        from deltakd.bench import transport

        transport.bench([int(size) for size in options.sizes.split(",")], options.repeats, options.out)


def _run_alone(options: argparse.Namespace) -> None:
    if options.measurement == "growth":
        from deltakd.bench import growth

        growth.bench(options.steps, options.out, options.points)
    elif options.measurement == "cluster":
        from deltakd.bench import cluster

        cluster.bench(options.steps, options.rounds, options.out)
    else:
        from deltakd.bench import pictures

        pictures.bench(options.out)


def _run_methods(options: argparse.Namespace) -> None:
    from deltakd.bench import methods
    from deltakd.bench.method_plan import default_methods

    given = {"small_chat": options.chat_data, "small_math": options.math_data}
    methods.bench(
        methods.Asked(
            bases=options.bases.split(","),
            methods=options.methods.split(",") if options.methods else default_methods(),
            seeds=_numbers("--seeds", options.seeds),
            steps=_numbers("--steps", options.steps) if options.steps else [],
            jobs=options.jobs,
            engine=options.engine,
            rates=_rates(options.learning_rates) if options.learning_rates else [],
            root=options.root,
            out=options.out,
            data={name: paths or "" for name, paths in given.items()},
            overrides=options.overrides,
        )
    )


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"--learning-rates: {text} are no numbers. Write them by commas: 1e-3,3e-3.") from None


def _run_of_recipe(options: argparse.Namespace) -> None:
    from deltakd.base.processes import use_threads
    from deltakd.recipe.checks import check_every_stage
    from deltakd.recipe.load import load
    from deltakd.recipe.paths import check_paths

    use_threads()
    check_every_stage(options.recipe, options.overrides)
    loaded = load(options.recipe, options.overrides)
    check_paths(loaded.recipe, loaded.where, options.recipe)
    if options.measurement == "variants":
        from deltakd.bench import variants

        names, alphas = options.variants.split(","), [float(alpha) for alpha in options.alphas.split(",")]
        variants.bench(options.recipe, options.overrides, options.steps, names, alphas, options.out)
    else:
        from deltakd.bench import payloads

        payloads.bench(options.recipe, options.overrides, options.out)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise RunError(f"{option}: {text} are no whole numbers. Write them by commas: 1,2,3.") from None
