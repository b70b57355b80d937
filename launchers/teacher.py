#!/usr/bin/env python3
"""One teacher rank alone: for the student ranks of this node that share its --launch, or for a run anywhere.

python launchers/teacher.py --recipe quickstart --launch mine --students 1
deepspeed launchers/train.py --recipe quickstart --launch mine --external-teachers

With --run it joins a running job from any node that sees the run's directory, and leaves it without harm:

python launchers/teacher.py --recipe quickstart --run runs/quickstart/alone

With --run and --launch it is a job's own: it waits for the students of that launch, is started again when it dies, and
stays until they have left.
"""

import argparse
import sys

from deltakd.__main__ import guarded, post
from deltakd.command_line import add_teacher_options, parse


def main() -> int:
    """Parse the arguments and serve until all students have left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name from recipes/, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the recipe's")
    add_teacher_options(parser)
    options = parse(parser)

    def life() -> None:
        from deltakd.recipe.load import load
        from deltakd.recipe.supervise import supervise

        loaded = load(options.recipe, options.overrides, options.stage)
        if options.launch or not options.run:
            supervise(loaded, post(options))
            return
        from deltakd.recipe.teachers import serve

        serve(loaded, post(options))  # it may come and go: whoever started it may start it again

    return guarded(life)


if __name__ == "__main__":
    sys.exit(main())
