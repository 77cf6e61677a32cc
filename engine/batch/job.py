"""A batch run as a whole: read and checked, then run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.batch.items import Item, fill_in, read_items
from engine.batch.results import ResultFile, check_output
from engine.batch.settings import BatchSettings
from engine.config import TABLES, EngineConfig, EngineSettings
from engine.data import tiny_model_path
from engine.errors import ConfigError, EngineError, RequestError, TokenizerError
from engine.experts.steering import MADE_UP, OWN
from engine.generate.answer import Completion
from engine.models import load_model
from engine.runtime import Engine, Prompts, check_files, read_chat_template, resolve
from engine.synthetic import PREFIX, open_model_file
from engine.tables import read_tables


@dataclass(frozen=True, slots=True)
class Job:
    """A batch run that is ready to go; the model is not loaded yet."""

    config: EngineConfig
    settings: BatchSettings
    items: tuple[Item, ...]
    output: Path


def load_job(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Job:
    """Read a job file and all its input.

    Args:
        path: TOML file with a [batch] table and any of the engine's own. Names of files in it are relative to it.
        overrides: settings by "table.key", which win over the file.

    Raises:
        ConfigError: for a setting or an input file that is wrong, naming the file and the line.
    """
    path = Path(path)
    tables: dict[str, Any] = read_tables(
        TABLES | {BatchSettings.table: BatchSettings}, path, os.environ, overrides or {}
    )
    settings: BatchSettings = tables.pop(BatchSettings.table)
    config = EngineConfig(**tables)
    if config.engine.n_sequences not in {EngineSettings().n_sequences, settings.n_parallel}:
        raise ConfigError(
            f"{path}: engine.n_sequences is {config.engine.n_sequences} and batch.n_parallel is {settings.n_parallel}, "
            "which is the same; leave engine.n_sequences out"
        )
    config = replace(config, engine=replace(config.engine, n_sequences=settings.n_parallel))
    model = config.model
    config = _beside(path.parent, config, overrides or {})
    made_with = [model.path, read_chat_template(config.model), config.engine.kv_type, *model.chat_variables]
    salt = json.dumps([asdict(config.sampling), *made_with])
    items: list[Item] = []
    for source, fields in read_items(settings, path):
        prompt = fill_in(settings, source, fields)
        key = hashlib.sha256(json.dumps([salt, prompt], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        items.append(Item(source, fields, prompt, key[:16]))
    if not items:
        raise ConfigError(f"{path}: the files of batch.input hold no items")
    return Job(config, settings, tuple(items), path.parent / settings.output)


def _beside(folder: Path, config: EngineConfig, overrides: Mapping[str, object]) -> EngineConfig:
    """Return settings whose file names are relative to a folder, but for those of the command line."""

    def name(key: str, given: str) -> str:
        is_file = given and not given.startswith(PREFIX) and key not in overrides
        return os.fspath(folder / given) if is_file else given

    model, moe = config.model, config.moe
    return replace(
        config,
        model=replace(
            model,
            path=name("model.path", model.path),
            chat_template=name("model.chat_template", model.chat_template),
        ),
        moe=replace(
            moe,
            profile=name("moe.profile", moe.profile),
            record_trace=name("moe.record_trace", moe.record_trace),
            routing=moe.routing if moe.routing in {OWN, MADE_UP} else name("moe.routing", moe.routing),
        ),
    )


def check_job(job: Job) -> list[str]:
    """Look at everything that a run needs and that can be looked at before weights are loaded.

    Returns what is wrong with items, a line for each that cannot be answered. Raises `EngineError` for a model, a file
    or an output that cannot be used.
    """
    check_output(job.output, job.items)
    check_files(job.config)
    with closing(open_model_file(job.config.model.path or tiny_model_path())) as model_file:
        spec = load_model(model_file).spec
        context_length = resolve(job.config, spec).engine.context_length
        prompts = Prompts(model_file.metadata, job.config.model, spec.n_vocab)
        found = [(item, _problem(prompts, item, context_length)) for item in job.items]
    return [f"{item.source}: {problem}" for item, problem in found if problem]


def _problem(prompts: Prompts, item: Item, context_length: int) -> str:
    """Return why an item cannot be answered, "" if nothing is known to be wrong."""
    try:
        prompts.checked_ids(item.prompt, context_length)
    except (RequestError, TokenizerError) as error:
        return str(error)
    return ""


def run_job(
    job: Job,
    results: ResultFile,
    engine: Engine,
    on_result: Callable[[Item, Completion | EngineError], object] = lambda _item, _outcome: None,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Answer all items that have no result yet.

    Args:
        job: what to do.
        results: where answers go.
        engine: opened with the job's settings.
        on_result: called with each item and its outcome, after that is on the disk.
        on_step: called after every step of the engine.
    """
    left = [item for item in job.items if item.source not in results.done]
    with closing(engine.generate_many((item.prompt for item in left), on_step=on_step)) as outcomes:
        for index, outcome in outcomes:
            results.append(left[index], outcome)
            on_result(left[index], outcome)
