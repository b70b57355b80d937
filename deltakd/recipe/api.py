"""The Python interface as a page: signatures and docstrings of what others would import, read from the source.

Read with `ast` and never imported: the page is there at once, without torch. What is public in a module is every
function and class whose name has no underscore in front; which modules are listed stands below.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

PACKAGE = Path(__file__).parents[1]
# By room, what is of use without a recipe. Settings are in reference.md; what only a run's own processes say to each
# other (messages, members, heartbeats, shards, records) is no interface and may change with any commit.
MODULES = {
    "losses": ("objectives", "linear", "points", "divergences", "policy", "schedules"),
    "data": ("conversation", "formats", "sources", "tokenise", "examples", "packing", "stream", "tokenizer"),
    "teacher": ("payloads", "references", "client", "server", "cache"),
    "engine": ("protocol", "single", "fsdp2", "deepspeed"),
    "train": ("loop", "step", "validation", "checkpoints", "schedule"),
    "evaluate": ("generate", "cross_entropy", "scores", "answers", "compare", "predictions"),
}
HEAD = """\
# The interface in Python

    python -m deltakd schema --api > docs/api.md

The command made this page from the source. It lists, module by module, what is of use without a recipe. Settings are
in [reference.md](reference.md), how the parts fit in [architecture.md](architecture.md), what the words mean in
[concepts.md](concepts.md), an example that runs in [objectives.md](objectives.md#in-python). Endings of names are
shapes (`hidden_NH`), which each module explains. A method without words does what its class's protocol says.
"""


def markdown() -> str:
    """Return the page."""
    sections = []
    for room, names in MODULES.items():
        tree, _ = _read(PACKAGE / room / "__init__.py")
        about = ast.get_docstring(tree) or ""
        if "\n" in about:  # what the package itself offers
            sections.append(f"## deltakd.{room}\n\n{_prose(about)}\n")
        sections += [_module(f"deltakd.{room}.{name}", *_read(PACKAGE / room / f"{name}.py")) for name in names]
    return "\n".join([HEAD, _contents(), *sections])


def _read(file: Path) -> tuple[ast.Module, list[str]]:
    source = file.read_text()
    return ast.parse(source), source.splitlines()


def _contents() -> str:
    rows = []
    for room, names in MODULES.items():
        tree, _ = _read(PACKAGE / room / "__init__.py")
        about = (ast.get_docstring(tree) or "").partition("\n")[0]
        links = ", ".join(f"[{name}](#deltakd{room}{name})" for name in names)
        rows.append(f"| `deltakd.{room}` | {links} | {_prose(about)} |")
    return "\n".join(["| package | modules | |", "|---|---|---|", *rows, ""])


def _module(name: str, tree: ast.Module, lines: list[str]) -> str:
    parts = [f"## {name}", _prose(ast.get_docstring(tree) or "")]
    for node in _public(tree.body):
        if isinstance(node, ast.ClassDef):
            parts += [f"### {node.name}", _code(_class_head(node, lines)), _text(node), *_methods(node, lines)]
        else:
            parts += [f"### {node.name}", _code(_signature(node, lines)), _text(node)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _text(node: ast.FunctionDef | ast.ClassDef) -> str:
    return _prose(ast.get_docstring(node) or "")


def _prose(text: str) -> str:
    """Return a docstring as Markdown: what is indented or between backticks is code there too, all else as written."""
    lines = [line if line.startswith("    ") else _plain(line) for line in text.split("\n")]
    return "\n".join(lines)


def _plain(line: str) -> str:
    parts = line.split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _signature(node: ast.FunctionDef, lines: list[str]) -> str:
    """Return a function's own lines up to its body, from the first decorator on."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1])).rstrip().removesuffix(":")


def _class_head(node: ast.ClassDef, lines: list[str]) -> str:
    """Return a class's line, its fields with their comments, and how it is made."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[first - 1 : node.body[0].lineno - 1]
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            head += lines[part.lineno - 1 : part.end_lineno]
        if isinstance(part, ast.FunctionDef) and part.name == "__init__" and len(part.args.args) > 1:
            head += ["    " + line for line in _signature(part, lines).split("\n")]
    return "\n".join(head).removesuffix(":")


def _methods(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """Return a list of public methods and properties; what __init__ says of itself comes first."""
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    shown = [_item(part, lines) for part in _public(node.body) if isinstance(part, ast.FunctionDef)]
    return [text for text in map(_text, made) if text] + (["\n".join(shown)] if shown else [])


def _item(node: ast.FunctionDef, lines: list[str]) -> str:
    """Return one method: its signature on one line without self, and what it says."""
    *decorators, signature = _signature(node, lines).split("\ndef ")
    called = " ".join(line.strip() for line in signature.removeprefix("def ").split("\n"))
    called = re.sub(r"\((self|cls)(, )?", "(", called.replace("( ", "(").replace(", )", ")"), count=1)
    if any("property" in decorator for decorator in decorators):
        called = called.replace("() ->", ":")
    called = re.sub(r'"(\w+)"$', r"\1", called)  # a class that names itself
    text = indent(_text(node), "  ").lstrip()
    return f"- `{called}`" + (f": {text}" if text else "")
