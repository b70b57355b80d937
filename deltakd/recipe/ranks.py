"""Who a launched process is: a student rank or a teacher rank, decided from its place, before anything is loaded.

What either then does is in `student.py`, `supervise.py` and `teachers.py`. Imports no torch.
"""

from dataclasses import dataclass

from deltakd.base.errors import RunError
from deltakd.base.ranks import Placement, assign_role
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.load import Loaded
from deltakd.recipe.supervise import Post, supervise, wants_service


@dataclass(frozen=True)
class Launch:
    """How this process was started, beyond the recipe."""

    placement: Placement
    identity: str | None = None  # given where teachers and students do not share a launcher
    external_teachers: bool = False  # someone else starts the teachers of this node
    resume: bool = False  # refuse to begin with step 1


def run_rank(loaded: Loaded, launch: Launch) -> None:
    """Live this process's life in the run: train or serve, by its local rank."""
    recipe = loaded.recipe
    num_teachers = recipe.teachers.per_node if wants_service(recipe) else 0
    check_recipe(recipe, loaded.where)
    role = assign_role(launch.placement, num_teachers, launch.external_teachers)
    if recipe.engine.name == "single" and role.num_students > 1:
        raise RunError(
            f"{loaded.where('engine.name')}: single trains in one process, {role.num_students} were started. "
            "Write engine: {name: deepspeed}, or start one."
        )
    if role.kind == "teacher":
        device = f"cuda:{launch.placement.local_rank}"
        supervise(loaded, Post(role.rank, role.num_local_students, launch.identity, device))
        return
    from deltakd.recipe.student import student

    student(loaded, role, launch.identity, launch.resume)
