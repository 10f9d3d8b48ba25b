"""ssl_seg: multi-task self-supervised pretraining for semantic segmentation, with evidence of whether it helps.

The public names, imported when first used: `import ssl_seg` alone costs no torch. The stages' functions have the names
of their modules and are imported from there: `from ssl_seg.pretrain import PretrainConfig, pretrain`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "config": ("Config", "Interrupted", "Plugin", "UserError", "load"),
    "data": ("Augment", "Labels"),
    "datasets": ("Dataset", "Example"),
    "evaluate": ("EvaluateConfig", "load_model"),
    "finetune": ("FinetuneConfig",),
    "metrics": ("ConfusionMatrix", "SegmentationScores"),
    "models": ("Decoder", "DecoderNet", "DenseHead", "Encoder", "EncoderNet", "EncoderSpec", "ModelConfig"),
    "norm": ("convert_norm", "norm_shares", "recalibrate"),
    "predict": ("PredictConfig",),
    "pretrain": ("PretrainConfig",),
    "stage": ("Options",),
    "switch_norm": ("SwitchNorm2d",),
    "tasks": ("Batch", "MultiTask", "PretextTask", "Segment", "Task", "View"),
    "train": ("TrainConfig",),
    "weights": ("load_encoder",),
    "worlds": ("Scene", "World"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ssl_seg' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ssl_seg.{_HOME_OF[name]}"), name)
