"""The words of a command line and the values that they make: files, `key=value` words, options that stand for keys.

Words win over files, a later file over an earlier one. An option stands for a key, and so wins over files too; one that
says something else than a word beside it is refused, for nobody could tell which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ssl_seg.cli import known, meant
from ssl_seg.config import (
    UserError,
    find_recipe,
    flatten,
    merge,
    names_file,
    read_words,
    unflatten,
    use_plugin,
    user_path,
)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="FILE.yaml|key=value ...", help="Config files, later ones over earlier ones; then keys."),
]


Out = Annotated[Path | None, typer.Option("--out", parser=user_path, metavar="PATH", help="The run's folder.")]


Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE", help="A module or .py file with plug-ins.")
]


Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]


Images = Annotated[str | None, typer.Option("--images", metavar="FOLDER", help="The images.")]


Masks = Annotated[
    str | None,
    typer.Option("--masks", metavar="FOLDER", help="Their masks; or a pattern such as 'masks/{name}_mask.png'."),
]


Classes = Annotated[
    str | None, typer.Option("--classes", metavar="A,B", help="Names of the classes, in the order of their ids.")
]


class Option(NamedTuple):
    """An option of a command that stands for keys: as it is written, the key, and its value."""

    flag: str
    key: str
    value: Any


def read(
    stage: str, words: Sequence[str] | None, plugins: Sequence[str] | None = None, options: Sequence[Option] = ()
) -> dict[str, Any]:
    """The values of files, words and options; what is wrong with them is told before a heavy library is imported."""
    given = list(words or ())
    meant.check_words(stage, given)
    for word in given:
        if names_file(word):
            _check_file(stage, word)
    for plugin in plugins or ():
        use_plugin(plugin)
    values = read_words(given)
    meant.check_keys(stage, values)
    known.check_keys(stage, values)
    typed = [word.partition("=")[0] for word in given if not names_file(word)]
    for option in options:
        values = _laid(values, option, typed)
    return values


def needed(out: Path | None) -> Path:
    """The folder that a command writes."""
    if out is None:
        raise UserError("--out: missing; name the folder to write, such as --out runs/first")
    return out


def labelled_options(part: str, images: str | None, masks: str | None, classes: str | None) -> list[Option]:
    """What --images, --masks and --classes say of a part of `data`; a folder with images/ and masks/ says both."""
    folders = [] if images is None or masks is not None else both_in(images)
    if folders:
        images, masks = folders[0], None if part == "pool" else folders[1]
    return [
        *([Option("--images", f"data.{part}", {"images": images})] if images is not None else ()),
        *([Option("--masks", f"data.{part}", {"masks": masks})] if masks is not None else ()),
        *([Option("--classes", f"data.{part}", {"classes": names_of(classes)})] if classes is not None else ()),
    ]


def both_in(folder: str) -> list[str]:
    """The folders images/ and masks/ in a folder; none where it has not both."""
    both = [str(Path(folder, name)) for name in ("images", "masks")]
    return both if all(user_path(path).is_dir() for path in both) else []


def names_of(classes: str) -> list[str]:
    """`cell, membrane` as a list."""
    return [name.strip() for name in classes.split(",")]


def is_run(word: str) -> bool:
    """Whether a word of the command line is the folder of a run, or that of its model, or the file of one."""
    if "=" in word:
        return False
    path = user_path(word)
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in ("run.json", "model.json")):
        return True
    return all((path / name).is_file() for name in ("model.safetensors", "config.json"))  # as for the hub


def _check_file(stage: str, word: str) -> None:
    """Raise UserError for what is no config file; of a folder it is known what is meant."""
    if not user_path(word).is_dir():
        find_recipe(word)
    elif is_run(word):
        raise UserError(f"{word}: is a run, not a config; write init={word} to start from it")
    elif stage in meant.TRAINING:
        raise UserError(f"{word}: is a folder, not a config; write --images {word}")
    else:
        find_recipe(word)


def _laid(values: Mapping[str, Any], option: Option, typed: Sequence[str]) -> dict[str, Any]:
    """The values with those of an option laid on them. Raises UserError where a word that was typed says otherwise."""
    said = flatten({option.key: option.value})
    given = flatten(values)
    for key, value in said.items():
        speaks = any(key == word or key.startswith(f"{word}.") for word in typed)
        if speaks and key in given and _plain(given[key]) != _plain(value):
            raise UserError(
                f"{option.flag} {_shown(value)} and {key}={_shown(given[key])} say different things; keep one of them"
            )
    if isinstance(option.value, Mapping):
        values = _with_folder(values, option)
    return merge(values, unflatten(said))


def _with_folder(values: Mapping[str, Any], option: Option) -> dict[str, Any]:
    """The values in which the data set that an option speaks of is one that knows its keys: a folder unless it does."""
    key = option.key.partition(".")[2]
    data = values.get("data")
    data = dict(data) if isinstance(data, Mapping) else {}
    part = data.get(key)
    takes_images = isinstance(part, Mapping) and ("images" in part or "type" not in part)
    if not takes_images:
        part = {}
    return {**values, "data": {**data, key: {"type": "folder", **(part or {})}}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
