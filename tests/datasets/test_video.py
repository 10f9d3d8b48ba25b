"""Videos: in any order the frames that a pass from the start gives. Oracle: OpenCV, read from the first frame on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ssl_seg import images
from ssl_seg.config import load
from ssl_seg.data.loading import Whole, pack
from ssl_seg.data.splits import hold_out, names_of
from ssl_seg.data.workers import Workers, collected
from ssl_seg.datasets import video
from ssl_seg.datasets.video import Video
from ssl_seg.testing import check_dataset
from tests.faults import message_of

SIZE = (48, 64)
RATE = 25
LENGTH = 100
CODECS = {"mp4v": "clip.mp4", "MJPG": "clip.avi", "XVID": "clip.mkv"}
GROUND = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8), (0, 0), 3)
GROUND = cv2.normalize(GROUND, None, 0, 255, cv2.NORM_MINMAX)


def moving(length: int = LENGTH) -> list[np.ndarray]:
    """A camera that moves by one pixel a frame."""
    return [GROUND[number : number + SIZE[0], number // 2 : number // 2 + SIZE[1]] for number in range(length)]


def film(path: Path, frames: list[np.ndarray], codec: str = "mp4v") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), RATE, SIZE[::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame))
    writer.release()
    return path


def in_order(path: Path) -> list[np.ndarray]:
    """All frames, RGB, as OpenCV reads them from the first on."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read()[1]) is not None:
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames


def of(path: Path, **options: Any) -> Video:
    return load(Video, {"clips": str(path), "stride": 1, "distinct": False, **options})


@pytest.fixture(params=CODECS)
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return film(tmp_path / CODECS[request.param], moving(), request.param)


def test_frames_are_those_of_a_pass_in_any_order(clip: Path) -> None:
    frames = of(clip)
    expected = in_order(clip)
    assert len(frames) == len(expected) == LENGTH
    for index in (*range(3), *np.random.default_rng(1).permutation(LENGTH).tolist(), 99, 98, 0):
        np.testing.assert_array_equal(frames.read(index).image, expected[index])
    assert frames.name(7) == "clip/000007"
    assert frames.sequence(7) == "clip"
    check_dataset(frames)


class Astray:
    """A capture that seeks to the frame before, as OpenCV does for some codecs."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self.capture = capture
        self.sought = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.capture, name)

    def set(self, what: int, number: int) -> bool:
        self.sought += 1
        return self.capture.set(what, max(0, number - 1))


def test_a_capture_that_is_led_astray_is_noticed_and_read_from_the_start(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, made, real = in_order(clip), [], video._capture
    frames = of(clip)
    assert len(frames) == LENGTH

    def astray(path: str) -> Astray:
        made.append(Astray(real(path)))
        return made[-1]

    monkeypatch.setattr(video, "_capture", astray)
    monkeypatch.setattr(video, "_CLIPS", {})
    for index in (80, 3, 99, 40, 41, 0):
        np.testing.assert_array_equal(frames.read(index).image, expected[index])
    assert sum(own.sought for own in made) == 1, "it is not asked again"


def test_every_nth_frame_of_a_time_is_taken(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", moving())
    frames = of(path, stride=7, start=0.4, end=2.4)
    numbers = range(10, 60, 7)
    assert names_of(frames) == tuple(f"clip/{number:06d}" for number in numbers)
    expected = in_order(path)
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(frames.image(index).image, expected[number])
    assert "8 of the 60 frames are taken (stride: 7)" in frames.notes()[0]
    assert Video(clips=str(path)).stride == 5
    assert "no frame from 4 s on, for the clip ends at 4.0 s" in message_of(lambda: len(of(path, start=4)))
    assert "end (1 s) has to be later than start (2 s)" in message_of(lambda: of(path, start=2, end=1))


def test_frames_that_show_the_same_are_left_out(tmp_path: Path) -> None:
    """Still for 40 frames with a sensor's noise, then moving, then still again."""
    noise = np.random.default_rng(0)
    still = [moving(1)[0].astype(float) + noise.normal(0, 2, (*SIZE, 3)) for _ in range(40)]
    still = [frame.clip(0, 255).astype(np.uint8) for frame in still]
    path = film(tmp_path / "clip.avi", [*still, *moving()[1:41], *[moving()[40]] * 20], "MJPG")
    frames = of(path, distinct=True)
    numbers = [int(name.rpartition("/")[2]) for name in names_of(frames)]
    assert numbers[0] == 0
    assert not set(numbers) & set(range(1, 40))
    assert len(set(numbers) & set(range(40, 80))) >= 20
    assert not set(numbers) & set(range(81, 100))
    assert f"{100 - len(numbers)} that hardly differ from the one before are left out" in frames.notes()[0]
    assert names_of(of(path, distinct=True)) == names_of(frames)
    expected = in_order(path)
    np.testing.assert_array_equal(frames.read(len(frames) - 1).image, expected[numbers[-1]])


def test_clips_of_a_folder_are_sequences(tmp_path: Path) -> None:
    film(tmp_path / "b.avi", moving(20), "MJPG")
    film(tmp_path / "deep" / "a.mp4", moving(30)[10:])
    frames = of(tmp_path)
    assert (frames.name(19), frames.name(20)) == ("b/000019", "deep/a/000000")
    assert frames.files(20) == (tmp_path / "deep" / "a.mp4",)
    _, held = hold_out(frames)
    assert names_of(held) == tuple(f"{clip}/{number:06d}" for clip in ("b", "deep/a") for number in range(16, 20))
    film(tmp_path / "b.mp4", moving(5))
    assert "differ by their suffix only" in message_of(lambda: len(of(tmp_path)))


def test_workers_read_the_same_frames_after_their_parent_has(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", moving())
    frames, expected = of(path), in_order(path)
    np.testing.assert_array_equal(frames.read(50).image, expected[50])
    order = [70, 3, 99, 51, 52, 0]
    packs = collected(Whole(frames, with_labels=False), [[index] for index in order], Workers(2, section=""), pack)
    for index, packed in zip(order, packs, strict=True):
        np.testing.assert_array_equal(packed.image[0].permute(1, 2, 0).numpy(), expected[index])
    assert pickle.loads(pickle.dumps(frames)) == frames


def test_no_more_clips_are_kept_open_than_a_few(tmp_path: Path) -> None:
    for number in range(6):
        film(tmp_path / f"{number}.avi", moving(3), "MJPG")
    frames = of(tmp_path)
    for index in (*range(18), 0):
        assert frames.read(index).image.shape == (*SIZE, 3)
    (kept,) = [own for own in video._CLIPS.values() if str(tmp_path / "0.avi") in own]
    assert len(kept) == video.OPENED


# ---- faults


@pytest.mark.parametrize(("stride", "distinct"), [(1, False), (4, False), (4, True)])
def test_overlays_become_a_clip_that_lasts_as_long(stride: int, distinct: bool, tmp_path: Path) -> None:
    still = [*moving(40), *[moving(40)[-1]] * 20, *moving(20), *[moving(20)[-1]] * 20]
    frames = of(film(tmp_path / "in" / "deep" / "clip.mp4", still).parents[1], stride=stride, distinct=distinct)
    assert (len(frames) < LENGTH // stride) == distinct
    overlays = [tmp_path / "out" / f"{frames.name(index)}.png" for index in range(len(frames))]
    for index, path in enumerate(overlays):
        images.write_image(path, frames.read(index).image)
    frames.join_overlays(overlays, tmp_path / "out")
    written = tmp_path / "out" / "deep" / "clip.mp4"
    shown = in_order(written)
    assert len(shown) == LENGTH // stride
    assert cv2.VideoCapture(str(written)).get(cv2.CAP_PROP_FPS) == pytest.approx(RATE / stride)
    for place, frame in enumerate(shown):  # coded anew, so nearly the same
        assert np.abs(frame.astype(int) - still[place * stride][..., ::-1]).mean() < 12
    assert [path.name for path in written.parent.glob("*.mp4")] == ["clip.mp4"]


def test_pictures_of_odd_sides_are_a_clip_too(tmp_path: Path) -> None:
    for number in range(3):
        images.write_image(tmp_path / f"{number}.png", np.full((33, 47, 3), 80 * number, np.uint8))
    video.write_clip(tmp_path / "odd.mp4", [tmp_path / f"{number}.png" for number in range(3)], [0, 1, 2], 3, 10)
    shown = in_order(tmp_path / "odd.mp4")
    assert [frame.shape for frame in shown] == [(34, 48, 3)] * 3
    assert [round(frame.mean() / 80) for frame in shown] == [0, 1, 2]


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    picture, other = tmp_path / "0.png", tmp_path / "1.png"
    images.write_image(picture, np.zeros((48, 64, 3), np.uint8))
    images.write_image(other, np.zeros((40, 64, 3), np.uint8))
    message = message_of(lambda: video.write_clip(tmp_path / "a.mp4", [picture, other], [0, 1], 2, 10))
    assert "1.png: is not of the size of its clip's other frames" in message
    written = video._length
    monkeypatch.setattr(video, "_length", lambda path: written(path) - 1)  # as of a disk that has filled up
    message = message_of(lambda: video.write_clip(tmp_path / "b.mp4", [picture], [0], 3, 10))
    assert message == f"{tmp_path}/b.mp4: could not be written whole; make room, and the same command goes on"
    assert "rename it" in message_of(lambda: video.write_clip(tmp_path / "caf\udce9.mp4", [picture], [0], 1, 10))
    (tmp_path / "caf\udce9.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    assert "caf" in message_of(lambda: len(of(tmp_path / "caf\udce9.mp4")))
    (tmp_path / "caf\udce9.mp4").unlink()
    capfd.readouterr()
    monkeypatch.setattr(video.cv2.VideoWriter, "fourcc", lambda *_: 0x656E6F6E)
    video.write_clip(tmp_path / "c.mp4", [picture], [0], 1, 10)
    assert capfd.readouterr().err.endswith(f"{tmp_path}/c.mp4: cannot be written by OpenCV; its frames are beside it\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_damaged_clips_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    film(tmp_path / "a.mp4", moving())
    film(tmp_path / "a.avi", moving(), "MJPG")
    for name in ("a.mp4", "a.avi"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert "a.mp4: no frame of it can be decoded: it is damaged, cut off, or of a codec" in message_of(
        lambda: len(of(tmp_path / "a.mp4"))
    )
    said = message_of(lambda: len(of(tmp_path / "a.avi")))
    assert "of about 100 frames can be decoded: it is damaged or cut off; copy it again; or write end: " in said
    some = of(tmp_path / "a.avi", end=float(said.split("end: ")[1].split()[0]))
    assert 30 < len(some) < 70
    (tmp_path / "b.avi").write_bytes(film(tmp_path / "b.avi", moving(), "MJPG").read_bytes().replace(b"MJPG", b"ZZZZ"))
    assert "or of a codec that OpenCV lacks" in message_of(lambda: len(of(tmp_path / "b.avi")))
    (tmp_path / "c.mp4").write_text("#EXTM3U\nhttp://localhost/clip.ts\n")
    assert "no video of a known form" in message_of(lambda: len(of(tmp_path / "c.mp4")))
    assert "no such file or folder" in message_of(lambda: len(of(tmp_path / "d.mp4")))
    assert capfd.readouterr().err == ""


def test_a_clip_that_is_another_one_is_noticed(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.avi", moving(20), "MJPG")
    frames = of(path)
    assert len(frames) == 20
    film(path, moving(20)[::-1], "MJPG")
    assert "frame 3 is not the one that was there at the start" in message_of(lambda: frames.read(3))
