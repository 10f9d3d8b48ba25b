"""The shape of each JSON file of a run, as much of it as its readers rely on.

A run folder may be a stranger's, or of another version: what does not have this shape is refused in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ssl_seg import calibration, files
from ssl_seg.config import UserError


class Shape(BaseModel):
    """As much of a JSON file as its readers rely on; it may be a stranger's, and other keys may be there too.

    Strict: neither "0.4" nor true is a score.
    """

    model_config = ConfigDict(extra="allow", strict=True)


Number = float | None  # strict: an integer too, no text, no bool; null where there is nothing to divide by


Finite = Annotated[float, Field(allow_inf_nan=False)] | None


Pixels = Annotated[int, Field(ge=0, lt=2**53)]


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


Moment = Annotated[str, AfterValidator(_check_time)] | None


class _ConfigShape(Shape):
    init: str | None = None
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    tasks: dict[str, Any] | None = None


class _OriginShape(Shape):
    stage: str
    config: _ConfigShape
    origin: _OriginShape | None = None


class _CostShape(Shape):
    seconds: Finite = None
    images: Finite = None
    peak_memory_mib: Finite = None


# The name of a folder, and no path out of the one that it lies in: neither . nor ..
FolderName = Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")]


class _PooledShape(Shape):
    run: FolderName  # beside the cell's folder, in `folds`
    images: int
    sha256: str


class _RecordShape(Shape):
    stage: str
    config: _ConfigShape
    status: str = "finished"
    origin: _OriginShape | None = None
    started: Moment = None
    ended: Moment = None
    resumed: list[dict[str, Any]] | None = None
    versions: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    precision: Literal["fp32", "bf16"] | None = None
    cost: _CostShape | None = None
    pooled: list[_PooledShape] = []


class _PassportShape(Shape):
    resize: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None


class _ResultShape(Shape):
    steps: int | None = None
    __pydantic_extra__: dict[str, Number | str | dict[str, Number]]
    passport: dict[str, _PassportShape] = {}


class _SplitShape(Shape):
    labelled: list[str] = []
    val: list[str] = []
    folds: list[list[str]] = []
    sha256_of_labelled: str = ""


class _TaskShape(Shape):
    given: dict[str, Any]
    prepared: dict[str, Any]


class _PartShape(Shape):
    images: int = 0
    sha256_of_names: str = ""


class _FilesShape(Shape):
    names: list[str]
    bytes: list[int]
    modified: list[int]
    sha256: list[str | None]

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if len({len(self.names), len(self.bytes), len(self.modified), len(self.sha256)}) > 1:
            raise ValueError("its lists are not of one length")
        return self


class _ImagesShape(Shape):
    names: list[str] = []
    sha256: list[str] = []


class _ExtremeShape(Shape):
    kind: str
    name: str
    picture: str
    miou: Number = None


class _KindShape(Shape):
    labelled: int
    scored: int
    names: Annotated[list[str], Field(min_length=1)]
    miou: float
    miou_of_others: float


class _PlacesShape(Shape):
    x: list[float]
    y: list[float]
    miou: list[Number] = []

    @model_validator(mode="after")
    def _of_the_same_images(self) -> Self:
        if len(self.x) != len(self.y) or len(self.miou) not in (0, len(self.x)):
            raise ValueError("x, y and miou are not of the same images")
        return self


class _KindsShape(Shape):
    uncovered: dict[str, _KindShape]
    places: dict[str, _PlacesShape]


class _ReceiptShape(Shape):
    share: float = 0.0
    features_equal: bool | None = None
    matched: list[Any] | dict[str, Any] | None = None
    missing: list[Any] | dict[str, Any] | None = None
    left_over: list[Any] | dict[str, Any] | None = None
    mismatched: list[Any] | dict[str, Any] | None = None


class _LeakShape(Shape):
    kind: str
    part: str
    name: str
    scored_part: str
    scored: str
    detail: str
    allowed: bool


class _ComparedShape(Shape):
    part: str
    scored_part: str
    pictures: str
    names: str


class LeaksShape(Shape):
    checked: bool
    trained: dict[str, int]
    scored: dict[str, int]
    leaks: list[_LeakShape]
    pairs: list[_ComparedShape] = []


class _MatricesShape(Shape):
    __pydantic_extra__: dict[str, list[list[Pixels]]]
    classes: Annotated[list[str], Field(min_length=1)]


class _ConfidencesShape(Shape):
    pixels: list[Pixels]
    right: list[Pixels]
    confidence: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    doubted: list[Pixels]
    doubted_right: list[Pixels]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        sizes = [len(getattr(self, own)) for own in calibration.COLUMNS]
        if sizes != [calibration.BINS] * 3 + [calibration.DOUBTS] * 2:
            raise ValueError("its lists are not of as many bins as there are")
        for pixels, right in ((self.pixels, self.right), (self.doubted, self.doubted_right)):
            if any(part > whole for part, whole in zip(right, pixels, strict=True)):
                raise ValueError("more pixels are right than there are")
        return self


class _CalibrationShape(Shape):
    temperature: Finite = None
    parts: dict[str, dict[str, _ConfidencesShape]]


SHAPES = {
    "run.json": TypeAdapter(_RecordShape),
    "result.json": TypeAdapter(_ResultShape),
    "split.json": TypeAdapter(_SplitShape),
    "data.json": TypeAdapter(dict[str, _PartShape]),
    "files.json": TypeAdapter(dict[str, _FilesShape]),
    "images.json": TypeAdapter(dict[str, _ImagesShape]),
    "tasks.json": TypeAdapter(dict[str, _TaskShape]),
    "extremes.json": TypeAdapter(dict[str, list[_ExtremeShape]]),
    "kinds.json": TypeAdapter(_KindsShape),
    "receipts.json": TypeAdapter(dict[str, _ReceiptShape]),
    "leaks.json": TypeAdapter(LeaksShape),
    "confusion.json": TypeAdapter(_MatricesShape),
    calibration.FILE: TypeAdapter(_CalibrationShape),
}


def read_checked(path: Path) -> dict[str, Any]:
    """The object in a run's JSON file. Raises UserError as `files.read_json` and `check_shape`."""
    values = files.read_json(path)
    check_shape(path, values)
    return values


def check_shape(path: Path, values: Mapping[str, Any], shape: TypeAdapter[Any] | None = None) -> None:
    """Raise UserError with one line where a file of that name holds what those who read runs could not rely on.

    `shape` is that of a file whose name says nothing, such as an export's.
    """
    shape = shape or SHAPES.get(path.name)
    try:
        if shape is not None:
            shape.validate_python(values)
    except ValidationError as error:
        # Of what may be several things the error that lies deepest is that of the right one.
        place, message = max((_explained(found, values) for found in error.errors(include_url=False)), key=_depth)
        raise UserError(
            f"{path}: {'.'.join(place)} is not as a run writes it ({message}); restore the file or leave the run out"
        ) from error
    if path.name == "confusion.json":
        _check_matrices(path, values)


def _explained(error: ErrorDetails, values: Any) -> tuple[list[str], str]:
    """The keys to the place of an error, without the types that pydantic puts between them, and what is wrong."""
    keys = []
    for part in error["loc"]:
        if _holds(values, part):
            values = values[part]
            keys.append(str(part))
    if error["type"] == "missing":
        keys.append(str(error["loc"][-1]))
    return keys, error["msg"].removeprefix("Value error, ")


def _holds(values: Any, part: int | str) -> bool:
    return part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)


def _depth(explained: tuple[list[str], str]) -> int:
    return len(explained[0])


def _check_matrices(path: Path, values: Mapping[str, Any]) -> None:
    count = len(values["classes"])
    for part in set(values) - {"classes"}:
        if len(values[part]) != count or any(len(row) != count for row in values[part]):
            raise UserError(f"{path}: {part} is no matrix of {count} classes; restore the file or leave the run out")
