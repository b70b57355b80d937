"""The verb `plan` of the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

SUPERVISED = 0.6


def add_plan(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    command = verb("plan", "say what a training will take of some hardware: memory, time, the split, what binds")
    command.add_argument("--stage", help="a stage of the recipe's pipeline")
    command.add_argument(
        "--gpus",
        metavar="8xH100",
        help="a node's: a number of H100, H200, A100-80, A100-40, L40S, RTX4090 or CPU; default: those of this machine",
    )
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of them; default: 1")
    command.add_argument(
        "--hardware", metavar="FILE", help="accelerators of your own, in the form of deltakd/plan/hardware.yaml"
    )
    command.add_argument(
        "--supervised",
        type=float,
        default=SUPERVISED,
        metavar="SHARE",
        help="of the tokens that is learnt, where the recipe does not settle it; default: 0.6",
    )
    command.add_argument(
        "--document",
        type=int,
        metavar="TOKENS",
        help="of a document, which attention does not look beyond; default: data.max_tokens",
    )
    command.add_argument("--json", metavar="FILE", help="write everything as JSON as well")


def run_plan(options: argparse.Namespace) -> None:
    """Plan, print the tables, write JSON where it was asked for."""
    from deltakd.base.errors import RunError
    from deltakd.base.files import write_json
    from deltakd.plan.plan import plan
    from deltakd.plan.show import show

    planned = plan(
        options.recipe,
        options.overrides,
        options.stage,
        options.gpus,
        options.nodes,
        options.hardware,
        options.supervised,
        options.document,
    )
    show(planned)
    if options.json is not None:
        try:
            write_json(Path(options.json), planned.report())
        except OSError as error:
            raise RunError(f"--json: {options.json} cannot be written ({error.strerror}). Write a path.") from error
