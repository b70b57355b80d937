#!/usr/bin/env python3
"""One process per accelerator: becomes a student rank or a teacher rank of the recipe's training.

    deepspeed launchers/train.py --recipe ultrachat
    deepspeed --num_accelerators 3 launchers/train.py --recipe quickstart teachers.per_node=1

A run that was stopped goes on from its last checkpoint when the same command is typed again. SIGTERM, SIGUSR1 and
Ctrl-C have it finish a micro-batch, write a checkpoint and leave with exit code 75.

With one process the teachers are started beside the student, on its device. With several, the last
`teachers.per_node` local ranks serve and never join the students.
"""

import argparse
import os
import sys

from deltakd.__main__ import guarded
from deltakd.command_line import parse


def main() -> int:
    """Parse the launcher's arguments and live this rank's life."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name from recipes/, or a path")
    parser.add_argument("--stage", help="a training stage of the recipe's pipeline instead of the recipe itself")
    parser.add_argument("--launch", help="name that teachers started elsewhere share with this run")
    parser.add_argument("--resume", action="store_true", help="refuse to begin: go on from a checkpoint, or not at all")
    parser.add_argument("--external-teachers", action="store_true", help="this node's teachers are started elsewhere")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # older launchers pass it; the environment counts
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the recipe's")
    options = parse(parser)

    def life() -> None:
        from deltakd.base.ranks import read_placement
        from deltakd.recipe.load import load
        from deltakd.recipe.ranks import Launch, run_rank

        loaded = load(options.recipe, options.overrides, options.stage)
        run_rank(loaded, Launch(read_placement(os.environ), options.launch, options.external_teachers, options.resume))

    return guarded(life)


if __name__ == "__main__":
    sys.exit(main())
