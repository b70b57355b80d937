"""The life of a student rank: it claims the run, checks, opens the service, trains, and exports."""

import os
from contextlib import ExitStack
from pathlib import Path

from deltakd.base.processes import launch_identity, use_threads
from deltakd.base.ranks import Role
from deltakd.base.rundir import RunDirectory
from deltakd.base.stop import StopRequest
from deltakd.data.examples import ExampleSet
from deltakd.engine.join import among_peers
from deltakd.models.load import choose_attention
from deltakd.recipe.build import build_parts, facts_of_run, meet
from deltakd.recipe.card import write_card
from deltakd.recipe.finished import find_checkpoint, is_finished
from deltakd.recipe.inputs import Inputs, read_examples, read_inputs
from deltakd.recipe.load import Loaded, dump_recipe
from deltakd.recipe.paths import check_paths
from deltakd.recipe.teachers import open_service
from deltakd.train.checkpoints import Saved, agree
from deltakd.train.loop import TrainParts, train
from deltakd.train.records import Records

CLAIM_S = 300.0


def student(loaded: Loaded, role: Role, launch_name: str | None, resume: bool = False) -> None:
    """Train: claim the directory, check, start teachers if they are ours to start, join, train, export.

    With `resume` it must go on from a checkpoint; otherwise it does if there is one.
    """
    use_threads()
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    with ExitStack() as stack:
        if role.rank == 0:
            # A node that was lost may hold the claim a while longer than it lives, on a disk that others see as well.
            stack.enter_context(run.claim(CLAIM_S if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else 0))
        if is_finished(run, recipe):
            if role.rank == 0:
                print(f"{run.path}: finished; nothing to do. Remove the folder to train again.", flush=True)
            return
        say = None if role.rank == 0 else (lambda text: None)
        stop = stack.enter_context(StopRequest(recipe.checkpoints.grace_s, say))
        check_paths(recipe, loaded.where, Path(recipe.root).name)
        inputs = read_inputs(recipe, loaded.where)
        examples = read_examples(recipe, inputs.tokenizer, progress=role.rank == 0)
        chosen = _begin(run, inputs, examples, resume) if role.rank == 0 else None
        # Rank 0 holds the directory when all have met: of a launch that is refused, no other rank writes into it.
        world = meet(recipe, role)
        stack.enter_context(among_peers())
        saved = agree(world, chosen, run.path)
        launch = launch_name or launch_identity(run.path)
        service = None
        if role.num_local_teachers:
            service = open_service(loaded, run, inputs, role, launch, stack, lambda: stop.reason)
        if role.rank == 0:
            print("attention: {} ({})".format(*choose_attention(recipe.models)), flush=True)
            print(f"references: {inputs.why if inputs.frozen else 'none'}", flush=True)
        parts = build_parts(inputs, examples, role, world, service, run, saved, lambda: stop.reason)
        beside = list(inputs.frozen) if recipe.references.source == "in_process" else []
        heads = list(inputs.frozen) if not beside and inputs.spec.kind == "hidden" else []
        run.record_process("student", role.rank, parts.engine.device, ["student", *beside], heads)
        parts.world.barrier()
        records = None
        if role.rank == 0:
            records = stack.enter_context(Records(run, recipe.records, recipe.run, recipe.train.steps, parts.done))
        last_step = train(parts, records)
        if role.rank == 0 and (short := parts.references.shortage()):
            print(short, flush=True)
        _finish(run, inputs, parts, last_step)


def _finish(run: RunDirectory, inputs: Inputs, parts: TrainParts, last_step: int) -> None:
    """Export the model and mark the run as successful."""
    recipe = inputs.recipe
    best = run.best_step if parts.validation is not None else 0  # what lies there: a life before may have found it
    if best > last_step:  # of a life that went further and was told to go less far
        print(f"{run.best}: of step {best}, which this run no longer has; the last model is exported", flush=True)
        best = 0
    takes_best = bool(best) and recipe.validation.export == "best"
    if not takes_best:
        parts.engine.save(run.export, inputs.tokenizer)
    if parts.world.rank != 0:
        return
    if takes_best:
        run.export_best()
    last = run.last_line("steps.jsonl") or {}
    facts = {"steps": last_step, "loss": last.get("loss"), "best_step": best or None, "inputs": inputs.identities}
    write_card(run)
    run.finish(facts | {"exported_step": best if takes_best else last_step})
    early = "" if last_step == recipe.train.steps else f" of {recipe.train.steps}, as validation.stop_after says"
    which = f"the model of step {best}" if takes_best else "the model"
    print(f"{run.path}: finished after {last_step} steps{early}; {which} lies in {run.export}", flush=True)


def _begin(run: RunDirectory, inputs: Inputs, examples: ExampleSet, resume: bool) -> Saved | None:
    """Make the directory ready for its first step, or for the one after the checkpoint that is returned."""
    recipe = inputs.recipe
    print(f"{run.path}: {examples.counts.describe()}", flush=True)
    saved = find_checkpoint(run, recipe, facts_of_run(inputs, examples), resume)
    if saved is not None:
        run.go_on(dump_recipe(recipe), saved.step, saved.validation.get("last_step", saved.step))
    else:
        run.start(dump_recipe(recipe), {"seed": recipe.seed, "data": vars(examples.counts)})
    return saved
