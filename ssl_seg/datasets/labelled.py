"""What the data sets that people bring share: where images and masks lie, and what the values in masks mean."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ssl_seg.config import PathText, known_to_0_1, load
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.masks import MAX_STORED, Meaning, class_word, class_words, stored_value
from ssl_seg.images import ChannelsField

StoredId = Annotated[int, Field(ge=0, le=MAX_STORED)]


class Classed(Dataset):
    """Images with masks, or without; `mapping` and `ignore` turn stored values into classes as `masks` says."""

    classes: tuple[str, ...] | int | None = None  # names in the order of their ids, or their number; two at least
    ignore: tuple[StoredId, ...] = ()  # further stored ids that do not count; 255 never does
    mapping: dict[str, int | str] | None = None  # stored ids or '#rrggbb' colours to classes, or to ignore
    # Of an image: 1 is grey, 3 are RGB, others are bands as they are stored. A run takes model.channels for it.
    channels: ChannelsField = 3
    since_0_1: ClassVar[tuple[str, ...]] = ("channels",)  # keys that version 0.1 did not know; a subclass adds its own

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=self.since_0_1)

    @field_validator("classes", mode="before")
    @classmethod
    def _check_classes(cls, value: Any) -> Any:
        return None if value is None else class_words(value)

    @field_validator("mapping", mode="before")
    @classmethod
    def _normalize_mapping(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        keys = [stored_value(key) for key in value]
        if len(set(keys)) < len(keys):
            raise ValueError("two keys mean the same stored value; keep one")
        return dict(zip(keys, [class_word(word) for word in value.values()], strict=True))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._check_given()
        twice = sorted({str(value) for value in self.ignore} & set(self.mapping or {}))
        if twice:
            raise ValueError(f"id {twice[0]} is in ignore and in mapping; keep one")
        if self.classes is not None:
            _ = self._meaning  # which refuses values that are no class
        return self

    def _check_given(self) -> None:
        """Raise ValueError where what is said of masks does not fit where they are."""

    def _given(self) -> list[str]:
        """The keys about the meaning of masks that are there."""
        labelled = {"classes": self.classes, "ignore": self.ignore, "mapping": self.mapping}
        return [key for key, value in labelled.items() if value]

    @property
    def num_channels(self) -> int:
        return self.channels

    def in_channels(self, count: int) -> Self:
        if "channels" in self.model_fields_set or count == self.channels:
            return super().in_channels(count)
        return load(type(self), {**self.dump(), "channels": count})

    @property
    def class_names(self) -> tuple[str, ...]:
        if self.classes is None:
            return ()
        if isinstance(self.classes, int):
            return tuple(f"class_{index}" for index in range(self.classes))
        return self.classes

    @cached_property
    def _meaning(self) -> Meaning:
        """Raises ValueError for a value of `mapping` that is no class."""
        return Meaning.of(self.class_names, self.ignore, self.mapping or {})


class Located(Dataset):
    """Where images and masks lie."""

    images: PathText  # a folder; of a stack also a file; of a manifest the list
    masks: PathText | None = None  # theirs; without it the images are unlabelled


class Labelled(Classed, Located):
    """Images and masks that lie in folders or files of their own."""

    def _check_given(self) -> None:
        given = self._given()
        if self.masks is None and given:
            raise ValueError(f"{given[0]} is given without masks; add masks, the folder of the masks")
