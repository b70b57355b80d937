"""The command line: `python -m deltakd VERB`, or `deltakd VERB` where the package is installed."""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from deltakd.base.errors import DeltaKDError, PeerLost, RunError
from deltakd.base.processes import end_with_launchers
from deltakd.base.supervisor import PULSE
from deltakd.bench.command import run_bench
from deltakd.command_line import parse, parser
from deltakd.plan.command import run_plan
from deltakd.report.command import run_report
from deltakd.study.command import VERBS, run_study

if TYPE_CHECKING:
    from deltakd.recipe.supervise import Post

SILENCE_S = 4.0
VERBS_ELSEWHERE = {"bench": run_bench, "plan": run_plan, "report": run_report, **dict.fromkeys(VERBS, run_study)}


def post(options: argparse.Namespace) -> "Post":
    """Return where a teacher rank stands, from its options."""
    from deltakd.recipe.supervise import Post

    index, device = options.index, options.device or f"cuda:{os.environ.get('SLURM_LOCALID', '0')}"
    if index is None:
        index = int(os.environ.get("SLURM_PROCID", "0"))
    return Post(index, options.students, options.launch, device, options.log, options.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    command_line = parser()
    if "_ARGCOMPLETE" in os.environ:
        from deltakd.recipe.completing import complete

        complete(command_line)
    options = parse(command_line, arguments)

    def live() -> None:
        _refuse_no_processes(options)
        _dispatch(options)

    return guarded(live)


def _dispatch(options: argparse.Namespace) -> None:
    if options.verb == "check":
        from deltakd.recipe.checks import check_every_stage
        from deltakd.recipe.load import dump_recipe, load

        shared = [override for override in options.overrides if not override.startswith("run=")]
        check_every_stage(options.recipe, shared)  # whose stages are named as they are; the recipe's own run may be any
        print(dump_recipe(load(options.recipe, options.overrides, options.stage).recipe), end="")
    elif options.verb == "doctor":
        from deltakd.doctor.examine import doctor
        from deltakd.doctor.lines import Asked

        doctor(Asked(options.runs, options.shared_memory, options.port), options.json)
    elif options.verb in ("schema", "completion"):
        _dispatch_for_tools(options)
    elif options.verb in VERBS_ELSEWHERE:
        VERBS_ELSEWHERE[options.verb](options)
    elif options.verb == "push":
        from deltakd.recipe.pushing import push

        print(push(options.directory, options.to, not options.public))
    elif options.verb == "watch":
        from deltakd.recipe.watch import watch

        watch(options.directory, options.once)
    elif options.verb in ("cache", "generate", "evaluate"):
        _dispatch_for_models(options)
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

        if options.verb == "run" and options.dry_run:
            from deltakd.dry_run.walk import dry_run

            dry_run(options.recipe, options.overrides, options.stage, options.processes)
        elif options.verb == "run":
            pipeline.run(options.recipe, options.overrides, options.processes, options.stage)
        else:
            pipeline.train(options.recipe, options.overrides, options.stage, options.processes, options.resume)


def _refuse_no_processes(options: argparse.Namespace) -> None:
    processes = getattr(options, "processes", None)
    if processes is not None and processes < 1:
        raise RunError(f"--processes: {processes}. Write 1 or more.")


def _dispatch_for_models(options: argparse.Namespace) -> None:
    if options.verb == "cache":
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


def _dispatch_for_tools(options: argparse.Namespace) -> None:
    if options.verb == "completion":
        from deltakd.recipe.completing import script

        print(script(options.shell), end="")
        return
    if options.api:
        from deltakd.recipe import api

        print(api.markdown(), end="")
        return
    from deltakd.recipe.reference import json_schema, markdown

    print(markdown() if options.markdown else json.dumps(json_schema(), indent=2), end="\n" * (not options.markdown))


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
