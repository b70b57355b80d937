"""The words of the command line: verbs, their options, and an example of each. Imports nothing heavy.

What a verb does when it is called: `__main__.py`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltakd.base.scratch import SHARED_MEMORY
from deltakd.bench.command import add_bench
from deltakd.plan.command import add_plan
from deltakd.report.command import add_report
from deltakd.study.command import add_study

EPILOG = """\
A recipe is a name from recipes/ or a path. Any setting can be overridden: `train.steps=100 data.max_tokens=512`.

  python -m deltakd check ultrachat                      print the resolved recipe, or what is wrong with it
  python -m deltakd plan ultrachat --gpus 8xH100         what it takes: memory, time, students and teachers
  python -m deltakd run quickstart                       every stage: raw models, teacher, three students, one table
  python -m deltakd train quickstart --stage forward_kl  one training stage, with the launcher that fits this machine
  python -m deltakd evaluate quickstart --model delta    any models in one table, by one of two protocols
  deepspeed launchers/train.py --recipe ultrachat        the distillation alone, on a node with GPUs
  python -m deltakd doctor                               whether this machine can carry a run, before one is started
"""

EXAMPLES = {
    "check": "check ultrachat train.steps=100",
    "plan": "plan ultrachat --gpus 8xH100 --nodes 2",
    "run": "run quickstart --stage evaluation",
    "train": "train quickstart --stage sft train.steps=50",
    "cache": "cache quickstart --students 2",
    "generate": "generate quickstart --model teacher generation.num_prompts=100",
    "stages": "stages ultrachat",
    "evaluate": "evaluate quickstart --model delta",
    "sweep": "sweep quickstart objective.target.alpha=0,0.5 seed=1,2,3",
    "study": "study delta_small --rows small_math=math_train.jsonl.gz --jobs 2",
    "target": "target quickstart --temperatures 1,2",
    "push": "push runs/quickstart/delta --to OWNER/NAME",
    "compare": "compare quickstart --run delta",
    "outcome": "outcome quickstart --stage delta",
    "tidy": "tidy",
    "watch": "watch runs/quickstart/delta --once",
    "serve": "serve ultrachat --run runs/ultrachat/delta --device cuda:0",
    "doctor": "doctor --json doctor.json",
    "schema": "schema > recipe.schema.json",
    "completion": "completion bash >> ~/.bash_completion",
    "bench": "bench step --steps 8",
    "report": "report runs/quickstart --out report.html",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    main = argparse.ArgumentParser(
        prog="deltakd",
        description="Distil a small language model from a large one by the shift that fine-tuning put into it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        command = _add(verbs, name, text)
        command.add_argument("recipe", help="a name from recipes/, or a path")
        command.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that win over the recipe's"
        )
        return command

    check = verb("check", "print the resolved recipe, or say what is wrong with it")
    check.add_argument("--stage", help="the recipe as this stage of its pipeline runs it")
    add_plan(verb)
    run = verb("run", "run every stage of the recipe's pipeline that is not finished")
    run.add_argument("--stage", help="this stage alone")
    run.add_argument(
        "--processes", type=int, metavar="N", help="processes per training stage; default: one per accelerator"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="with tiny random models of the same architectures instead: three steps of the recipe's own training (or "
        "of --stage's) through the real processes, a resume, an evaluation and a report, on any machine, in minutes",
    )
    train = verb("train", "train: the recipe itself or one stage of it, with the launcher that fits this machine")
    train.add_argument("--stage", help="a stage of the recipe's pipeline")
    train.add_argument("--processes", type=int, metavar="N", help="processes; default: one per accelerator")
    train.add_argument("--resume", action="store_true", help="refuse to begin: go on from a checkpoint, or not at all")
    _add_writing_verbs(verb)
    _add_evaluate(verb)
    add_study(verb, lambda name, text: _add(verbs, name, text))
    _add_job_verbs(verbs, verb)
    watch = _add(verbs, "watch", "watch a running job: ranks, queues, tokens/s, bytes/s, waiting, restarts")
    watch.add_argument("directory", metavar="RUN", help="a run's directory")
    watch.add_argument("--once", action="store_true", help="print it once")
    serve = verb("serve", "serve the recipe's frozen models as one teacher rank")
    add_teacher_options(serve)
    verbs.add_parser("shard")  # a worker of a teacher in several processes, which starts it; no verb of a user's
    _add_first_verbs(verbs)
    add_bench(verbs, example("bench"))
    add_report(verbs, example("report"))
    return main


def example(name: str) -> dict[str, Any]:
    """Return what has a verb's help end with its example."""
    epilog = f"Example:\n  python -m deltakd {EXAMPLES[name]}"
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def _add(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", **example(name)
    )
    return command


def _add_first_verbs(verbs: Any) -> None:
    """Add what one asks before any recipe: of the machine, of an editor, of a shell."""
    doctor = _add(verbs, "doctor", "say whether this machine can carry a run; exit code 2 where something is an error")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there as well")
    doctor.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are to lie; default runs")
    doctor.add_argument(
        "--shared-memory", type=Path, default=SHARED_MEMORY, help="where payloads are to lie; default /dev/shm"
    )
    doctor.add_argument("--port", type=int, help="where students are to meet; default MASTER_PORT, or 29500")
    schema = _add(verbs, "schema", "print the JSON schema of recipes, by which editors complete and check them")
    forms = schema.add_mutually_exclusive_group()
    forms.add_argument("--markdown", action="store_true", help="print the reference for people: docs/reference.md")
    forms.add_argument("--api", action="store_true", help="print the interface in Python instead: docs/api.md")
    push = _add(verbs, "push", "upload a finished run's model, tokenizer and card to the hub, with your token")
    push.add_argument("directory", metavar="RUN", help="a run's directory")
    push.add_argument("--to", required=True, metavar="OWNER/NAME", help="the model's id on the hub; made if it is new")
    push.add_argument("--public", action="store_true", help="let anyone see it; default: private")
    completion = _add(verbs, "completion", "print what has a shell complete verbs, recipes and settings")
    completion.add_argument("shell", choices=["bash", "zsh"])


def _add_writing_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add what writes things to train on, before any training."""
    cache = verb("cache", "write what the frozen models say of a training's micro-batches, so that none is needed")
    cache.add_argument("--stage", help="a stage of the recipe's pipeline")
    cache.add_argument(
        "--students", type=int, default=1, metavar="N", help="student ranks that will train; micro-batches depend on it"
    )
    generate = verb(
        "generate",
        "have a model write responses to the prompts of data.train (`generation` says how), as rows to train on",
    )
    generate.add_argument("--model", help="the recipe's model by its role, or a folder or hub id; default: the teacher")
    generate.add_argument("--stage", help="a stage of the recipe's pipeline that generates, with its settings")
    generate.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the work")
    generate.add_argument(
        "--shard",
        metavar="I/N",
        help="write one share alone, on any node that sees root; without it: all that is missing",
    )


def _add_evaluate(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add what scores models."""
    evaluate = verb("evaluate", "score any models on the recipe's held-out rows and print one table of them")
    evaluate.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="[LABEL=]PATH",
        help="a run or its name under root, the folder of a model, or a hub id",
    )
    evaluate.add_argument(
        "--protocol",
        choices=("paper", "minillm"),
        default="paper",
        help="paper: as `evaluation` says, greedy by default; minillm: five seeds at temperature 1; docs/evaluation.md",
    )
    evaluate.add_argument("--baseline", metavar="LABEL", help="what differences are taken to; default: the first model")
    evaluate.add_argument(
        "--teacher",
        metavar="LABEL|PATH|none",
        help="whom KL and the retained share speak of; default: the recipe's, if its folder is there",
    )
    evaluate.add_argument("--target", action="store_true", help="take the KL to the recipe's target as well")
    evaluate.add_argument("--name", help="the folder under ROOT/evaluations; default: the protocol's name")
    evaluate.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the work")
    evaluate.add_argument(
        "--shard",
        metavar="I/N",
        help="take one share alone, on any node that sees root; without it: all, and the table",
    )


def _add_job_verbs(verbs: Any, verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add what job scripts ask: slurm/job.sh and slurm/submit.sh."""
    verb("stages", "list the stages of the recipe's pipeline, what each makes and which it needs")
    compare = verb("compare", "score the models that a run kept with its checkpoints, and print their table")
    compare.add_argument("--run", required=True, metavar="NAME", help="the run's folder under root, as `delta`")
    compare.add_argument("--only", type=int, metavar="N", help="score the Nth alone; the table comes without --only")
    outcome = verb("outcome", "say how a run stands, by what it wrote: exit code 0 finished, 75 goes on, 2 stuck")
    outcome.add_argument("--stage", help="a stage of the recipe's pipeline")
    outcome.add_argument("--job", metavar="ID", help="the job that asks; its lives that brought nothing are counted")
    outcome.add_argument("--begins", action="store_true", help="the job gives the run another life now")
    outcome.add_argument("--most", type=int, default=3, metavar="N", help="lives without progress; default: 3")
    _add(verbs, "tidy", "remove what dead runs have left in this node's shared memory")


def add_teacher_options(command: argparse.ArgumentParser) -> None:
    """Add what a teacher rank must know beside its recipe."""
    command.add_argument("--stage", help="a stage of the recipe's pipeline")
    command.add_argument(
        "--launch", help="name that teachers and students of one run share; default: from the launcher"
    )
    command.add_argument(
        "--index", type=int, help="which teacher rank of this node it is; default: as srun numbers it, or 0"
    )
    command.add_argument(
        "--students", type=int, default=1, help="student ranks of this node; it ends when all have left"
    )
    command.add_argument(
        "--device",
        help="where it computes, first of its GPUs or all: cuda:0,cuda:1; default: by srun's local rank; the CPU where "
        "there is no GPU",
    )
    command.add_argument("--run", metavar="DIR", help="join the run of this directory from any node that sees it")
    command.add_argument("--log", default="the terminal's", help=argparse.SUPPRESS)


def parse(command_line: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments with `key.sub=value` overrides before, between or after the options."""
    options, rest = command_line.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        command_line.error(f"unrecognized arguments: {' '.join(unknown)} (a setting is written key.sub=value)")
    if rest and not hasattr(options, "overrides"):
        command_line.error(f"unrecognized arguments: {' '.join(rest)} (this verb reads no recipe, and no setting)")
    options.overrides = [*getattr(options, "overrides", []), *rest]
    return options
