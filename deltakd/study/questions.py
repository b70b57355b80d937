"""A study: questions, the worlds in which they are asked, and the settings that answer them. Imports no torch.

recipes/studies/NAME.yaml is read as recipes are: with `extends`, merged key by key, every refusal with its line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

import deltakd
from deltakd.base.errors import RecipeError
from deltakd.base.settings import Settings
from deltakd.recipe.explain import closest, explain
from deltakd.recipe.load import STUDIES, SUFFIXES, read_tree
from deltakd.recipe.marks import Marked, nearest, plain
from deltakd.report.find import CLOSED

NAME = r"^[a-z0-9_]+$"
TAKEN = CLOSED | {"sweeps", "cache"}  # folders that a report does not look into, or that hold something else


class World(Settings):
    """Models and rows that a question is asked about: a recipe and what is changed in it, its stages included."""

    recipe: str
    set: list[str] = Field(default_factory=list, description="key.sub=value, for the stages and for all trainings.")


class Question(Settings):
    """One question: a grid of settings, or methods held against each other, in some worlds."""

    ask: str
    worlds: list[str] = Field(min_length=1)
    sweep: list[str] = Field(default_factory=list, description="What `deltakd sweep` is given: seed=1,2,3 and so on.")
    baseline: str | None = Field(None, description="Of the sweep; the first setting of all by default.")
    methods: list[str] = Field(default_factory=list, description="What `deltakd bench methods` compares instead.")
    learning_rates: list[float] = Field(default_factory=list, description="Of which each method has its best.")
    seeds: list[int] = Field([1, 2, 3], description="Of the methods.")
    steps: int | None = Field(None, gt=0, description="Of the methods' trainings; null: as the recipe says.")

    @model_validator(mode="after")
    def _has_one_way(self) -> "Question":
        if bool(self.sweep) == bool(self.methods):
            raise ValueError("it has both a sweep and methods, or none. Write one of them")
        if (self.learning_rates or self.steps) and not self.methods:
            raise ValueError("learning_rates and steps belong to methods. Write train.steps=... into the sweep")
        return self


class Study(Settings):
    """All questions, in the order in which they are answered."""

    title: str
    set: list[str] = Field(default_factory=list, description="Settings of all worlds.")
    worlds: dict[str, World]
    questions: dict[str, Question]

    @model_validator(mode="after")
    def _knows_its_worlds(self) -> "Study":
        for name in (*self.worlds, *self.questions):
            if re.fullmatch(NAME, name) is None:
                raise ValueError(f"{name!r} is no name of a folder. Write small letters, digits and _ only")
            if name in TAKEN:
                raise ValueError(f"{name} is a folder that runs have for something else. Write another name")
        for name, question in self.questions.items():
            for world in question.worlds:
                if world not in self.worlds:
                    raise ValueError(
                        f"{name} asks in {world}, which is no world here. Write one of {', '.join(self.worlds)}"
                    )
        return self


@dataclass(frozen=True)
class Asking:
    """One question in one world."""

    name: str
    question: Question
    world: str
    recipe: str
    set: Sequence[str]  # of the world
    typed: Sequence[str] = ()  # on the command line, which wins over everything


def study_names() -> list[str]:
    """Name the studies in recipes/studies."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def read_study(name: str) -> Study:
    """Read a study by its name or path. Raises RecipeError with file, line and what to write."""
    tree = read_tree(_find(name))
    try:
        return Study.model_validate(plain(tree))
    except ValidationError as error:
        problems = explain(error, Study, tree, ("extends",))
        places = [(_place(tree, problem.path), ".".join(map(str, problem.path)) or "the study") for problem in problems]
        said = zip(places, problems, strict=True)
        raise RecipeError("\n".join(f"{at}: {key}: {one.what}. {one.todo}." for (at, key), one in said)) from error


def askings(study: Study, only: Sequence[str], typed: Sequence[str] = ()) -> list[Asking]:
    """Return every question in each of its worlds, or `only` some. Raises RecipeError for a name that is none."""
    for name in only:
        if name not in study.questions:
            raise RecipeError(
                f"--only: {name} is no question of this study. Write some of {', '.join(study.questions)}."
            )
    return [
        Asking(name, question, world, study.worlds[world].recipe, [*study.set, *study.worlds[world].set], typed)
        for name, question in study.questions.items()
        if not only or name in only
        for world in question.worlds
    ]


def _folders() -> list[Path]:
    return [Path("recipes") / STUDIES, Path(deltakd.__file__).parents[1] / "recipes" / STUDIES]


def _find(name: str) -> Path:
    if "/" in name or name.endswith(SUFFIXES):
        return Path(name)
    for folder in _folders():
        if (path := folder / f"{name}.yaml").is_file():
            return path
    names = study_names()
    hint = closest(name, names)
    raise RecipeError(f"study {name}: no study has this name. Write {hint or 'a path'} (known: {', '.join(names)}).")


def _place(tree: Marked, path: Sequence[str | int]) -> str:
    return nearest(tree, path)[0].place
