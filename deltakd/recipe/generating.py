"""`deltakd generate`: a model writes responses to the prompts of data.train, which become rows to train on.

Several processes share the chunks out, and the one that was asked makes a data set of them. A run that was killed goes
on with the chunks that are not there.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltakd.base.errors import RecipeError, RunError
from deltakd.base.files import write_json
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.base.rundir import RunDirectory
from deltakd.data.conversation import Conversation
from deltakd.data.sources import identity as rows_identity
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenizer import load_tokenizer
from deltakd.engine.protocol import device_name
from deltakd.evaluate.generate import Answer, generate
from deltakd.evaluate.responses import CHUNK, ROWS, Counts, Write, gather, num_chunks, there, write_chunks
from deltakd.evaluate.settings import ResponsesSettings
from deltakd.models.load import identity, load_model, resolve
from deltakd.models.settings import WeightsSettings, role_key
from deltakd.models.vocabulary import fingerprint
from deltakd.recipe.held_out import conversations_of
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.schema import Recipe
from deltakd.recipe.shares import follow_shares, local_index, read_share

RULES_VERSION = 1  # raise it when the same question would get other responses
QUESTION = "question.json"


def run(
    name: str, overrides: Sequence[str], stage: str | None, model: str | None, num_processes: int, shard: str | None
) -> None:
    """Live the verb: write all responses with `num_processes` processes, or one `shard` of them, as 0/4."""
    loaded = load(name, overrides)
    settings = _settings(loaded, stage, model)
    folder = Path(loaded.recipe.root) / (stage or f"responses_{settings.model.replace('/', '_').strip('._')}")
    if shard is not None:
        _write_shard(loaded, settings, folder, *read_share(shard))
        return
    command = command_of(name, overrides, stage, settings.model)
    made = make(loaded, settings, folder, num_processes, command, Console(stderr=True))
    print(f"{made}; they lie in {folder / ROWS}")


def command_of(name: str, overrides: Sequence[str], stage: str | None, model: str = "") -> list[str]:
    """Return the command that writes a stage's responses, or those of a model."""
    which = ["--stage", stage] if stage else ["--model", model]
    return [sys.executable, "-m", "deltakd", "generate", name, *overrides, *which]


def _settings(loaded: Loaded, stage: str | None, model: str | None) -> ResponsesSettings:
    settings = ResponsesSettings()
    if stage is not None:
        found = {one.name: one.generate for one in loaded.recipe.pipeline if one.generate is not None}
        if stage not in found:
            known = ", ".join(found) or "none"
            raise RecipeError(f"--stage: {stage} is no stage that generates. Write one of its: {known}.")
        settings = found[stage]
    return settings if model is None else settings.model_copy(update={"model": model})


def make(
    loaded: Loaded,
    settings: ResponsesSettings,
    folder: Path,
    num_processes: int,
    command: Sequence[str],
    console: Console,
) -> str:
    """Write every response that is not there yet, then the data set; returns a line about it.

    `command` writes a shard when `--shard i/n` is added. Raises RunError if the folder holds other responses.
    """
    recipe, directory = loaded.recipe, RunDirectory(folder)
    with directory.claim():
        question = _question(loaded, settings)
        _refuse_another(folder, question)
        if (finished := directory.finished()) is not None:
            return f"{folder.name}: {Counts(**finished['counts']).describe()}, written before"
        write_json(folder / QUESTION, question)
        conversations = _conversations(recipe, settings)
        count = num_chunks(conversations)
        with _bar(console) as bar:
            task = bar.add_task(f"{folder.name}: {settings.model}", total=len(conversations))
            if num_processes == 1:
                write = _writer(loaded, settings, 0)
                _write(loaded, settings, folder, conversations, write, range(count), lambda n: bar.advance(task, n))
            else:

                def show() -> None:
                    done = sum(there(folder, number) for number in range(count))
                    bar.update(task, completed=done * CHUNK)

                follow_shares(command, folder, num_processes, show)
                if missing := [number for number in range(count) if not there(folder, number)]:
                    raise RunError(
                        f"{folder}: {len(missing)} of {count} chunks are not there. Start the same command again."
                    )
            bar.update(task, completed=len(conversations))
        counts = gather(folder, count, recipe.generation.unended)
        if not counts.rows:
            raise RunError(
                f"{folder}: no response is left ({counts.describe()}). Raise max_new_tokens, or keep unended."
            )
        directory.finish({"counts": vars(counts), "question": question, **machine_facts()})
        return f"{folder.name}: {counts.describe()}"


def _write_shard(loaded: Loaded, settings: ResponsesSettings, folder: Path, index: int, count: int) -> None:
    question = _question(loaded, settings)
    _refuse_another(folder, question)
    if not (folder / QUESTION).exists():
        write_json(folder / QUESTION, question)
    conversations = _conversations(loaded.recipe, settings)
    mine = [n for n in range(index, num_chunks(conversations), count) if not there(folder, n)]
    if mine:
        write = _writer(loaded, settings, local_index())
        _write(loaded, settings, folder, conversations, write, mine, lambda _: None)
    print(
        f"{folder}: shard {index}/{count} is written; the same command without --shard makes the data set", flush=True
    )


def _write(
    loaded: Loaded,
    settings: ResponsesSettings,
    folder: Path,
    conversations: Sequence[Conversation],
    write: Write,
    numbers: Sequence[int],
    advance: Callable[[int], object],
) -> None:
    template = ChatTemplate(load_tokenizer(str(_weights(loaded, settings)), loaded.recipe.models.trust_remote_code))
    longest = max(1, loaded.recipe.data.max_tokens - 1)

    def encode(one: Conversation) -> list[int]:
        return template.encode_prompt(one.prompt, one.where)

    write_chunks(folder, conversations, encode, write, loaded.recipe.generation, longest, numbers, advance)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<14}"), BarColumn(bar_width=24), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _weights(loaded: Loaded, settings: ResponsesSettings) -> Path:
    recipe = loaded.recipe
    given = recipe.models.roles.get(settings.model)
    if given is not None:
        return resolve(loaded.where(f"{role_key(settings.model)}.weights"), given)
    return resolve(loaded.where("generation.model"), WeightsSettings(weights=settings.model))


def _writer(loaded: Loaded, settings: ResponsesSettings, local_index: int) -> Write:
    """Return what writes answers: vllm or transformers."""
    recipe, path = loaded.recipe, _weights(loaded, settings)
    tokenizer = load_tokenizer(str(path), recipe.models.trust_remote_code)
    end_id = ChatTemplate(tokenizer).end_of_turn_id
    from deltakd.evaluate import vllm

    sampling = recipe.generation
    if sampling.backend == "vllm" or (sampling.backend == "auto" and vllm.fits()):
        return vllm.writer(path, recipe.models.dtype, tokenizer, end_id, sampling)
    use_threads()
    model = load_model(loaded.where("generation.model"), path, recipe.models).to(device_name(local_index))

    def write(prompts: list[list[int]], seed: int) -> list[Answer]:
        return generate(model, tokenizer, prompts, end_id, sampling.model_copy(update={"seed": seed}))

    return write


def _conversations(recipe: Recipe, settings: ResponsesSettings) -> list[Conversation]:
    return conversations_of(recipe, settings.rows or recipe.data.train, recipe.generation.num_prompts)


def _question(loaded: Loaded, settings: ResponsesSettings) -> dict[str, Any]:
    """Return everything that the responses depend on, and how they were made."""
    recipe, path = loaded.recipe, _weights(loaded, settings)
    tokenizer = load_tokenizer(str(path), recipe.models.trust_remote_code)
    template = hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()
    return {
        "rules": RULES_VERSION,
        "model": str(path),
        "weights": identity(path),
        "dtype": recipe.models.dtype,
        "tokenizer": fingerprint(tokenizer),
        "template": template,
        "prompts": rows_identity(settings.rows or recipe.data.train),
        "data": recipe.data.model_dump(mode="json", include={"format", "max_tokens"}),
        "rows": (settings.rows or recipe.data.train).model_dump(mode="json"),
        "sampling": recipe.generation.model_dump(mode="json"),
    }


def _refuse_another(folder: Path, question: dict[str, Any]) -> None:
    path = folder / QUESTION
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return
    if changed := [key for key in question if stored.get(key) != question[key]]:
        key, before, now = changed[0], stored.get(changed[0]), question[changed[0]]
        if isinstance(before, dict) and isinstance(now, dict):  # what differs in it says more than the whole
            part = next(one for one in {**before, **now} if before.get(one) != now.get(one))
            key, before, now = f"{key}.{part}", before.get(part), now.get(part)
        raise RunError(
            f"{folder}: holds responses to another question ({key}: {before}, now {now}). "
            "Remove the folder, or write root=... for a new place."
        )
