"""Every key that a config may have is listed with what it means, and with the default that it has."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import yaml
from pydantic import Field

from ssl_seg import FinetuneConfig, PretrainConfig, load
from ssl_seg.cli.looking import CONFIGS, config_of
from ssl_seg.config import Config, Plugin, UserError
from ssl_seg.datasets import Dataset
from ssl_seg.keys import BELOW, REQUIRED, Key, keys_of
from ssl_seg.models import Decoder, Encoder
from ssl_seg.tasks import TaskPlugin
from ssl_seg.worlds import World
from tests.small import POOL

FAMILIES = (Dataset, Encoder, Decoder, TaskPlugin, World)


class Inner(Config):
    """What is inside."""

    side: int = 2  # of the square


class Outer(Config):
    # Above it,
    # in two lines.
    first: float = Field(default=0.5, gt=0, le=1)
    second: tuple[str, ...] = ()

    third: int | None = None  # behind it
    inner: Inner = Inner(side=3)


def test_a_key_has_its_comment_its_type_and_the_default_that_stands_there() -> None:
    group = "Above it, in two lines."
    assert keys_of(Outer) == [
        Key("first", "first", "number above 0 and up to 1", "0.5", group),
        Key("second", "second", "list of text", "[]", group),
        Key("third", "third", "whole number or null", "null", "behind it"),
        Key("inner", "inner", "mapping", BELOW, "What is inside."),
        Key("inner.side", "inner.side", "whole number", "3", "of the square"),
    ]


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_key_of_a_stage_has_a_meaning(stage: str) -> None:
    assert [key.name for key in keys_of(config_of(stage)) if not key.meaning] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_option_of_a_plugin_has_a_meaning(family: type[Plugin]) -> None:
    chosen = {name: family.choose(name) for name in family.names()}
    ours = {name: own for name, own in chosen.items() if own.__module__.split(".")[0] in ("ssl_seg", "pretext")}
    assert len(ours) >= 3
    assert [f"{name}.{key.name}" for name, own in ours.items() for key in keys_of(own) if not key.meaning] == []


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (FinetuneConfig, {"data": {"labelled": POOL}, "model": {}}),
        (PretrainConfig, {"data": {"pool": POOL}, "tasks": {"denoise": {}}}),
    ],
)
def test_the_defaults_are_those_of_the_config(config: type[Config], given: dict[str, Any]) -> None:
    made = load(config, given)
    said = {key.name: key.default for key in keys_of(config) if key.default not in (REQUIRED, BELOW)}
    compared = 0
    for name, default in said.items():
        value = reduce(lambda own, part: getattr(own, part, None), name.split("."), made)
        if isinstance(value, Config) or name.startswith(("probe.", "segment.class_weights.")) or name == "model":
            continue
        compared += 1
        assert yaml.safe_load(default) == (list(value) if isinstance(value, tuple) else value), name
    assert compared > 60


def test_a_pattern_names_keys() -> None:
    def names(pattern: str) -> list[str]:
        return [key.name for key in keys_of(FinetuneConfig, pattern)]

    assert names("train.lr") == ["train.lr"]
    assert names("stop") == ["stop", "stop.patience", "stop.target", "stop.metric"]
    assert "tasks.denoise.sigma" in names("tasks.denoise")
    assert names("data.labelled.folder")[:2] == ["data.labelled.images", "data.labelled.masks"]
    assert "model.decoder.aspp" in names("model.decoder.segnet")
    assert names("*_every") == ["train.eval_every", "train.save_every", "train.log_every"]
    assert "labels.names" in names("ssl-seg select")
    assert "train.balance.alpha" in names("train.balance.gradnorm")
    with pytest.raises(UserError, match=r"^train.step: no key|^trian.lr: no key is called so; did you mean train.lr\?"):
        keys_of(FinetuneConfig, "trian.lr")
