"""Which weights a run starts from: its own checkpoint, else `init`, else published weights, else random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ssl_seg import rng
from ssl_seg.config import Config, UserError, load
from ssl_seg.data.loading import Samples, loader
from ssl_seg.models import DenseHead, ModelConfig
from ssl_seg.norm.convert import Kind, are_one, convert_norm, has_batch_norm, is_fresh, loads_as
from ssl_seg.norm.layers import FrozenNorm
from ssl_seg.rng import seeded
from ssl_seg.runs.checkpoint import has_checkpoint
from ssl_seg.runs.writer import Run
from ssl_seg.tasks import Task, TaskPlugin
from ssl_seg.terminal import say
from ssl_seg.training.multitask import MultiTask
from ssl_seg.weights.export import read_encoder_info
from ssl_seg.weights.receipt import Receipt

T = TypeVar("T", bound=Task)
Recorded = Mapping[str, Mapping[str, Any]]
NUM_PREPARED = 64  # images of the pool that `prepare` measures: enough for statistics of colours, read in a second


def resolve_model(config: Config, former: Mapping[str, Any] | None = None) -> ModelConfig:
    """The whole network of a stage, from the few keys of `config.model` that may have been given.

    Each part is the config's own, else that of the run taken up again (its config is `former`), else of `init`, else
    the default. Raises UserError for another encoder than that of `init`.
    """
    given = config.model or ModelConfig()
    if former is not None:
        return _lay_on(load(ModelConfig, former["model"]), given)
    info = read_encoder_info(config.init) if config.init else {}
    return _inherit(load(ModelConfig, info["config"]), given, config) if info else given


def _lay_on(base: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The parts of a model that were given, on those of another."""
    return base.model_copy(update={name: getattr(model, name) for name in model.model_fields_set})


def _inherit(exported: ModelConfig, given: ModelConfig, config: Config) -> ModelConfig:
    """What the config has given of the model laid on the model of `init`; another encoder than that is refused."""
    whole = _lay_on(exported, given)
    names = [encoder.dump().get("name") for encoder in (exported.encoder, whole.encoder)]
    types = [encoder.type for encoder in (exported.encoder, whole.encoder)]
    if (names[0] != names[1] or types[0] != types[1]) and not config.init_allow:
        raise UserError(
            f"init: {config.init} holds a {names[0] or types[0]}, and model.encoder asks for {names[1] or types[1]}; "
            "leave model.encoder out to take that of init, or name another init"
        )
    return whole


def build_module(model: ModelConfig, tasks: Mapping[str, Task], seed: int) -> MultiTask:
    """Encoder and heads with first weights that depend on the seed and on each part's name alone."""
    with seeded(rng.fold_in(rng.as_key(seed), "encoder")):
        encoder = model.build_encoder()
    return MultiTask(encoder, model.spec(encoder), tasks, seed)


def start_module(
    config: Config,
    tasks: Mapping[str, Task],
    run: Run | None,
    load: Callable[[MultiTask], dict[str, Receipt]],
    quiet: bool,
) -> tuple[MultiTask, dict[str, Receipt] | None]:
    """The module with its first weights, and receipts for those that `load` has put in from the config's `init`.

    None instead of receipts where `run` has a checkpoint, whose weights are to come.
    """
    resumes = run is not None and has_checkpoint(run.folder)
    model = config.model.without_pretrained() if config.init or resumes else config.model
    if resumes:
        return build_module(model, tasks, config.seed), None
    module = build_module(as_exported(model, config.init), tasks, config.seed)
    with first_weights(module, model, config.init):
        receipts = load(module)
    for receipt in receipts.values():
        say(receipt.summary(), quiet)
    return module, receipts


def as_exported(model: ModelConfig, init: str | None) -> ModelConfig:
    """`model` as the weights of `init` fit it: what is to be converted from batch norm is loaded as batch norm."""
    if init is None:
        return model
    return model.model_copy(update={"norm": loads_as(_norm_of(init), model.norm)})


@contextmanager
def first_weights(module: MultiTask, model: ModelConfig, init: str | None) -> Iterator[None]:
    """Inside, `init` is loaded into a `module` built `as_exported`; after it, the norm layers are those of `model`.

    Raises UserError that names both norms where weights of another norm do not fit, and for an encoder that is to be
    frozen and has no statistics: it would go without normalization.
    """
    exported = model.norm if init is None else _norm_of(init)
    try:
        yield
    except UserError as error:
        if are_one(exported, model.norm) or loads_as(exported, model.norm) != model.norm:
            raise
        raise UserError(
            f"model.norm: {model.norm}, but init was trained with {exported}, which cannot be converted; "
            f"leave model.norm out to go on with {exported} ({error})"
        ) from error
    if loads_as(exported, model.norm) != model.norm:
        decoders = [part.decoder for part in module.heads.modules() if isinstance(part, DenseHead)]
        convertible = [part for part in (module.encoder, *decoders) if has_batch_norm(part)]
        for part in convertible or [module.encoder]:  # which says, where there are none, that nothing can be converted
            convert_norm(part, model.norm)
    frozen = [layer for layer in module.encoder.modules() if isinstance(layer, FrozenNorm)]
    if frozen and all(is_fresh(layer) for layer in frozen):
        raise UserError("model.norm: frozen: a new encoder has no statistics to keep; give init=RUN, or another norm")


def _norm_of(init: str) -> Kind:
    """What the encoder of `init` was exported with; weights of other origin are taken for the architecture's own."""
    return read_encoder_info(init).get("config", {}).get("norm", "keep")


def prepare_tasks(tasks: Mapping[str, TaskPlugin], pool: Samples | None, recorded: Recorded) -> dict[str, TaskPlugin]:
    """The tasks after `prepare`: as the run has recorded them, else measured on a fixed sample of the pool."""
    prepared = {name: recall(task, recorded.get(name)) for name, task in tasks.items()}
    new = {name: task for name, task in tasks.items() if prepared[name] is None}
    if pool is not None and any(type(task).prepare is not TaskPlugin.prepare for task in new.values()):
        draws = [list(range(min(NUM_PREPARED, len(pool.examples))))]
        sample = next(loader(pool, draws, 0)).to(torch.device("cpu")).image
        new = {name: task.prepare(sample) for name, task in new.items()}
    return {name: prepared[name] or new[name] for name in tasks}


def recall(task: T, record: Mapping[str, Any] | None) -> T | None:
    """What a task became by `prepare` in an earlier start of this run; None if the task as given has changed since."""
    if record is None or record["given"] != task.dump():
        return None
    return type(task).model_validate(record["prepared"])


def record_tasks(run: Run, given: Mapping[str, Task], prepared: Mapping[str, Task]) -> None:
    """Write down the tasks for a resumed run."""
    records = {name: {"given": given[name].dump(), "prepared": task.dump()} for name, task in prepared.items()}
    run.write_json("tasks.json", records)
