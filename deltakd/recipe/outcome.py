"""How a run stands, by what it wrote: what a job goes by, since no launcher's exit code proves anything.

srun returns 0 for a step that has lost a node, and the worst of all codes, those that it killed included, for one that
was only asked to stop. `attempts.jsonl` in the run's directory has a line for every life that a job gave it.
"""

from pathlib import Path

from deltakd.base.errors import RunError, Stopped
from deltakd.base.rundir import RunDirectory
from deltakd.recipe.finished import is_finished
from deltakd.recipe.load import Loaded
from deltakd.train.checkpoints import last_kept

ATTEMPTS = "attempts.jsonl"


def outcome(loaded: Loaded, job: str | None, begins: bool, most: int) -> str:
    """Say how the recipe's run stands; with `begins`, note first that `job` gives it another life.

    Raises Stopped if it is not finished and goes on when it is started again, RunError if `most` lives of this job in a
    row have brought it no checkpoint further.
    """
    run = RunDirectory(Path(loaded.recipe.directory))
    if is_finished(run, loaded.recipe):
        return f"{run.path}: finished"
    step, kept = last_kept(run.path)
    if job is not None:
        _refuse_to_stand_still(run, job, step, kept, most)
    if begins:
        run.path.mkdir(parents=True, exist_ok=True)
        run.append(ATTEMPTS, {"job": job, "step": step, "kept": kept})
        return f"{run.path}: goes on from step {step}" if step else f"{run.path}: begins with step 1"
    where = f"goes on from step {step:,}" if step else "begins with step 1"
    raise Stopped(f"{run.path}: not finished; it {where} when it is started again.")


def _refuse_to_stand_still(run: RunDirectory, job: str, step: int, kept: float, most: int) -> None:
    lives = [line["kept"] for line in run.read_lines(ATTEMPTS) if line["job"] == job]
    if lives[-most:] == [kept] * most:
        raise RunError(
            f"{run.path}: {most} lives in a row have brought it no further than step {step:,}. Look at the logs of its "
            "ranks, or write a smaller checkpoints.every_steps; submitted anew, the count begins anew."
        )
