"""Which weights a run starts from: its own checkpoint, else `init`, else published weights, else random ones.

The answer is one `Start`. It is found before the run's folder is opened, and whoever needs to know is handed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Samples, loader
from ssl_seg.images import Range
from ssl_seg.models import RGB, DenseHead, ModelConfig
from ssl_seg.norm.convert import Kind, are_one, convert_norm, has_batch_norm, is_fresh, loads_as
from ssl_seg.norm.layers import FrozenNorm
from ssl_seg.rng import seeded
from ssl_seg.runs.checkpoint import has_checkpoint
from ssl_seg.runs.writer import Run, former_config
from ssl_seg.stages.setup import StageConfig
from ssl_seg.tasks import Stream, Task, TaskPlugin
from ssl_seg.terminal import say
from ssl_seg.training.memory import enough_memory
from ssl_seg.training.multitask import MultiTask
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import exported_config, range_of, read_encoder_info
from ssl_seg.weights.receipt import CONSTANTS, Receipt, match_tensors

COUNTER = "num_batches_tracked"  # of batch norm
T = TypeVar("T", bound=Task)
Recorded = Mapping[str, Mapping[str, Any]]
NUM_PREPARED = 64  # images of the pool that `prepare` measures: enough for statistics of colours, read in a second
MOST_PREPARED = 64 * 1024**2  # pixels of them, a GiB as floats: of larger crops there are fewer


@dataclass(frozen=True)
class Start:
    """What a run begins with. It is found once, at the beginning, and handed on."""

    # checkpoint: the run's own last one; init: the weights that `init` names; published: those of timm.
    kind: Literal["checkpoint", "init", "published", "random"]
    model: ModelConfig  # the whole network
    loaded_norm: Kind  # the norm that the weights of `init` fit; `model.norm` where nothing is loaded from there
    exported_norm: Kind  # the norm that `init` was trained with
    exported_range: Range | None = None  # the values that were black and white there, in images of more than 8 bits
    former: Mapping[str, Any] = field(default_factory=dict)  # the config of the run that is gone on with; else empty


def find_start(config: StageConfig, folder: str | Path | None = None) -> Start:
    """The start of a run with this config; `folder` is its own, where an earlier start may have left something.

    The weights are those of the folder's checkpoint, else of `init`, else published ones, else random. The parts of
    the model are the config's own, else those of the run that is gone on with, else of `init`, else the default.
    Raises UserError for an `init` without weights, and for another encoder than that of `init`.
    """
    given = config.model or ModelConfig()
    former = None if folder is None else former_config(folder)
    resumes = folder is not None and has_checkpoint(folder)
    info = read_encoder_info(config.init) if config.init and not resumes else {}
    exported = exported_config(str(config.init), info) if info else None
    if former is not None:
        own = former.get("model")  # a stranger's run may say anything; another model is refused when it goes on
        model = _lay_on(load(ModelConfig, own if isinstance(own, Mapping) else {}), given)
    elif exported is not None:
        model = _inherit(exported, given, config)
    else:
        model = given
    if resumes or config.init is None:
        kind = "checkpoint" if resumes else "published" if getattr(model.encoder, "pretrained", False) else "random"
        return Start(kind, model, model.norm, model.norm, former=former or {})
    # Weights of another origin are taken for the architecture's own.
    norm = "keep" if exported is None else exported.norm
    return Start("init", model, loads_as(norm, model.norm), norm, range_of(info))


def origins(config: StageConfig, start: Start) -> dict[str, str | None]:
    """Where weights that may have seen images come from, by the key that names them: for the leak guard to ask."""
    brought = {f"tasks.{name}": task.origin for name, task in config.tasks.items() if task.origin}
    if config.init is not None:
        return {"init": config.init, **brought}
    # Of timm's own weights the images are known.
    return {"pretrained": getattr(start.model.encoder, "weights_file", None), **brought}


def _lay_on(base: ModelConfig, model: ModelConfig) -> ModelConfig:
    """What was given of a model, on another: key by key, where encoder or decoder are of the same type."""
    given: dict[str, Any] = {name: getattr(model, name) for name in model.model_fields_set}
    for part in given.keys() & {"encoder", "decoder"}:
        below, own = getattr(base, part), given[part]
        if type(own) is type(below):
            update = {name: getattr(own, name) for name in own.model_fields_set}
            given[part] = below.model_copy(update=update)
    return base.model_copy(update=given)


def _inherit(exported: ModelConfig, given: ModelConfig, config: StageConfig) -> ModelConfig:
    """What the config has given of the model laid on the model of `init`; another encoder than that is refused."""
    whole = _lay_on(exported, given)
    names = [encoder.dump().get("name") for encoder in (exported.encoder, whole.encoder)]
    types = [encoder.type for encoder in (exported.encoder, whole.encoder)]
    if (names[0] != names[1] or types[0] != types[1]) and not config.init_allow:
        holds, asks = (name or type_ for name, type_ in zip(names, types, strict=True))
        if holds == asks:  # one network of timm, by other maps
            holds, asks = (f"{type_} of {name}" for name, type_ in zip(names, types, strict=True))
        raise UserError(
            f"init: {config.init} holds a {holds}, and model.encoder asks for {asks}; "
            "leave model.encoder out to take that of init, or name another init"
        )
    if exported.channels != whole.channels and not config.init_allow:
        raise UserError(
            f"init: {config.init} takes images of {exported.channels} channels, and model.channels asks for "
            f"{whole.channels}; leave model.channels out to take that of init, or name another init"
        )
    return whole


def build_module(model: ModelConfig, tasks: Mapping[str, Task], seed: int) -> MultiTask:
    """Encoder and heads with first weights that depend on the seed and on each part's name alone.

    Raises UserError for a network that is larger than the memory.
    """
    with enough_memory("model", "choose a smaller encoder, or fewer channels of the decoder", torch.device("cpu")):
        with seeded(rng.fold_in(rng.as_key(seed), "encoder")):
            encoder = model.build_encoder()
        return MultiTask(encoder, model.spec(encoder), tasks, seed)


def start_module(
    start: Start,
    tasks: Mapping[str, Task],
    seed: int,
    load: Callable[[MultiTask], dict[str, Receipt]],
    quiet: bool,
) -> tuple[MultiTask, dict[str, Receipt]]:
    """The module with the weights of its start, and a receipt for each part that came from `init` or from a package.

    The weights of a checkpoint are to come: the loop restores them with the rest of its state.
    Raises UserError that names both norms where weights of another norm do not fit, and for an encoder that is to be
    frozen and has no statistics: it would go without normalization.
    """
    model = start.model if start.kind == "published" else start.model.without_pretrained()
    module = build_module(model.model_copy(update={"norm": start.loaded_norm}), tasks, seed)
    if start.kind == "checkpoint":
        return module, {}
    receipts = _loaded(module, start, load) if start.kind == "init" else _published(module, start)
    if start.kind == "published" and model.channels != RGB:
        how = "summed" if model.channels == 1 else f"repeated and scaled by {RGB}/{model.channels}"
        say(
            f"model.channels: {model.channels}: published weights have seen RGB; those of the first layer are {how} "
            "over the colours, as timm does, and mean and std go along",
            quiet,
        )
    frozen = [layer for layer in module.encoder.modules() if isinstance(layer, FrozenNorm)]
    if frozen and all(is_fresh(layer) for layer in frozen):
        raise UserError("model.norm: frozen: a new encoder has no statistics to keep; give init=RUN, or another norm")
    for receipt in receipts.values():
        say(receipt.summary(), quiet)
    return module, receipts


def _published(module: MultiTask, start: Start) -> dict[str, Receipt]:
    """What a package of published weights gave to the encoder, which holds them already."""
    packaged = start.model.encoder.published_tensors() if start.kind == "published" else None
    if packaged is None:
        return {}
    receipt = match_tensors(packaged[0], module.encoder, packaged[1])
    # Mean and std come from timm, and a count of batches changes nothing: no file of another library holds them all.
    receipt.missing = [name for name in receipt.missing if name not in CONSTANTS and not name.endswith(COUNTER)]
    if start.model.channels != RGB:  # the first layer, which has another shape for that alone
        receipt.adapted, receipt.mismatched = receipt.mismatched, {}
    return {"encoder": receipt}


def _loaded(module: MultiTask, start: Start, load: Callable[[MultiTask], dict[str, Receipt]]) -> dict[str, Receipt]:
    """Fill a module whose norm layers are those of `init`, then give it the norm that it is to have."""
    exported, wanted = start.exported_norm, start.model.norm
    try:
        receipts = load(module)
    except UserError as error:
        if are_one(exported, wanted) or start.loaded_norm != wanted:
            raise
        raise UserError(
            f"model.norm: {wanted}, but init was trained with {exported}, which cannot be converted; "
            f"leave model.norm out to go on with {exported} ({error})"
        ) from error
    if start.loaded_norm != wanted:
        decoders = [part.decoder for part in module.heads.modules() if isinstance(part, DenseHead)]
        convertible = [part for part in (module.encoder, *decoders) if has_batch_norm(part)]
        for part in convertible or [module.encoder]:  # which says, where there are none, that nothing can be converted
            convert_norm(part, wanted)
    return receipts


def prepare_tasks(
    tasks: Mapping[str, TaskPlugin],
    sources: Mapping[Stream, Samples],
    recorded: Recorded,
    quiet: bool = True,
    processes: Processes | None = None,
) -> dict[str, TaskPlugin]:
    """The tasks after `prepare`: as the run has recorded them, else measured on a fixed sample of the stream they read.

    What they doubt of the sample is told. All processes take what the first one has measured: another may have other
    weights of a teacher, which then are refused.
    """
    prepared = {name: recall(task, recorded.get(name)) for name, task in tasks.items()}
    new = {name: task for name, task in tasks.items() if prepared[name] is None}
    for stream, samples in sources.items():
        looking = {name: task for name, task in new.items() if _looks(type(task)) and task.streams[0] == stream}
        if not looking:
            continue
        fitting = max(1, MOST_PREPARED // math.prod(samples.augment.crop))
        draws = [list(range(min(NUM_PREPARED, fitting, len(samples.examples))))]
        sample = next(loader(samples, draws)).to(torch.device("cpu")).image
        for name, task in looking.items():
            doubt = task.doubt(sample)
            say(f"tasks.{name}: {doubt}", quiet or not doubt)
        new |= {name: task.prepare(sample) for name, task in looking.items()}
    own = {name: prepared[name] or new[name] for name in tasks}
    if processes is None:
        return own
    first = processes.from_first({name: task.dump() for name, task in own.items()})
    return {name: task if task.dump() == first[name] else load(type(task), first[name]) for name, task in own.items()}


def _looks(kind: type[TaskPlugin]) -> bool:
    """Whether tasks of this class look at a sample of their images."""
    return kind.prepare is not TaskPlugin.prepare or kind.doubt is not TaskPlugin.doubt


def recall(task: T, record: Mapping[str, Any] | None) -> T | None:
    """What a task became by `prepare` in an earlier start of this run; None if the task as given has changed since."""
    if record is None or record["given"] != task.dump():
        return None
    return load(type(task), record["prepared"])


def record_tasks(run: Run, given: Mapping[str, Task], prepared: Mapping[str, Task]) -> None:
    """Write down the tasks for a resumed run."""
    records = {name: {"given": given[name].dump(), "prepared": task.dump()} for name, task in prepared.items()}
    run.write_json("tasks.json", records)
