"""The command line: `python -m deltakd VERB`, or `deltakd VERB` where the package is installed."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deltakd.base.errors import DeltaKDError, PeerLost
from deltakd.base.processes import end_with_launchers
from deltakd.base.supervisor import PULSE
from deltakd.bench.command import add_bench, run_bench
from deltakd.plan.command import add_plan, run_plan
from deltakd.report.command import add_report, run_report
from deltakd.study.command import VERBS, add_study, run_study

if TYPE_CHECKING:
    from deltakd.recipe.supervise import Post

SILENCE_S = 4.0
VERBS_ELSEWHERE = {"bench": run_bench, "plan": run_plan, "report": run_report, **dict.fromkeys(VERBS, run_study)}

EPILOG = """\
A recipe is a name from recipes/ or a path. Any setting can be overridden: `train.steps=100 data.max_tokens=512`.

  python -m deltakd check ultrachat                      print the resolved recipe, or what is wrong with it
  python -m deltakd plan ultrachat --gpus 8xH100         what it takes: memory, time, students and teachers
  python -m deltakd run quickstart                       every stage: raw models, teacher, three students, one table
  python -m deltakd train quickstart --stage forward_kl  one training stage, with the launcher that fits this machine
  python -m deltakd evaluate quickstart --model delta    any models in one table, by one of two protocols
  deepspeed launchers/train.py --recipe ultrachat        the distillation alone, on a node with GPUs
"""


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
        command = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
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
    train = verb("train", "train: the recipe itself or one stage of it, with the launcher that fits this machine")
    train.add_argument("--stage", help="a stage of the recipe's pipeline")
    train.add_argument("--processes", type=int, metavar="N", help="processes; default: one per accelerator")
    train.add_argument("--resume", action="store_true", help="refuse to begin: go on from a checkpoint, or not at all")
    _add_writing_verbs(verb)
    _add_evaluate(verb)
    add_study(verb)
    _add_job_verbs(verbs, verb)
    watch = verbs.add_parser("watch", help="watch a running job: ranks, queues, tokens/s, bytes/s, waiting, restarts")
    watch.add_argument("directory", metavar="RUN", help="a run's directory")
    watch.add_argument("--once", action="store_true", help="print it once")
    serve = verb("serve", "serve the recipe's frozen models as one teacher rank")
    add_teacher_options(serve)
    verbs.add_parser("shard")  # a worker of a teacher in several processes, which starts it; no verb of a user's
    add_bench(verbs)
    add_report(verbs)
    return main


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
    verbs.add_parser("tidy", help="remove what dead runs have left in this node's shared memory")


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


def post(options: argparse.Namespace) -> "Post":
    """Return where a teacher rank stands, from its options."""
    from deltakd.recipe.supervise import Post

    index, device = options.index, options.device or f"cuda:{os.environ.get('SLURM_LOCALID', '0')}"
    if index is None:
        index = int(os.environ.get("SLURM_PROCID", "0"))
    return Post(index, options.students, options.launch, device, options.log, options.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    options = parse(parser(), arguments)
    return guarded(lambda: _dispatch(options))


def parse(command_line: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments with `key.sub=value` overrides before, between or after the options."""
    options, rest = command_line.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        command_line.error(f"unrecognized arguments: {' '.join(unknown)} (a setting is written key.sub=value)")
    options.overrides = [*getattr(options, "overrides", []), *rest]
    return options


def _dispatch(options: argparse.Namespace) -> None:
    if options.verb == "check":
        from deltakd.recipe.checks import check_every_stage
        from deltakd.recipe.load import dump_recipe, load

        check_every_stage(options.recipe, options.overrides)
        print(dump_recipe(load(options.recipe, options.overrides, options.stage).recipe), end="")
    elif options.verb in VERBS_ELSEWHERE:
        VERBS_ELSEWHERE[options.verb](options)
    elif options.verb == "watch":
        from deltakd.recipe.watch import watch

        watch(options.directory, options.once)
    elif options.verb == "cache":
        from deltakd.recipe.caching import cache

        cache(options.recipe, options.overrides, options.stage, options.students)
    elif options.verb == "generate":
        from deltakd.recipe.generating import run

        run(options.recipe, options.overrides, options.stage, options.model, options.processes, options.shard)
    elif options.verb == "evaluate":
        from deltakd.recipe import evaluating

        asked = {name: getattr(options, name) for name in ("protocol", "name", "baseline", "teacher", "shard")}
        asked |= {"to_target": options.target, "num_processes": options.processes}
        typed = evaluating.Request(options.recipe, options.model, options.overrides, **asked)
        evaluating.run(typed)
    elif options.verb in ("compare", "outcome", "stages", "tidy"):
        _dispatch_for_jobs(options)
    elif options.verb == "serve":
        from deltakd.recipe.load import load
        from deltakd.recipe.teachers import serve

        serve(load(options.recipe, options.overrides, options.stage), post(options))
    elif options.verb == "shard":
        from deltakd.teacher.shards import serve_shard

        serve_shard(sys.stdin.buffer)
    else:
        from deltakd.recipe import pipeline

        if options.verb == "run":
            pipeline.run(options.recipe, options.overrides, options.processes, options.stage)
        else:
            pipeline.train(options.recipe, options.overrides, options.stage, options.processes, options.resume)


def _dispatch_for_jobs(options: argparse.Namespace) -> None:
    if options.verb == "compare":
        from deltakd.recipe.evaluation import compare_checkpoints
        from deltakd.recipe.load import load

        print(compare_checkpoints(load(options.recipe, options.overrides), options.run, options.only))
    elif options.verb == "outcome":
        from deltakd.recipe.load import load
        from deltakd.recipe.outcome import outcome

        loaded = load(options.recipe, options.overrides, options.stage)
        print(outcome(loaded, options.job, options.begins, options.most))
    elif options.verb == "tidy":
        from deltakd.base.scratch import SHARED_MEMORY, sweep

        for folder in sweep(SHARED_MEMORY):
            print(f"{folder}: removed")
    elif options.verb == "stages":
        from deltakd.recipe.stages import describe_stages

        print(describe_stages(options.recipe, options.overrides))


def guarded(life: Callable[[], None]) -> int:
    """Live a process's life; a fault that its reader can act on becomes one sentence and exit code 2."""
    end_with_launchers()
    if PULSE in os.environ:  # our supervisor knows when we may leave: a signal to all processes of a job is not for us
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of kernels not ours
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        life()
    except DeltaKDError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        # All ranks of a launch find the same fault in a recipe at once. Rank 0 says it, and its end ends the others; a
        # fault of this rank alone is still said, before those end that only miss it.
        if isinstance(error, PeerLost):
            time.sleep(2 * SILENCE_S)
        elif rank != "0":
            time.sleep(SILENCE_S)
        print(f"deltakd: {error}" if rank == "0" else f"deltakd, rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
