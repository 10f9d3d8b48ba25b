"""Configuration is the object: YAML files and `dotted.key=value` words become frozen pydantic objects.

OmegaConf parses (it reads `1e-3` as a number and refuses a key given twice, PyYAML does neither), pydantic validates.
Ours is what neither has: the merge that replaces a mapping whose `type` changes, the choice of a plug-in class by
`type`, bounds on what a stranger's file may cost (`yaml_text`), numbers that are numbers, paths as people write them,
and errors of one line that say what to do next.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import re
import signal
import sys
from abc import ABC
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Self, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    computed_field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from yaml import YAMLError

from ssl_seg.yaml_text import MAX_CHARACTERS, MAX_DEPTH, check_references, checked

C = TypeVar("C", bound="Config")
RECIPES = "ssl_seg.configs"
NAME = re.compile(r"[a-z][a-z0-9_]*")
# What a text that is no YAML, or none of ours, raises on its way through PyYAML and OmegaConf.
YAML_ERRORS = (YAMLError, OmegaConfBaseException, ValueError, ArithmeticError, RecursionError)
UNION_MEMBER = re.compile(r"(bool|int|float|str|tuple\[.*|list\[.*|literal\[.*|function-.*)")  # pydantic's, in no key
MAX_NUMBER = 2**64  # seeds of 64 bits are in use; no other key wants more


class UserError(Exception):
    """Something the user can mend: one line with what is wrong, where, and what to do next."""

    exit_code = 2  # of the CLI
    of_one_process: bool | None = None  # of several: whether this one tells it; None: the first of each machine does


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved. The CLI exits with 128 + `signum`."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {text}")
        self.signum = signum


def user_path(written: str | Path) -> Path:
    """The path that a person has written, with `~` and `~name` for folders of users: the one home of that.

    Raises UserError with one line for what can be no path here: an empty one, a user that nobody knows, names that the
    system does not take, and folders that may not be looked into. Whether there is anything is for the caller to say.
    """
    shown = _cut(str(written)) if str(written).isprintable() else ascii(_cut(str(written)))
    if not str(written).strip():
        raise UserError("a path is empty; name a file or a folder")
    try:
        path = Path(written).expanduser()
        path.stat()
    except RuntimeError as error:
        raise UserError(f"{shown}: no such user; write the path from / on") from error
    except ValueError as error:  # a zero byte, half of a surrogate pair
        raise UserError(f"{shown}: is no path ({_first_line(error)}); write it anew") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{shown}: cannot be a path here ({error.strerror}); choose another") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"{shown}: cannot be read ({error.strerror}); mend its rights or choose another") from error
        return Path(written).expanduser()
    return path


def _as_written(value: Any) -> Any:
    """Python gives a Path, YAML a number where a folder is called 2024; both mean the text."""
    if isinstance(value, Path) or (isinstance(value, int) and not isinstance(value, bool)):
        value = str(value)
    if isinstance(value, bool | float):
        raise ValueError(f"YAML reads it as {_short(value)}; write the path in quotes")
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; name a file or a folder")
    return value


# A path as it was written, for `user_path` to read where it is used: so a config says the same on another machine.
PathText = Annotated[str, BeforeValidator(_as_written)]


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value or ()


PathTexts = Annotated[tuple[PathText, ...], BeforeValidator(_one_or_several)]  # a single one need not be a list


class Config(BaseModel):
    """A frozen mapping of known keys. `dump()` and `load()` are inverse to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    text = unknown("key", key, cls.model_fields, _one_below(cls, key))
                    raise PydanticCustomError("unknown_key", "{text}", {"text": text})
        return value

    @field_validator("*", mode="wrap")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        taken = handler(value)
        _check_numbers(value, taken)
        return taken

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what `cached_property` remembered: it belongs to the old values."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(vars(copied)) - set(type(copied).model_fields):
            del vars(copied)[name]
        return copied

    def dump(self) -> dict[str, Any]:
        """Plain JSON types, every default written out."""
        return self.model_dump(mode="json", serialize_as_any=True)

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.dump()))


def _check_numbers(given: Any, taken: Any) -> None:
    """Raise ValueError for `true` that was taken for 1, and for numbers that are none or have thousands of digits.

    Infinity is refused here too: where a key takes any value (`options`, a grid) `allow_inf_nan` does not reach it.
    """
    if isinstance(taken, Mapping):
        for key, value in taken.items():
            _check_numbers(given.get(key) if isinstance(given, Mapping) else None, value)
    elif isinstance(taken, list | tuple):
        same = isinstance(given, list | tuple) and len(given) == len(taken)
        for one, value in zip(given if same else [None] * len(taken), taken, strict=True):
            _check_numbers(one, value)
    elif isinstance(taken, int | float) and not isinstance(taken, bool):
        if isinstance(given, bool):
            raise ValueError(f"a number is wanted, not {_short(given)}")
        if isinstance(taken, float) and not math.isfinite(taken):
            raise ValueError(f"a finite number is wanted, not {taken}")
        if isinstance(taken, int) and not -MAX_NUMBER < taken < MAX_NUMBER:
            raise ValueError("a number of 64 bits at most is wanted")


def known_to_0_1(config: Config, dumped: Mapping[str, Any], since: Collection[str]) -> dict[str, Any]:
    """What a config dumps, less those keys `since` version 0.1 that are at their defaults.

    So a run without them is described as then, and is of one group, and of one cell of a study, with runs of then.
    """
    fields = type(config).model_fields

    def is_off(key: str, value: Any) -> bool:
        return fields[key].default in (value, getattr(config, key))  # a tuple is dumped as a list

    return {key: value for key, value in dumped.items() if key not in since or not is_off(key, value)}


class Plugin(Config, ABC):
    """A class chosen by `type`; its fields are its YAML.

    `type` names, in this order: a file in the family's package (`jigsaw` is `pretext/jigsaw.py`) or in one beside it,
    an entry point of the family's group, or a class (in snake_case) of a module given by `--plugin`. In Python one
    passes the object.
    """

    package: ClassVar[str]
    packages_beside: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[str]
    extra_modules: ClassVar[list[ModuleType]] = []  # those given by --plugin, for every family

    @computed_field
    @property
    def type(self) -> str:
        return type(self).plugin_name()

    @classmethod
    def plugin_name(cls) -> str:
        """The word that finds this class again."""
        package, _, file = cls.__module__.rpartition(".")
        if package in (cls.package, *cls.packages_beside) and _plugins_in(
            importlib.import_module(cls.__module__), cls
        ) == [cls]:
            return file
        for point in _points(cls.group, tuple(sys.path)):
            if point.value == f"{cls.__module__}:{cls.__qualname__}":
                return point.name
        return _snake(cls.__name__)

    @classmethod
    def names(cls) -> list[str]:
        """Every `type` there is for this family; imports the family's own files, so it is for messages and lists."""
        packages = [importlib.import_module(package) for package in (cls.package, *cls.packages_beside)]
        files = [f"{own.__name__}.{module.name}" for own in packages for module in pkgutil.iter_modules(own.__path__)]
        modules = [importlib.import_module(file) for file in files] + cls.extra_modules
        plugins = [plugin for module in modules for plugin in _plugins_in(module, cls)]
        found = {plugin.plugin_name() for plugin in plugins if issubclass(plugin, cls) or not inspect.isabstract(cls)}
        return sorted(found | {point.name for point in _points(cls.group, tuple(sys.path)) if _fits(point, cls)})

    @classmethod
    def choose(cls, name: str) -> builtin_type[Self]:
        """The class that `type: name` means. Raises ValueError with the known names."""
        for package in (cls.package, *cls.packages_beside):
            if NAME.fullmatch(name) and importlib.util.find_spec(f"{package}.{name}"):
                found = _plugins_in(importlib.import_module(f"{package}.{name}"), cls)
                if len(found) == 1:
                    return found[0]
        for point in _points(cls.group, tuple(sys.path)):
            if point.name == name:
                return _from_entry_point(point, cls)
        for module in cls.extra_modules:
            for found in _plugins_in(module, cls):
                if _snake(found.__name__) == name:
                    return found
        raise ValueError(unknown("type", name, cls.names()))

    @model_validator(mode="wrap")
    @classmethod
    def _by_type(cls, value: Any, handler: Any) -> Self:
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping):
            return handler(value)
        rest = dict(value)
        name = rest.pop("type", None)
        if name is None:
            if inspect.isabstract(cls) or ABC in cls.__bases__:
                raise ValueError(f"no 'type' given; choose one of: {', '.join(cls.names())}")
            return handler(rest)
        if not isinstance(name, str):
            raise ValueError(f"'type' is a word, not {name!r}; choose one of: {', '.join(cls.names())}")
        if not inspect.isabstract(cls) and name == cls.plugin_name():
            return handler(rest)
        chosen = cls.choose(name)
        if not issubclass(chosen, cls):
            raise ValueError(f"type '{name}' is {chosen.__name__}, and only {cls.__name__} fits here; leave 'type' out")
        return chosen.model_validate(rest)


builtin_type = type  # `Plugin.type` hides the builtin inside the class


def use_plugin(name: str) -> None:
    """Import a module or a .py file so that its plug-in classes can be named by `type` (the CLI's `--plugin`)."""
    try:
        module = _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(
            f"--plugin {name}: cannot be imported ({_first_line(error)}); give a module on the path or a .py file"
        ) from error
    if module not in Plugin.extra_modules:
        Plugin.extra_modules.append(module)


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Merge YAML files, names of shipped recipes and `dotted.key=value` words, later ones over earlier ones."""
    OmegaConf.clear_resolver("oc.env")  # a config from a stranger must not read the environment
    overrides = [word for word in words if not names_file(word)]
    merged: dict[str, Any] = {}
    for file in words:
        if names_file(file):
            merged = merge(merged, _read_yaml(find_recipe(file)))
    for override in overrides:
        merged = merge(merged, _read_override(override))
    try:
        check_references(merged)
        return _plain(OmegaConf.create(merged), resolve=True)
    except YAML_ERRORS as error:
        raise UserError(f"config: {_first_line(error)}; interpolations may name keys of the config only") from error


def names_file(word: str) -> bool:
    """Whether a word of the command line is a file or recipe, and no `key=value`: sweeps have folders called lr=0.1."""
    return "=" not in word or (word.lower().endswith((".yaml", ".yml")) and os.path.isfile(os.path.expanduser(word)))


def load(cls: type[C], words: Sequence[str] | Mapping[str, Any]) -> C:
    """The config object of a stage from its words, or from a plain mapping. Raises UserError with one line."""
    values = words if isinstance(words, Mapping) else read_words(words)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error)) from error


def first_line(error: Exception) -> str:
    """What another library says first, of what may be pages; the kind of error where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong: the key, the value and what to do."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    if parts and UNION_MEMBER.fullmatch(parts[-1]):
        del parts[-1]
    key = ".".join(parts) or "config"
    message = first["msg"].removeprefix("Value error, ")
    others = error.error_count() - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "missing":
        return f"{key}: missing; give it in a YAML file or as {key}=VALUE{more}"
    if first["type"] in ("unknown_key", "value_error"):
        return f"{key}: {message}{more}"
    return f"{key}: {message}, not {_short(first['input'])}{more}"


def merge(base: Mapping[str, Any], over: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping; one whose `type` changes is replaced, for its keys are the type's.

    `at` is where both lie, for the message. Raises UserError where keys would replace a word (`encoder: resnet50`, then
    `encoder.drop_path`): only the class knows which key the word stands for, so it would be lost in silence.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping) and value and not {"type", "name"} & value.keys():
            raise UserError(
                f"{at}{key}: is the word '{old}' and is given the key '{next(iter(value))}' too; write both in one "
                f"mapping, {at}{key}={{type: {old}, ...}} (an encoder's word is its name)"
            )
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _type_changes(key, old, value):
            merged[key] = merge(old, value, f"{at}{key}.")
        else:
            merged[key] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` as `{"train": {"lr": 1}}`; later keys lie over earlier ones as in `merge`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two dumped configs differ, with both values (None where a key is absent)."""
    flat_a, flat_b = flatten(a), flatten(b)
    keys = dict.fromkeys([*flat_a, *flat_b])
    return {key: (flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)}


def find_recipe(name: str) -> Path:
    """A YAML file by its path, or a recipe that ships with the package by its name (`camvid`)."""
    path = user_path(name)
    if path.is_file():
        return path
    if path.exists():  # a pipe would be waited for, a device may have no end
        raise UserError(f"{name}: is no regular file; give a YAML file")
    spec = importlib.util.find_spec(RECIPES)
    places = spec.submodule_search_locations if spec else None
    folders = [Path(folder) for folder in places or ()]
    for folder in folders:
        shipped = folder / f"{name}.yaml"
        if NAME.fullmatch(name) and shipped.is_file():
            return shipped
    known = sorted(file.stem for folder in folders for file in folder.glob("*.yaml"))
    raise UserError(f"{name}: no such file or recipe; give a YAML file, key=value, or one of: {', '.join(known)}")


def _plain(config: object, resolve: bool = False) -> Any:
    """What OmegaConf has read as plain dicts, lists and numbers: a dict where it is a mapping."""
    return OmegaConf.to_container(config, resolve=resolve)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        values = _plain(OmegaConf.load(StringIO(checked(text))))
    except (*YAML_ERRORS, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no mapping of keys; write lines such as 'train: {{steps: 1000}}'")
    return values


def _read_override(word: str) -> dict[str, Any]:
    key, _, value = word.partition("=")
    if not re.fullmatch(r"\w+(\.[\w-]+)*", key) or key.count(".") > MAX_DEPTH:
        raise UserError(f"{_cut(word)}: not a key=value word; write it as train.lr=1e-3")
    try:
        # `init=$RUN` of a variable that is not set is a mistake, and no null, which would be to start from scratch.
        return _plain(OmegaConf.from_dotlist([f"{key}={checked(value)}" if value.strip() else f"{key}=''"]))
    except YAML_ERRORS as error:
        raise UserError(f"{_cut(word)}: the value is not YAML: {_first_line(error)}") from error


def _type_changes(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    # A task's `type` may be left out: then it is the task's name.
    return "type" in new and new["type"] != old.get("type", key)


def _import_file(path: Path) -> ModuleType:
    """The module of a file, executed once; its name holds the path, so two files of one name are two modules."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    name = f"plugin_{path.stem}_{digest[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the file's name ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: pydantic looks annotations up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@cache
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group, of what is installed on `path`: asked for each plug-in of each config."""
    return tuple(entry_points(group=group))


def _plugins_in(module: ModuleType, family: type) -> list[type]:
    """The concrete plug-in classes that a module defines itself (not those it imports)."""
    found = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Plugin)]
    root = _root(family)
    own = [value for value in found if value.__module__ == module.__name__ and issubclass(value, root)]
    return [value for value in own if value is not root and not inspect.isabstract(value)]


def _root(family: type) -> type:
    """The family's abstract base: the topmost class that names its own package."""
    roots = [base for base in family.__mro__ if "package" in vars(base)]
    return roots[-1] if roots else family


def _from_entry_point(point: EntryPoint, family: type) -> type:
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"entry point {point.name} = {point.value} does not load ({_first_line(error)})") from error
    if not (inspect.isclass(found) and issubclass(found, family)):
        raise ValueError(f"entry point {point.name} = {point.value} is no {family.__name__}; name another type")
    return found


def _fits(point: EntryPoint, family: type) -> bool:
    """Whether an entry point may hold a plug-in of the family; a stranger's is listed unseen: its code does not run."""
    if point.value.startswith(f"{family.package}."):
        return issubclass(point.load(), family)
    return True


def _one_below(cls: type[Config], key: Any) -> list[str]:
    """The same key in the mappings of a config, for a person who left their name out: `train.lr` for `lr`."""
    fields = [(name, field.annotation) for name, field in cls.model_fields.items()]
    inner = [(name, own) for name, own in fields if inspect.isclass(own) and issubclass(own, Config)]
    return [f"{name}.{key}" for name, own in inner if key in own.model_fields]


def unknown(what: str, name: Any, known: Iterable[str], meant: Sequence[str] = ()) -> str:
    """What is said of a word that is none of those known, with the nearest, or those that are surely `meant`."""
    close = meant or get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
    return f"unknown {what} '{name}'; {hint}"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(" ".join(lines[:3]), 300)


def _short(value: Any) -> str:
    return _cut(json.dumps(value, default=str))


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
