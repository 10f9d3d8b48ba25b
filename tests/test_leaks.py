"""The leak guard: planted copies are found, clean pictures are not, and a run stops or goes on as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg import leaks, likeness
from ssl_seg.cli import app, run
from ssl_seg.config import UserError, load
from ssl_seg.datasets import Example, numbering
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.finetune import FinetuneConfig, finetune
from ssl_seg.leaks import Leak, LeakError, Leaks, compare, is_allowed, sentence
from ssl_seg.likeness import SIDE, Fingerprints, fingerprint
from ssl_seg.pretrain import PretrainConfig, pretrain
from ssl_seg.stage import Options
from tests.small import Textured, finetuning, pretraining

T = TypeVar("T")
RAMPS = ((0, 255), (40, 90), (60, 180), (20, 200))
NAMELESS = Leaks(frames=0)  # pictures alone decide
SIZE = (72, 96)


@dataclass(frozen=True)
class Pictures:
    """Examples that a test holds in its hands."""

    images: Sequence[np.ndarray]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Example:
        return Example(self.images[index], None, self.names[index])

    def name(self, index: int) -> str:
        return self.names[index]


def finished(work: Generator[None, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def printed(images: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Fingerprints:
    return finished(fingerprint(Pictures(images, names or [f"image{chr(97 + i)}" for i in range(len(images))])))


def found(trained: Fingerprints, scored: Fingerprints, config: Leaks = NAMELESS) -> list[Leak]:
    return finished(compare("pool", trained, "val", scored, config))


def streets(count: int, seed: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    drawn = load(Synthetic, {"kind": "street", "count": count, "size": size, "seed": seed})
    return [drawn.image(index).image for index in range(count)]


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    return streets(12, seed=1, size=(144, 192))


@pytest.fixture(scope="module")
def scored(scenes: list[np.ndarray]) -> Fingerprints:
    return printed(scenes, [f"scene{index}" for index in "abcdefghijkl"])


def as_jpeg(image: np.ndarray, quality: int = 50) -> np.ndarray:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)


def cropped(image: np.ndarray, rows: tuple[float, float], columns: tuple[float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    down, across = (slice(round(a * n), round(b * n)) for (a, b), n in ((rows, height), (columns, width)))
    return np.ascontiguousarray(image[down, across])


def toned(image: np.ndarray) -> np.ndarray:
    return np.clip((image.astype(np.float32) - 128) * 0.75 + 115, 0, 255).astype(np.uint8)


ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "coded anew": as_jpeg,
    "half the size": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "a corner of 64 % of the area": lambda image: cropped(image, (0, 0.8), (0.2, 1)),
    "its width cut to 62 %": lambda image: cropped(image, (0, 1), (0.19, 0.81)),
    "cropped, mirrored and coded anew": lambda image: as_jpeg(cropped(image, (0.1, 0.9), (0, 0.8))[:, ::-1], 60),
    "toned": toned,
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 1.0),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_altered_copies_are_found_with_the_image_they_were_made_of(
    kind: str, scenes: list[np.ndarray], scored: Fingerprints
) -> None:
    leaked = found(printed([ALTERED[kind](image) for image in scenes]), scored)
    assert [leak.kind for leak in leaked] == ["altered"] * len(scenes)
    assert {leak.scored for leak in leaked} == set(scored.names)
    assert all(("mirrored" in leak.detail) == ("mirrored" in kind) for leak in leaked)


def test_it_is_found_too_where_the_scored_image_is_the_part(scenes: list[np.ndarray]) -> None:
    parts = printed([cropped(image, (0.15, 0.95), (0.1, 0.9)) for image in scenes])
    leaked = found(printed(scenes), parts)
    assert len(leaked) == len(scenes)
    assert all("64% of the area" in leak.detail or "63%" in leak.detail or "65%" in leak.detail for leak in leaked)


def test_quarter_turns_are_found_where_they_are_asked_for(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    turned = printed([np.ascontiguousarray(np.rot90(image)) for image in scenes[:4]])
    assert not found(turned, scored)
    leaked = found(turned, scored, Leaks(frames=0, turns=True))
    assert [leak.scored for leak in leaked] == list(scored.names[:4])
    assert all("turned" in leak.detail for leak in leaked)


def test_equal_pixels_are_exact_whatever_else_they_could_be(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    leaked = found(printed([scenes[7], scenes[2]]), scored)
    assert [(leak.kind, leak.scored, leak.alike) for leak in leaked] == [
        ("exact", "sceneh", 1.0),
        ("exact", "scenec", 1.0),
    ]


def test_one_pixel_makes_an_altered_copy_of_an_exact_one(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    changed = scenes[3].copy()
    changed[5, 5] ^= 1
    assert [leak.kind for leak in found(printed([changed]), scored)] == ["altered"]


@pytest.mark.parametrize("kind", ["street", "shapes", "squares"])
def test_drawn_images_of_other_seeds_are_clean(kind: str) -> None:
    one, other = (
        finished(fingerprint(load(Synthetic, {"kind": kind, "count": 12, "size": SIZE, "seed": seed})))
        for seed in (1, 2)
    )
    assert not found(one, other)


def test_flat_and_nearly_flat_images_are_clean() -> None:
    random = np.random.default_rng(0)
    flat = [np.full((60, 80, 3), grey, dtype=np.uint8) for grey in (0, 0, 128, 255)]
    noisy = [random.integers(100, 103, (60, 80, 3), dtype=np.uint8) for _ in range(20)]
    ramps = [np.repeat(np.linspace(a, b, 80).astype(np.uint8)[None, :, None], 60, 0).repeat(3, 2) for a, b in RAMPS]
    assert not found(printed([*flat, *noisy[:10], *ramps[:2]]), printed([*flat, *noisy[10:], *ramps[2:]]))


def test_a_plain_image_is_found_as_it_is_but_another_of_its_kind_is_not() -> None:
    boxes = [load(Synthetic, {"count": 30, "size": (96, 96), "seed": 4}).image(index).image for index in range(30)]
    scored = printed(boxes[:15])
    assert not found(printed(boxes[15:]), scored)
    leaked = found(printed([as_jpeg(box, 90) for box in boxes[:15]]), scored)
    assert {leak.detail for leak in leaked} == {"plain"}
    assert len(leaked) > len(boxes) // 4


def test_photographs_share_nothing_with_other_parts_of_themselves() -> None:
    """Two parts of one photograph that overlap by less than the guard promises: other content, the same light."""
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        height, width = photograph.shape[:2]
        quarters = [
            photograph[y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)
        ]
        assert not found(printed(quarters[:2]), printed(quarters[2:]))
        leaked = found(printed([as_jpeg(cropped(part, (0, 0.85), (0.15, 1))) for part in quarters]), printed(quarters))
        assert [leak.scored for leak in leaked] == ["imagea", "imageb", "imagec", "imaged"]


# ---- neighbours in a sequence ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/0016E5_07959.jpg", ("0016E5_#", 7959)),
        ("0006R0_f00930.png", ("0006R0_f#", 930)),
        ("train/aachen/aachen_000001_000019_leftImg8bit.png", ("aachen/aachen_000001_#_leftImg8bit", 19)),
        ("val/clip/12.png", ("clip/#", 12)),
        ("photo.jpg", None),
        ("2nd.png", None),
    ],
)
def test_the_number_of_a_frame_is_the_last_one_of_its_name(name: str, expected: tuple[str, int] | None) -> None:
    assert numbering(name) == expected


def moving(count: int, seed: int) -> list[np.ndarray]:
    """A camera that goes along a wide picture, a pixel each frame: those 80 apart share nothing."""
    wide = np.random.default_rng(seed).normal(size=(60, 80 + count))
    smooth = cv2.GaussianBlur(wide, (0, 0), 4)
    grey = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    return [np.repeat(grey[:, step : step + 80, None], 3, axis=2) for step in range(count)]


def split(count: int, held: Callable[[int], bool], name: Callable[[int], str]) -> tuple[Fingerprints, Fingerprints]:
    frames = moving(count, seed=0)
    parts = [[index for index in range(count) if held(index) == wanted] for wanted in (False, True)]
    trained, scored = (printed([frames[index] for index in part], [name(index) for index in part]) for part in parts)
    return trained, scored


def test_one_video_split_at_random_is_a_leak_of_nearly_every_frame() -> None:
    random = np.random.default_rng(1).random(120)
    trained, scored = split(120, lambda index: random[index] < 0.3, lambda index: f"clip_{index:04d}.png")
    leaked = found(trained, scored, Leaks(frames=3))
    assert len(leaked) > 0.9 * len(trained)
    assert sum(leak.kind == "sequence" for leak in leaked) > 0.8 * len(trained)
    assert "1 frames apart" in {leak.detail for leak in leaked}


def test_only_frames_close_enough_are_neighbours() -> None:
    trained, scored = split(120, lambda index: index >= 90, lambda index: f"clip_{index:04d}.png")
    leaked = [leak for leak in found(trained, scored, Leaks(frames=3)) if leak.kind == "sequence"]
    assert [leak.name for leak in leaked] == ["clip_0087.png", "clip_0088.png", "clip_0089.png"]
    assert not [leak for leak in found(trained, scored, Leaks(frames=0)) if leak.kind == "sequence"]


def test_numbers_that_are_no_time_are_no_neighbours() -> None:
    """As in Pascal VOC and Oxford Pets: one numbering over both sides, unrelated pictures."""
    order = np.random.default_rng(2).permutation(60)
    frames = [moving(1, seed)[0] for seed in range(60)]
    trained, scored = (
        printed([frames[index] for index in part], [f"2007_{index:06d}.jpg" for index in part])
        for part in (sorted(order[:40]), sorted(order[40:]))
    )
    assert not found(trained, scored, Leaks())


def test_another_clip_with_the_same_numbers_is_no_neighbour() -> None:
    trained, scored = (
        printed(moving(30, seed), [f"{clip}/frame_{index}.png" for index in range(30)])
        for seed, clip in ((3, "one"), (4, "two"))
    )
    assert not found(trained, scored, Leaks())


# ---- properties ----


@given(
    top=st.floats(0, 1), left=st.floats(0, 1), height=st.floats(0.8, 1), width=st.floats(0.8, 1), mirrored=st.booleans()
)
def test_any_crop_of_64_percent_and_more_is_found(
    top: float, left: float, height: float, width: float, mirrored: bool, scenes: list[np.ndarray], scored: Fingerprints
) -> None:
    start, begin = top * (1 - height), left * (1 - width)
    part = cropped(scenes[0], (start, start + height), (begin, begin + width))
    leaked = found(printed([np.ascontiguousarray(part[:, ::-1]) if mirrored else part]), scored)
    assert [leak.scored for leak in leaked] == ["scenea"]


def test_what_is_found_does_not_depend_on_the_blocks(
    scenes: list[np.ndarray], scored: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = printed([cropped(image, (0, 0.8), (0, 0.8)) for image in scenes])
    whole = found(trained, scored)
    monkeypatch.setattr(likeness, "BLOCK", 5)
    assert sorted(found(trained, scored), key=str) == sorted(whole, key=str)


def test_the_thumbnails_are_the_digests_companions(scenes: list[np.ndarray]) -> None:
    prints = printed(scenes[:3])
    assert prints.thumbs.shape == (3, SIDE, SIDE)
    assert len(set(prints.digests)) == 3
    assert prints.digests == printed([image.copy() for image in scenes[:3]]).digests


def test_an_image_that_cannot_be_read_is_named() -> None:
    class Broken(Pictures):
        def image(self, index: int) -> Example:
            raise UserError(f"{self.names[index]}: damaged")

    with pytest.raises(UserError, match=r"b\.png: damaged"):
        finished(fingerprint(Broken([np.zeros((4, 4, 3), np.uint8)], ["b.png"])))


def test_workers_read_the_same() -> None:
    examples = Textured(count=5)
    one, two = (finished(fingerprint(examples, workers)) for workers in (0, 1))
    assert one.digests == two.digests
    assert (one.thumbs == two.thumbs).all()


# ---- in a run ----

SAME = {"type": "textured", "count": 3, "seed": 0}  # the first three of the pool


def leaking(**settings: Any) -> dict[str, Any]:
    values = pretraining(steps=1)
    return {**values, "data": {**values["data"], "val": SAME}, "leaks": settings}


def pretrained(values: dict[str, Any], out: Path) -> dict[str, Any]:
    pretrain(load(PretrainConfig, values), Options(out, quiet=True))
    return json.loads((out / "leaks.json").read_text())


def test_a_leak_stops_the_run_before_a_step_and_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(LeakError) as caught:
        pretrained(leaking(), tmp_path / "run")
    line = str(caught.value)
    assert "\n" not in line
    assert "data.pool: leak into data.val: 3 exact: textured_0_0 ~ textured_0_0" in line
    assert "leaks.allow=[exact]" in line
    record = json.loads((tmp_path / "run" / "leaks.json").read_text())
    assert [leak["name"] for leak in record["leaks"]] == ["textured_0_0", "textured_0_1", "textured_0_2"]
    assert not any(leak["allowed"] for leak in record["leaks"])
    picture = cv2.imread(str(tmp_path / "run" / "leaks.png"))
    assert picture.shape[1] > 2 * 300
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


LEAK = Leak("exact", "pool", "a/7.png", "val", "b/8.png", 1.0, "the same pixels")


@pytest.mark.parametrize(
    ("allow", "passes"),
    [
        (["exact"], True),
        (["altered", "ex*"], True),
        (["a/*"], True),
        (["b/8.png"], True),
        ([], False),
        (["altered", "sequence"], False),
        (["7.png"], False),
        (["pool"], False),
    ],
)
def test_a_glob_of_the_kind_or_of_either_name_allows_a_leak(allow: list[str], passes: bool) -> None:
    assert is_allowed(LEAK, allow) is passes


def test_what_is_allowed_by_name_passes_and_is_written_everywhere(tmp_path: Path) -> None:
    allow = ["textured_0_0", "textured_0_1", "*_2"]
    record = pretrained(leaking(allow=allow), tmp_path / "run")
    assert all(leak["allowed"] for leak in record["leaks"])
    assert len(record["leaks"]) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["leaks"]["allow"] == allow
    assert sentence(record) == (
        "LEAK: 3 exact among 12 images of pool compared with 3 images of val; all allowed by leaks.allow."
    )


def test_a_run_goes_on_only_if_every_leak_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(LeakError, match=r"2 exact: textured_0_1 ~ textured_0_1"):
        pretrained(leaking(allow=["textured_0_0"]), tmp_path / "run")


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = pretrained(pretraining(steps=1), tmp_path / "run")
    assert record["leaks"] == []
    monkeypatch.setattr(leaks, "fingerprint", None)
    assert pretrained(pretraining(steps=1), tmp_path / "run") == record


def test_a_check_that_is_off_is_said(tmp_path: Path) -> None:
    record = pretrained(leaking(check=False), tmp_path / "run")
    assert record["leaks"] == []
    assert "not checked (leaks.check=false)" in sentence(record)


def test_the_command_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "squares", "data.val.seed=0", "data.val.count=2", "data.pool.count=4", "data.pool.seed=0"]
    words += ["tracking=none", "train.workers=0", "--quiet", "--out", str(tmp_path / "run")]
    assert run(lambda: app(args=words, prog_name="ssl-seg", standalone_mode=False)) == 3
    told = capsys.readouterr().err
    assert told.startswith("ssl-seg: data.pool: leak into data.val: 2 exact")
    assert told.count("\n") == 1


def test_labels_are_compared_with_val_and_test(tmp_path: Path) -> None:
    values = finetuning(steps=1)
    data = {**values["data"], "test": {**values["data"]["labelled"], "count": 2}}
    with pytest.raises(LeakError, match=r"data\.labelled: leak into data\.test: 2 exact"):
        finetune(load(FinetuneConfig, {**values, "data": data}), Options(tmp_path / "run", quiet=True))


def test_the_pool_of_the_pretraining_is_compared_with_what_the_fine_tuning_is_scored_on(tmp_path: Path) -> None:
    pool = {"type": "textured", "count": 6, "seed": 7}  # that of data.test
    values = pretraining(steps=1)
    first = pretrained({**values, "data": {"pool": pool}}, tmp_path / "pretrained")
    assert sentence(first) == "No leak check: there is nothing to compare with."
    given = {**finetuning(steps=1), "init": str(tmp_path / "pretrained")}
    with pytest.raises(LeakError, match=r"init: the pool it was trained on: leak into data\.test: 3 exact"):
        finetune(load(FinetuneConfig, given), Options(tmp_path / "run", quiet=True))
    allowed = {**given, "leaks": {"allow": ["exact"]}}
    finetune(load(FinetuneConfig, allowed), Options(tmp_path / "run", quiet=True))


def test_altered_copies_in_the_pool_of_the_pretraining_are_found_by_what_it_has_stored(
    tmp_path: Path, scenes: list[np.ndarray]
) -> None:
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in scenes]
    stored = printed(mirrored)

    class Run:
        folder = tmp_path

        def write_json(self, name: str, values: dict[str, Any]) -> None:
            (tmp_path / name).write_text(json.dumps(values))

    leaks.write_fingerprints(Run(), {"pool": stored, "val": printed(scenes), "init.pool": stored})
    read = leaks.read_fingerprints(str(tmp_path / "encoder"))
    assert set(read) == {"pool"}
    assert len(found(read["pool"], printed(scenes))) == len(scenes)
    assert found(replace(read["pool"], thumbs=None), printed(scenes)) == []


def test_the_first_sentence_needs_no_torch() -> None:
    script = "import sys; from ssl_seg.leaks import sentence; sentence(None); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
