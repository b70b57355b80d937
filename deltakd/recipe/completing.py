"""What a shell completes: verbs and options by argcomplete, which only this file imports; recipes, stages and settings.

argcomplete asks the program itself at each tab (it sets _ARGCOMPLETE), so that new recipes and settings are known at
once. An answer takes as long as `deltakd check`: a few tenths of a second.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from deltakd.base.errors import DeltaKDError, RunError
from deltakd.recipe.load import load_recipe, recipe_names
from deltakd.recipe.reference import keys


def script(shell: str) -> str:
    """Return what makes a shell ask. Raises RunError if argcomplete is missing."""
    try:
        import argcomplete
    except ImportError as missing:
        raise RunError("completion: argcomplete is not installed. Run `make install`.") from missing
    return str(argcomplete.shellcode(["deltakd"], shell=shell))


def complete(command_line: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process, if it was a shell that asked."""
    import argcomplete

    completers: dict[str, Callable[..., list[str]]] = {
        "recipe": lambda prefix, **_: recipe_names(),
        "overrides": lambda prefix, **_: _settings(prefix),
        "stage": lambda prefix, parsed_args, **_: _stages(parsed_args),
    }
    for action in _actions(command_line):
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(command_line, exclude=["shard"])


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        choices: Any = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        for child in choices.values():
            yield from _actions(child)


def _settings(prefix: str) -> list[str]:
    key, equals, _ = prefix.partition("=")
    known = keys()
    return [f"{key}={value}" for value in known.get(key, [])] if equals else [f"{name}=" for name in known]


def _stages(parsed: argparse.Namespace) -> list[str]:
    try:
        return [stage.name for stage in load_recipe(parsed.recipe).pipeline]
    except (DeltaKDError, AttributeError, TypeError):  # no recipe yet, or a broken one: nothing to offer
        return []
