#!/usr/bin/env python3
"""One teacher rank alone: serves a recipe's frozen models to the student ranks of this node that share its --launch.

python launchers/teacher.py --recipe quickstart --launch mine --students 1
deepspeed launchers/train.py --recipe quickstart --launch mine --external-teachers
"""

import argparse
import sys

from deltakd.__main__ import add_teacher_options, guarded, parse


def main() -> int:
    """Parse the arguments and serve until all students have left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name from recipes/, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the recipe's")
    add_teacher_options(parser)
    options = parse(parser)

    def life() -> None:
        from deltakd.recipe.load import load
        from deltakd.recipe.ranks import serve

        loaded = load(options.recipe, options.overrides, options.stage)
        serve(loaded, options.index, options.students, options.launch, options.device)

    return guarded(life)


if __name__ == "__main__":
    sys.exit(main())
