"""The life of a student rank: it claims the run, checks, opens the service, trains, and exports."""

from contextlib import ExitStack
from pathlib import Path

from deltakd.base.processes import launch_identity, use_threads
from deltakd.base.ranks import Role
from deltakd.base.rundir import RunDirectory
from deltakd.recipe.build import build_parts, read_examples, read_inputs
from deltakd.recipe.checks import check_paths
from deltakd.recipe.finished import identities, is_finished
from deltakd.recipe.load import Loaded, dump_recipe
from deltakd.recipe.teachers import open_service
from deltakd.train.loop import train
from deltakd.train.records import Records


def student(loaded: Loaded, role: Role, launch_name: str | None) -> None:
    """Train: claim the directory, check, start teachers if they are ours to start, join, train, export."""
    use_threads()
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    with ExitStack() as stack:
        if role.rank == 0:
            stack.enter_context(run.claim())
        if is_finished(run, recipe):
            if role.rank == 0:
                print(f"{run.path}: finished; nothing to do. Remove the folder to train again.", flush=True)
            return
        check_paths(recipe, loaded.where, Path(recipe.root).name)
        inputs = read_inputs(recipe, loaded.where)
        examples = read_examples(recipe, inputs.tokenizer, progress=role.rank == 0)
        if role.rank == 0:
            print(f"{run.path}: {examples.counts.describe()}", flush=True)
            run.start(dump_recipe(recipe), {"seed": recipe.seed, "data": vars(examples.counts)})
        launch = launch_name or launch_identity(run.path)
        service = open_service(loaded, run, inputs, role, launch, stack) if role.num_local_teachers else None
        if role.rank == 0 and inputs.frozen:
            print(f"references: {inputs.why}", flush=True)
        parts = build_parts(inputs, examples, role, service)
        beside = list(inputs.frozen) if recipe.references.source == "in_process" else []
        heads = list(inputs.frozen) if not beside and inputs.spec.kind == "hidden" else []
        run.record_process("student", role.rank, parts.engine.device, ["student", *beside], heads)
        parts.world.barrier()
        if role.rank == 0:
            records = stack.enter_context(Records(run, recipe.records, recipe.run, recipe.train.steps))
            last = train(parts, records.write)
        else:
            last = train(parts, lambda record: None)
        if role.rank == 0 and (short := parts.references.shortage()):
            print(short, flush=True)
        parts.engine.save(run.export, inputs.tokenizer)
        if role.rank == 0:
            run.finish({"steps": last.step, "loss": last.loss, "inputs": identities(inputs)})
            print(f"{run.path}: finished after {last.step} steps; the model lies in {run.export}", flush=True)
