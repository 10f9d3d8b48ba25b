"""ssl_seg: multi-task self-supervised pretraining for semantic segmentation, with evidence of whether it helps.

The public names, imported when first used: `import ssl_seg` alone costs no torch. The verbs are functions, as are the
commands of `ssl-seg`: `from ssl_seg import PretrainConfig, Options, load, pretrain`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "config": ("Config", "Interrupted", "Plugin", "UserError", "load", "merge", "read_words", "unflatten"),
    "data.augment": ("Augment",),
    "data.loading": ("CenterCrops", "loader"),
    "data.splits": ("Labels",),
    "data.synth": ("synth",),
    "datasets": ("Dataset", "Example"),
    "evidence.compare": ("compare",),
    "metrics": ("ConfusionMatrix", "SegmentationScores"),
    "models": ("Decoder", "DecoderNet", "DenseHead", "Encoder", "EncoderNet", "EncoderSpec", "Features", "ModelConfig"),
    "norm.convert": ("convert_norm", "norm_shares", "recalibrate"),
    "norm.layers": ("SwitchNorm2d",),
    "reports": ("report",),
    "runs.checkpoint": ("load_state",),
    "stages.check": ("Checked", "check"),
    "stages.evaluate": ("EvaluateConfig", "evaluate"),
    "stages.finetune": ("FinetuneConfig", "finetune"),
    "stages.fit": ("open_streams",),
    "stages.gap": ("GapConfig", "gap"),
    "stages.looking": ("load_model",),
    "stages.portrait": ("PortraitConfig", "portrait"),
    "stages.predict": ("PredictConfig", "predict"),
    "stages.pretrain": ("PretrainConfig", "assemble", "pretrain"),
    "stages.probe": ("ProbeConfig", "ProbeRule", "probe"),
    "stages.select": ("SelectConfig", "select"),
    "stages.setup": ("Options",),
    "stages.start": ("find_start",),
    "studies.config": ("StudyConfig",),
    "studies.plan": ("make_plan",),
    "studies.study": ("StudyOptions", "study"),
    "segment": ("Segment",),
    "tasks": ("Batch", "PretextTask", "Task", "TaskPlugin", "View", "partners"),
    "training.config": ("TrainConfig",),
    "training.loop": ("train",),
    "training.multitask": ("MultiTask", "make_views"),
    "training.processes": ("Processes", "keep_freed_memory"),
    "weights.export": ("load_encoder",),
    "weights.forms": ("export",),
    "worlds": ("Scene", "World"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]  # _HOMES is the one list


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ssl_seg' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ssl_seg.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
