from __future__ import annotations

import importlib
import inspect
import math
import os
import pkgutil
import re
import sys
from abc import ABC
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, JsonValue, PositiveInt, SerializeAsAny, ValidationError, field_validator

import pretext
import ssl_seg
from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.rotate import Rotate
from ssl_seg import config
from ssl_seg.config import (
    Config,
    PathText,
    Plugin,
    UserError,
    diff,
    explain,
    find_recipe,
    flatten,
    load,
    merge,
    read_words,
    user_path,
)
from ssl_seg.config import use_plugin as use
from ssl_seg.tasks import PretextTask


class Train(Config):
    lr: float = 0.1
    steps: PositiveInt = 10


class Stage(Config):
    train: Train = Train()
    tasks: dict[str, SerializeAsAny[PretextTask]] = Field(default_factory=dict)

    @field_validator("tasks", mode="before")
    @classmethod
    def _named_by_key(cls, value: Any) -> Any:
        """As the pretraining stage does: the key is the type unless one is given, null removes."""
        if not isinstance(value, dict):
            return value
        kept = {name: task for name, task in value.items() if task is not None}
        return {name: {"type": name, **task} if isinstance(task, dict) else task for name, task in kept.items()}


@pytest.fixture
def plugins(monkeypatch):
    """What --plugin adds in a test is gone after it."""
    monkeypatch.setattr(Plugin, "extra_modules", [])
    yield
    for name in ("my_tasks", "installed_tasks"):
        sys.modules.pop(name, None)


def one_line(cls: type[Config], words: list[str] | dict) -> str:
    with pytest.raises(UserError) as caught:
        load(cls, words)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


def yaml(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# Words become values


def test_a_number_in_exponent_form_is_a_number(tmp_path):
    file = yaml(tmp_path, "train:\n  lr: 1e-3\n")
    assert load(Stage, [file]).train.lr == 1e-3
    assert read_words(["train.lr=1e-3"]) == {"train": {"lr": 1e-3}}


def test_words_are_laid_on_files_and_later_ones_win(tmp_path):
    first = yaml(tmp_path, "train: {lr: 1.0, steps: 5}", "a.yaml")
    second = yaml(tmp_path, "train: {lr: 2.0}", "b.yaml")
    assert read_words([first, second]) == {"train": {"lr": 2.0, "steps": 5}}
    assert read_words(["train.lr=4", first, "train.lr=3", second]) == {"train": {"lr": 3, "steps": 5}}


def test_values_are_yaml(tmp_path):
    words = ["a=[1, 2]", "b={x: 1}", "c=null", "d='1'", "e=true", "f=", "g.h.i=x=y"]
    read = read_words(words)
    assert read["a"] == [1, 2]
    assert read["b"] == {"x": 1}
    assert read["c"] is None
    assert read["d"] == "1"
    assert read["e"] is True
    assert read["f"] in ("", None)
    assert read["g"] == {"h": {"i": "x=y"}}


def test_a_value_may_name_another_key(tmp_path):
    file = yaml(tmp_path, "seed: 3\ntrain: {steps: '${seed}'}")
    assert read_words([file])["train"] == {"steps": 3}
    assert read_words([file, "seed=4"])["train"] == {"steps": 4}  # resolved after the merge


def test_the_environment_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    for text in ("name: ${oc.env:SECRET}", "name: '${oc.env:SECRET}'"):
        with pytest.raises(UserError) as caught:
            read_words([yaml(tmp_path, text)])
        assert "canary" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_resolver_reads_files_or_code(tmp_path):
    canary = tmp_path / "canary"
    for text in (f"a: !!python/object/apply:os.mkdir ['{canary}']", f"a: !!python/object/new:os.mkdir ['{canary}']"):
        with pytest.raises(UserError):
            read_words([yaml(tmp_path, text)])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "duplicate"),
        ("a: [1, 2\n", "not readable as YAML"),
        ("- 1\n- 2\n", "holds no mapping"),
        ("3\n", "not readable as YAML"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, text, words):
    file = yaml(tmp_path, text)
    message = one_line(Stage, [file])
    assert file in message
    assert words in message


def test_an_empty_file_holds_nothing(tmp_path):
    assert read_words([yaml(tmp_path, "")]) == {}


def test_bytes_that_are_no_text_are_named_in_one_line(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    assert "image.yaml: not readable as YAML" in one_line(Stage, [str(tmp_path / "image.yaml")])


@pytest.mark.parametrize("word", ["=3", "train..lr=3", ".lr=3", "train.=3", "a b=3", "--lr=3"])
def test_a_word_without_a_key_is_refused(word):
    assert "not a key=value word; write it as train.lr=1e-3" in one_line(Stage, [word])


@pytest.mark.parametrize("word", ["train.lr=[1", "train.lr={a: 1", "train.lr='x"])
def test_a_value_that_is_no_yaml_is_refused(word):
    assert one_line(Stage, [word]).startswith(f"{word}: the value is not YAML")


def test_a_missing_file_names_the_recipes(tmp_path, monkeypatch):
    package = tmp_path / "shipped_recipes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "street.yaml").write_text("train: {steps: 7}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(config, "RECIPES", "shipped_recipes")
    assert find_recipe("street") == package / "street.yaml"
    assert load(Stage, ["street"]).train.steps == 7
    assert one_line(Stage, ["steet"]) == "steet: no such file or recipe; give a YAML file, key=value, or one of: street"
    assert "no such file" in one_line(Stage, ["../shipped_recipes/street"])


# Errors are one line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train": {"lrr": 1}}, "train: unknown key 'lrr'; did you mean 'lr'?"),
        ({"trian": {}}, "config: unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"zzz": 1}}, "train: unknown key 'zzz'; known: lr, steps"),
        ({"train": {"steps": 0}}, "train.steps: Input should be greater than 0, not 0"),
        ({"tasks": {"denois": {}}}, "tasks.denois: unknown type 'denois'; did you mean 'denoise'?"),
        ({"tasks": {"denoise": {"sgima": 1}}}, "tasks.denoise: unknown key 'sgima'; did you mean 'sigma'?"),
        ({"tasks": {"a": {"type": 3}}}, "tasks.a: 'type' is a word, not 3; choose one of:"),
        ({"tasks": {"denoise": {"sigma": [0.3, 0.1]}}}, "tasks.denoise: sigma is [low, high]"),
        ({"tasks": {"denoise": 3}}, "tasks.denoise: "),
    ],
)
def test_an_error_names_key_value_and_what_to_do(values, expected):
    assert one_line(Stage, values).startswith(expected)


def test_a_long_value_is_cut_and_other_errors_are_counted():
    message = one_line(Stage, {"train": {"lr": "x" * 500, "steps": "y"}})
    assert len(message) < 200
    assert "(and 1 more)" in message


def test_a_value_of_several_types_is_named_by_its_key_alone():
    class Either(Config):
        pretrained: bool | str = False

    assert one_line(Either, {"pretrained": [1]}).startswith("pretrained: ")


def test_a_missing_key_says_how_to_give_it():
    class Needs(Config):
        images: str

    assert one_line(Needs, {}) == "images: missing; give it in a YAML file or as images=VALUE"


# Plug-ins


def test_type_finds_the_file_of_that_name():
    task = PretextTask.model_validate({"type": "denoise", "sigma": [0.1, 0.2]})
    assert task == Denoise(sigma=(0.1, 0.2))
    assert task.type == "denoise"
    assert Rotate().type == "rotate"
    assert {"denoise", "inpaint", "rotate"} <= set(PretextTask.names())


def test_an_object_is_taken_as_it_is():
    task = Denoise()
    assert PretextTask.model_validate(task) is task
    assert Stage(tasks={"mine": task}).tasks["mine"] is task


def test_a_family_needs_a_type():
    with pytest.raises(ValueError, match=r"no 'type' given; choose one of: .*denoise"):
        PretextTask.model_validate({})


def test_a_class_takes_its_own_type_and_no_other():
    assert Denoise.model_validate({"type": "denoise"}) == Denoise()
    assert Denoise.model_validate({}) == Denoise()
    with pytest.raises(ValueError, match="type 'rotate' is Rotate, and only Denoise fits here"):
        Denoise.model_validate({"type": "rotate"})


@pytest.mark.parametrize("name", ["__init__", "os", "../denoise", "denoise.x", "Denoise", "", "ssl_seg.tasks"])
def test_type_is_no_way_to_import_something_else(name):
    with pytest.raises(ValueError, match="unknown type"):
        PretextTask.model_validate({"type": name})


@settings(max_examples=50, deadline=None)
@given(
    low=st.floats(0.01, 0.2),
    more=st.floats(0.0, 0.2),
    noise=st.one_of(st.sampled_from(["gaussian", "poisson"]), st.just(["gaussian", "speckle"])),
    mask=st.sampled_from(["squares", "grid"]),
    weight=st.floats(0, 10),
    lr=st.floats(0, 1),
)
def test_load_undoes_dump(low, more, noise, mask, weight, lr):
    tasks = {
        "first": {"type": "denoise", "sigma": [low, low + more], "noise": noise},
        "inpaint": {"mask": mask, "weight": weight},
        "rotate": {},
    }
    stage = load(Stage, {"train": {"lr": lr}, "tasks": tasks})
    assert load(Stage, stage.dump()) == stage
    assert type(load(Stage, stage.dump()).tasks["first"]) is Denoise


def test_load_undoes_to_yaml(tmp_path):
    stage = load(Stage, {"train": {"lr": 1e-5}, "tasks": {"mine": {"type": "inpaint", "outside": 0.5}, "rotate": {}}})
    file = yaml(tmp_path, stage.to_yaml())
    assert load(Stage, [file]) == stage
    assert load(Stage, [file]).dump()["tasks"]["mine"]["type"] == "inpaint"


EXTRA = """
from __future__ import annotations

from typing import Literal

from pretext.denoise import Denoise
from pretext.rotate import Rotate


class UpsideDown(Rotate):
    half: bool = True
    side: Literal["left", "right"] = "left"
"""


@pytest.mark.parametrize("as_file", [True, False])
def test_plugin_names_a_module_or_a_file(tmp_path, monkeypatch, plugins, as_file):
    (tmp_path / "my_tasks.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "upside_down" not in PretextTask.names()
    with pytest.raises(ValueError, match="unknown type 'upside_down'"):
        PretextTask.model_validate({"type": "upside_down"})
    use(str(tmp_path / "my_tasks.py") if as_file else "my_tasks")
    assert "upside_down" in PretextTask.names()
    task = PretextTask.model_validate({"type": "upside_down", "half": False})
    assert type(task).__name__ == "UpsideDown"
    assert task.half is False
    assert PretextTask.model_validate(task.dump()) == task
    assert PretextTask.choose("denoise") is Denoise  # what the module only imports is not its own


def test_the_same_plugin_twice_is_there_once(tmp_path, monkeypatch, plugins):
    (tmp_path / "my_tasks.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(str(tmp_path))
    use("my_tasks")
    use("my_tasks")
    assert [module.__name__ for module in Plugin.extra_modules] == ["my_tasks"]


def test_two_plugin_files_of_one_name_are_both_there(tmp_path, plugins):
    for folder, name in (("a", "First"), ("b", "Second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tasks.py").write_text(EXTRA.replace("UpsideDown", name))
        use(str(tmp_path / folder / "tasks.py"))
    assert {"first", "second"} <= set(PretextTask.names())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module", None),
        ("missing.py", None),
        ("broken.py", "def ("),
        ("a.b..c", None),
        (".a", None),
        ("", None),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_in_one_line(tmp_path, plugins, name, text):
    if name.endswith(".py"):
        name = str(tmp_path / name)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(UserError) as caught:
        use(name)
    assert str(caught.value).startswith(f"--plugin {name}: cannot be imported")
    assert "\n" not in str(caught.value)


def install(folder: Path, point: str, source: str = EXTRA) -> None:
    """What pip leaves behind for a package with one entry point."""
    (folder / "installed_tasks.py").write_text(source)
    info = folder / "installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ssl_seg.pretext]\n{point}\n")


def test_an_entry_point_is_found_and_names_itself_again(tmp_path, monkeypatch, plugins):
    install(tmp_path, "tumble = installed_tasks:UpsideDown")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "tumble" in PretextTask.names()
    assert "installed_tasks" not in sys.modules
    task = PretextTask.model_validate({"type": "tumble"})
    assert task.type == "tumble"
    assert load(Stage, Stage(tasks={"a": task}).dump()).tasks["a"] == task


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("tumble = installed_tasks:EXTRA", "installed_tasks:EXTRA"),
        ("tumble = not_there:Task", "not_there:Task"),
        ("tumble = pathlib:Path", "is no PretextTask"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_named_in_one_line(tmp_path, monkeypatch, plugins, point, words):
    install(tmp_path, point)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert words in one_line(Stage, {"tasks": {"tumble": {}}})


# Merging


def test_a_word_is_not_lost_to_keys_given_beside_it():
    base = {"model": {"encoder": "resnet50", "norm": "keep"}}
    with pytest.raises(UserError, match=r"^model.encoder: is the word 'resnet50' and is given the key 'drop_path'"):
        merge(base, {"model": {"encoder": {"drop_path": 0.1}}})
    for whole in ({"name": "resnet34"}, {"type": "timm", "drop_path": 0.1}, "resnet34", {}):
        assert merge(base, {"model": {"encoder": whole}})["model"]["encoder"] == whole


def test_merge_goes_mapping_by_mapping_and_leaves_its_arguments_alone():
    base, over = {"a": {"x": 1, "y": [1, 2]}, "b": 2}, {"a": {"y": [3]}, "c": None}
    assert merge(base, over) == {"a": {"x": 1, "y": [3]}, "b": 2, "c": None}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 2}
    assert over == {"a": {"y": [3]}, "c": None}


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"d": {"type": "unet", "depth": 3}}, {"d": {"type": "fpn"}}, {"d": {"type": "fpn"}}),
        (
            {"d": {"type": "unet", "depth": 3}},
            {"d": {"type": "unet", "w": 1}},
            {"d": {"type": "unet", "depth": 3, "w": 1}},
        ),
        ({"d": {"type": "unet", "depth": 3}}, {"d": {"w": 1}}, {"d": {"type": "unet", "depth": 3, "w": 1}}),
        ({"rotate": {"weight": 2}}, {"rotate": {"type": "rotate"}}, {"rotate": {"weight": 2, "type": "rotate"}}),
        ({"rotate": {"weight": 2}}, {"rotate": {"type": "denoise"}}, {"rotate": {"type": "denoise"}}),
    ],
)
def test_a_mapping_whose_type_changes_is_replaced(base, over, expected):
    assert merge(base, over) == expected


def test_a_word_that_changes_the_type_drops_the_old_types_keys(tmp_path):
    file = yaml(tmp_path, "tasks: {mine: {type: denoise, sigma: [0.1, 0.2]}}")
    assert load(Stage, [file, "tasks.mine.type=rotate"]).tasks["mine"] == Rotate()
    assert load(Stage, [file, "tasks.mine.noise=speckle"]).tasks["mine"] == Denoise(sigma=(0.1, 0.2), noise="speckle")


def test_null_removes_a_task(tmp_path):
    file = yaml(tmp_path, "tasks:\n  denoise: {sigma: [0.1, 0.2]}\n  inpaint: {}\n")
    assert load(Stage, [file, "tasks.denoise=null"]).tasks == {"inpaint": Inpaint()}
    assert load(Stage, [file, "tasks.denoise=null", "tasks.denoise.weight=2"]).tasks["denoise"] == Denoise(weight=2)


nested = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
mappings = st.dictionaries(st.sampled_from("abc"), nested, max_size=3)


@settings(max_examples=100, deadline=None)
@given(a=mappings, b=mappings)
def test_merging_keeps_what_only_one_side_has_and_is_idempotent(a, b):
    merged = merge(a, b)
    assert merge(merged, b) == merged
    assert merge(a, {}) == a
    assert merge({}, b) == b
    assert set(merged) == set(a) | set(b)


def test_flatten_and_diff_speak_in_dotted_keys():
    a = {"train": {"lr": 1, "betas": [0.9, 0.99]}, "tasks": {}}
    b = {"train": {"lr": 2, "betas": [0.9, 0.99]}, "tasks": {"rotate": {"weight": 1.0}}}
    assert flatten(a) == {"train.lr": 1, "train.betas": [0.9, 0.99], "tasks": {}}
    assert diff(a, b) == {"train.lr": (1, 2), "tasks": ({}, None), "tasks.rotate.weight": (None, 1.0)}
    assert diff(a, a) == {}


def test_config_is_frozen_and_defaults_are_validated():
    with pytest.raises(ValueError, match="frozen"):
        Train().lr = 2.0

    class Wrong(Config):
        steps: PositiveInt = 0

    with pytest.raises(ValueError, match="greater than 0") as caught:
        Wrong()
    assert explain(caught.value).startswith("steps: ")


# Numbers


def every_config() -> list[type[Config]]:
    """Each config class of the framework and of the tasks that ship with it."""
    for package in (ssl_seg, pretext):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # What talks to MLflow has no config of its own, and takes seconds to import.
            if not module.name.endswith("__main__") and not module.name.startswith("ssl_seg.tracking."):
                importlib.import_module(module.name)
    found, left = set(), [Config]
    while left:
        subclasses = left.pop().__subclasses__()
        left += subclasses
        found |= {cls for cls in subclasses if cls.__module__.startswith(("ssl_seg.", "pretext."))}
    whole = [cls for cls in found if not inspect.isabstract(cls) and ABC not in cls.__bases__]
    return sorted(whole, key=lambda cls: (cls.__module__, cls.__qualname__))


def holds_number(kind: Any) -> bool:
    """Whether a number may stand anywhere in a value of this annotation."""
    return kind in (int, float, Any, JsonValue) or any(holds_number(inner) for inner in get_args(kind))


def number_fields() -> list[tuple[type[Config], str, Any]]:
    return [
        (cls, name, field.annotation)
        for cls in every_config()
        for name, field in cls.model_fields.items()
        if holds_number(field.annotation)
    ]


def shaped(kind: Any, value: Any) -> list[Any]:
    """`value` in every place of the annotation that may hold a number; the other places hold what is harmless there."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (int, float, Any, JsonValue):
        return [value]
    if origin is tuple and inner[-1] is not Ellipsis:
        return [
            [place if index == number else 1 for index in range(len(inner))]
            for number, own in enumerate(inner)
            for place in shaped(own, value)
        ]
    if origin in (tuple, list):
        return [[place] for place in shaped(inner[0], value)]
    if origin is dict:
        return [{"key": place} for place in shaped(inner[1], value)]
    return [place for own in inner for place in shaped(own, value)]


def keys_refused(cls: type[Config], values: dict[str, Any]) -> set[str]:
    """The keys that errors name."""
    try:
        cls.model_validate(values)
    except ValidationError as error:
        return {str(found["loc"][0]) if found["loc"] else "" for found in error.errors(include_url=False)}
    return set()


NO_NUMBERS = (math.inf, -math.inf, math.nan, float("1e400"), "inf", "-inf", "nan", "1e400", True, 10**400)


def test_no_key_of_any_config_takes_what_is_no_number() -> None:
    """Infinity, NaN, `true` and endless numbers, in every place of every config that holds a number."""
    assert len(number_fields()) > 60
    for cls, name, kind in number_fields():
        for value in NO_NUMBERS:
            for place in shaped(kind, value):
                if isinstance(value, bool | str) and re.search("Any|JsonValue", str(kind)):
                    continue  # any value is meant to be taken there
                if value is True and "bool" in str(kind):
                    continue
                assert name in keys_refused(cls, {name: place}), (cls.__name__, name, place)


def test_a_number_that_is_none_is_one_line_with_its_key(tmp_path: Path) -> None:
    for word in ("train.lr=.inf", "train.lr=.nan", "train.lr=1e400", "train.lr=true", "train.steps=true"):
        key, _, value = word.partition("=")
        assert one_line(Stage, [word]).startswith(f"{key}: ")
        file = yaml(tmp_path, f"train: {{{key.partition('.')[2]}: {value}}}")
        assert one_line(Stage, [file]).startswith(f"{key}: ")


def test_what_means_a_number_stays_one() -> None:
    class Numbers(Config):
        count: int = 0
        rate: float = 0.0
        on: bool = False

    read = load(Numbers, ["count=1e3", "rate=1e-3", "on=1"])
    assert (read.count, read.rate, read.on) == (1000, 1e-3, True)
    read = load(Numbers, ["count=0123", "rate=3", "on=no"])
    assert (read.count, read.rate, read.on) == (123, 3.0, False)
    assert load(Numbers, [f"count={2**64 - 1}"]).count == 2**64 - 1
    assert load(Numbers, {"count": "7", "rate": "1e-3"}).rate == 1e-3


# What a stranger's file may cost


def doubling(depth: int) -> str:
    lines = [f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]" for level in range(1, depth)]
    return "\n".join(["a0: &a0 [1, 2]", *lines])


HOSTILE = {
    "brackets": "a: " + "[" * 5000 + "]" * 5000,
    "open brackets": "[" * 100_000,
    "steps": "".join(" " * level + f"k{level}:\n" for level in range(900)),
    "a loop": "a: &x [1, *x]",
    "a loop of two": "a: &x {b: &y [*x], c: *y}",
    "doubling lists": doubling(40),
    "doubling keys": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40)),
    "doubling words": "a0: xxxxxxxxxx\n" + "\n".join(f"a{n}: '${{a{n - 1}}}${{a{n - 1}}}'" for n in range(1, 60)),
    "doubling, hidden": "y0: {v: xx}\n"
    + "\n".join(f"z{n}: {{v: '${{y{n - 1}.v}}${{y{n - 1}.v}}'}}\ny{n}: ${{z{n}}}" for n in range(1, 60)),
    "doubling, relative": "a0: xxxxxxxxxx\n" + "\n".join(f"a{n}: '${{.a{n - 1}}}${{.a{n - 1}}}'" for n in range(1, 60)),
    "references in a circle": "a: ${b}\nb: ${a}",
    "a reference to itself": "a: {b: '${a}'}",
    "nested references": "a: '" + "${a" * 3000 + "}" * 3000 + "'",
    "many digits": "seed: " + "9" * 5000,
    "many hexadecimal digits": "seed: 0x" + "f" * 5000,
    "base 60": "seed: 1" + ":10" * 3000,
    "base 60 with a fraction": "seed: 1" + ":10" * 3000 + ".5",
    "a megabyte": "# " + "x" * 2**21,
    "half a pair": 'a: "\\ud800"',
    "two documents": "a: 1\n---\nb: 2",
    "a mapping for a key": "? {a: 1}\n: 2",
    "nothing for a key": "null: 3",
    "a set": "a: !!set {x, y}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_one_short_line(tmp_path: Path, text: str) -> None:
    message = one_line(Stage, [yaml(tmp_path, text)])
    assert len(message) < 500


@pytest.mark.parametrize("value", ["[" * 5000, "&x [*x]", "9" * 5000, "{a: &a [1], b: *c}"])
def test_a_hostile_word_is_refused_in_one_short_line(value: str) -> None:
    assert len(one_line(Stage, [f"train.lr={value}"])) < 500


def test_a_key_of_a_thousand_parts_is_refused() -> None:
    assert "not a key=value word" in one_line(Stage, [f"{'a.' * 5000}a=1"])


def test_aliases_and_references_of_a_usual_size_are_read(tmp_path: Path) -> None:
    text = "base: &b {lr: 0.1}\nx: *b\ny: {<<: *b, steps: 3}\nname: run\n"
    read = read_words([yaml(tmp_path, f"{text}z: 'runs/${{name}}/${{y.steps}}'\nu: {{v: 1, w: '${{.v}}'}}")])
    assert read["y"] == {"lr": 0.1, "steps": 3}
    assert read["z"] == "runs/run/3"
    assert read["u"] == {"v": 1, "w": 1}


def test_what_is_no_regular_file_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, Path("/dev/zero")):
        assert "is no regular file" in one_line(Stage, [str(path)])


# Paths


class Places(Config):
    images: PathText
    init: PathText | None = None


def test_a_path_may_be_a_path_or_a_number(tmp_path: Path) -> None:
    assert load(Places, {"images": tmp_path}).images == str(tmp_path)
    assert load(Places, {"images": tmp_path}).dump()["images"] == str(tmp_path)
    for name in ("0123", "2024", "007", "1:30"):
        assert load(Places, [f"images={name}"]).images == name
        assert load(Places, [yaml(tmp_path, f"images: {name}")]).images == name


@pytest.mark.parametrize("value", ["true", "1e3", "1.50", "''", "' '", ""])
def test_a_path_that_yaml_has_read_as_something_else_is_refused(value: str) -> None:
    assert one_line(Places, [f"images={value}"]).startswith("images: ")
    assert one_line(Places, ["images=a", f"init={value}"]).startswith("init: ")


def test_no_value_is_not_null() -> None:
    """`init=$RUN` of a variable that is not set would be a run from scratch."""
    assert "init: is empty" in one_line(Places, ["images=a", "init="])
    assert load(Places, ["images=a", "init=null"]).init is None


def test_a_user_s_path_is_read_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/b") == tmp_path / "a" / "b"
    assert user_path("a/~b") == Path("a/~b")
    longest = tmp_path / ("x" * 255)
    longest.mkdir()
    assert user_path(longest) == longest


@pytest.mark.parametrize("text", ["", " ", "~nobody_of_that_name/a", "x" * 256, "x/" * 3000, "a\0b", "\ud800"])
def test_what_can_be_no_path_is_one_short_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        user_path(text)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_a_file_in_a_folder_of_a_sweep_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=0.1").mkdir()
    yaml(tmp_path / "lr=0.1", "train: {steps: 5}", "mine.yaml")
    (tmp_path / "train.lr=3").write_text("")  # no YAML by its name: the key is meant
    monkeypatch.chdir(tmp_path)
    assert read_words(["lr=0.1/mine.yaml"]) == {"train": {"steps": 5}}
    assert read_words(["train.lr=3"]) == {"train": {"lr": 3}}
