"""Tar shards: against WebDataset's own writer and reader, behind URLs of several kinds, and with what may be wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ssl_seg import images
from ssl_seg.config import load
from ssl_seg.datasets import shards
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.shards import Shards
from ssl_seg.testing import check_dataset
from tests.faults import message_of

CLASSES = ["ground", "leaf"]
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices are kept: not in the home of who runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_pairs(folder: Path, count: int = 5) -> Path:
    """Images in `images` and masks in `masks`, by the same names."""
    random = np.random.default_rng(0)
    for number in range(count):
        images.write_image(folder / "images" / f"{number:05d}.png", random.integers(0, 256, (12, 16, 3), np.uint8))
        images.write_mask(folder / "masks" / f"{number:05d}.png", random.integers(0, 2, (12, 16), np.uint8))
    return folder


def members_of(folder: Path) -> Files:
    """The same as they lie in shards."""
    found = {}
    for path in sorted((folder / "images").iterdir()):
        found[path.name] = path.read_bytes()
        found[f"{path.stem}.seg.png"] = (folder / "masks" / path.name).read_bytes()
    return found


def packed(members: Files, **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, payload in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            tar.addfile(entry, io.BytesIO(payload))
    return stream.getvalue()


def put_shards(folder: Path, members: Files, each: int = 4, name: str = "pool-{:06d}.tar") -> str:
    """The members in several shards; what `urls` says of them."""
    names = list(members)
    parts = [names[start : start + each] for start in range(0, len(names), each)]
    for number, part in enumerate(parts):
        (folder / name.format(number)).write_bytes(packed({own: members[own] for own in part}))
    return f"{folder}/pool-{{000000..{len(parts) - 1:06d}}}.tar"


def assert_same(one: Shards, other: Any) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        ours, theirs = one.read(index), other.read(index)
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.image, theirs.image)
        if theirs.label is not None:
            np.testing.assert_array_equal(ours.label, theirs.label)


def test_shards_are_the_same_data_set_as_the_folder_they_were_packed_of(tmp_path: Path) -> None:
    folder = put_pairs(tmp_path)
    urls = put_shards(tmp_path, members_of(folder))
    meaning = {"classes": CLASSES, "mapping": {1: 0, 0: 1}}
    ours = load(Shards, {"urls": urls, "masks": "seg.png", **meaning})
    check_dataset(ours)
    assert_same(ours, Folder(images=str(folder / "images"), masks=str(folder / "masks"), **meaning))
    pool = Shards(urls=urls)
    check_dataset(pool)
    assert_same(pool, Folder(images=str(folder / "images")))
    assert pool.notes() == ()
    assert [path.name for path in ours.files(4)] == ["pool-000002.tar"] * 2
    assert [path.name for path in pool.files(0)] == ["pool-000000.tar"]


def test_masks_mean_what_they_mean_in_a_folder(tmp_path: Path) -> None:
    """Also those of palettes of greys, of which all masks have to be looked at."""
    folder = put_pairs(tmp_path)
    for path in sorted((folder / "masks").iterdir()):
        images.write_mask(path, images.read_mask(path), palette=[[1, 1, 1], [0, 0, 0]])
    ours = Shards(urls=put_shards(tmp_path, members_of(folder)), masks="seg.png", classes=CLASSES)
    theirs = Folder(images=str(folder / "images"), masks=str(folder / "masks"), classes=CLASSES)
    assert ours.greys_read() == theirs.greys_read() != {}
    assert_same(ours, theirs)


def test_it_reads_what_webdataset_writes_and_finds_the_samples_that_it_finds(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = {f"deep.er/{number:03d}": random.integers(0, 256, (8, 9, 3), np.uint8) for number in range(7)}
    with webdataset.ShardWriter(f"{tmp_path}/pool-%06d.tar", maxcount=3, verbose=0) as writer:
        for key, image in pictures.items():
            writer.write({"__key__": key, "png": image, "json": {"key": key}})
    urls = f"{tmp_path}/pool-{{000000..000002}}.tar"
    ours = Shards(urls=urls)
    check_dataset(ours)
    with ExitStack() as files:
        paths = sorted(tmp_path.glob("*.tar"))
        streams = [{"url": path.name, "stream": files.enter_context(path.open("rb"))} for path in paths]
        theirs = [*webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander(streams))]
    assert [ours.name(index) for index in range(len(ours))] == [f"{sample['__key__']}.png" for sample in theirs]
    assert len(ours) == len(pictures)
    for index, sample in enumerate(theirs):
        assert ours.image_source(index).fetch() == sample["png"]
        np.testing.assert_array_equal(ours.read(index).image, pictures[sample["__key__"]])
    assert ours.sequence(0) == "deep.er"


@given(st.lists(st.text("ab./", min_size=1, max_size=8), max_size=4))
def test_keys_are_those_of_webdataset(names: list[str]) -> None:
    for name in names:
        if name.rpartition("/")[2].startswith("."):  # hidden: theirs would be called after the folder
            assert shards._parted(name) is None
            continue
        theirs = webdataset.tariterators.base_plus_ext(name)
        parts = shards._parted(name)
        assert (parts or (None, None)) == (theirs if theirs[0] and theirs[1] else (None, None))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_and_foreign_names_and_what_is_beside_images(form: int, tmp_path: Path) -> None:
    picture = members_of(put_pairs(tmp_path, 1))["00000.png"]
    long = f"{'deep/' * 30}blätter.png"
    members = {"./plain.png": picture, long: picture, "a.npy": b"1", "b.JPG": picture, "._plain.png": b"", "c": b"2"}
    (tmp_path / "a.tar").write_bytes(packed(members, format=form))
    ours = Shards(urls=str(tmp_path / "*.tar"))
    check_dataset(ours)
    assert [ours.name(index) for index in range(3)] == ["plain.png", long, "b.JPG"]
    (note,) = ours.notes()
    assert "1 keys have no image (*.npy)" in note


def test_links_and_holes_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(members_of(put_pairs(tmp_path, 1))["00000.png"])
    (tmp_path / "b.png").symlink_to("a.png")
    os.link(tmp_path / "a.png", tmp_path / "c.png")
    with tarfile.open(tmp_path / "pool.tar", "w") as tar:
        for name in "abc":
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    ours = Shards(urls=str(tmp_path / "pool.tar"))
    assert len(ours) == 1
    assert "2 members are links" in ours.notes()[0]


# ---- the index ----


def test_a_shard_is_gone_through_once_and_again_when_it_is_another(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    real = shards._pass
    monkeypatch.setattr(shards, "_pass", lambda url, size: passes.append(Path(url).name) or real(url, size))
    members = members_of(put_pairs(tmp_path))
    urls = put_shards(tmp_path, members)
    first = Shards(urls=urls)
    assert [len(first), len(Shards(urls=urls)), len(passes)] == [5, 5, 3]
    (tmp_path / "pool-000001.tar").write_bytes(packed({"x.png": members["00000.png"]}))
    assert len(Shards(urls=urls)) == 4
    assert passes[3:] == ["pool-000001.tar"]
    for path in cache.rglob("*.json"):
        path.write_text(path.read_text()[:-9])
    assert len(Shards(urls=urls)) == 4
    assert len(passes) == 7
    for path in cache.rglob("*.json"):
        index = json.loads(path.read_text())
        index["members"] = [[name, str(offset) + "?", *rest] for name, offset, *rest in index["members"]]
        path.write_text(json.dumps(index))
    assert len(Shards(urls=urls)) == 4
    assert len(passes) == 10
    assert "is another shard than the one that was there at the start" in message_of(lambda: first.read(2))


def test_a_shard_that_is_exchanged_by_one_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    members = members_of(put_pairs(tmp_path, 2))
    path = tmp_path / "a.tar"
    same = max(map(len, members.values()))
    path.write_bytes(packed({"a.png": b"1".ljust(same), "b.png": b"2".ljust(same)}))
    before = Shards(urls=str(path))
    assert len(before) == 2
    path.write_bytes(packed({"b.png": b"2".ljust(same), "a.png": b"1".ljust(same)}))
    assert "is another shard" in message_of(lambda: before.image(0))


def test_without_a_place_for_it_the_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = put_shards(tmp_path, members_of(put_pairs(tmp_path)))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [len(Shards(urls=urls)), len(Shards(urls=urls))] == [5, 5]


# ---- what is wrong ----


def test_what_is_wrong_with_a_shard_is_one_line(tmp_path: Path) -> None:
    members = members_of(put_pairs(tmp_path, 2))
    whole = packed(members)
    end = len(whole.rstrip(b"\0"))
    second = len(packed({"00000.png": members["00000.png"]}).rstrip(b"\0"))
    second += -second % 512  # where the second header begins
    damaged = bytearray(whole)
    damaged[second + 150] ^= 4  # in its checksum
    cases = {
        whole[: end - 40]: "cut off, for its end is missing",
        whole[: end + -end % 512]: "cut off, for its end is missing",
        whole[:700]: "cut off, for its end is missing",
        whole + packed({"z.png": b"1"}): "something follows its end at byte",
        bytes(damaged): "something follows its end at byte",
        gzip.compress(whole): "is compressed, so no image can be read alone",
        b"": "empty (0 bytes)",
        b"<html>not found</html>" * 100: "is no tar",
        bytes(10240): "no image in 1 shards",
        packed({"a.npy": b"1", "b.txt": b"2"}): "members are called *.npy, *.txt: write what images end in",
        packed({"a.jpg": b"1", "a.png": b"2"}): "a.jpg and a.png are of one key; write what images end in: images: jpg",
        packed({"../a.jpg": b"1"}): "../a.jpg: leads out of its folder",
        packed({"/etc/a.jpg": b"1"}): "leads out of its folder",
        packed({"a.jpg": b"1", "a.JPG": b"2"}): "a.JPG is in it twice",
    }
    for number, (payload, said) in enumerate(cases.items()):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(payload)
        message = message_of(lambda path=path: len(Shards(urls=str(path))))
        assert said in message, said
        assert f"{number}.tar" in message
    (tmp_path / "bad.tar").write_bytes(packed({"a.jpg": b"no picture"}))
    assert "bad.tar: a.jpg: no image of a known format" in message_of(
        lambda: Shards(urls=f"{tmp_path}/bad.tar").read(0)
    )


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("none-{000..001}.tar", "none-000.tar: no such shard; check the path and the numbers in braces"),
        ("none-*.tar", "no shard is called so"),
        (["a.tar", "a.tar"], "is named 2 times in urls"),
        ("s3://bucket/*.tar", "finds files of this machine alone"),
        ("nowhere://bucket/a.tar", "nowhere://bucket/a.tar: cannot be read (Protocol not known: nowhere)"),
        ("memory://none.tar", "no such shard; check the URL"),
        ("simplecache::memory://a.tar", "write filecache::"),
        ("filecache::memory://a.tar", "FSSPEC_FILECACHE_CACHE_STORAGE=/scratch/shards"),
    ],
)
def test_what_is_wrong_with_urls_is_one_line(urls: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"a.jpg": b"1"}))
    given = [urls] if isinstance(urls, str) else urls
    named = [url if "://" in url else f"{tmp_path}/{url}" for url in given]
    assert said in message_of(lambda: len(Shards(urls=named)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"urls": []}, "urls: is empty"),
        ({"urls": "a-{0..9.tar"}, "its braces are not closed"),
        ({"urls": "a-{0..999999999}.tar"}, "more than 100,000 shards"),
        ({"masks": "seg.png"}, "classes is missing"),
        ({"classes": CLASSES}, "classes is given without masks"),
        ({"masks": "seg.jpg", "classes": CLASSES}, "seg.jpg keeps no ids"),
        ({"masks": "png", "images": ".PNG", "classes": CLASSES}, "images and masks are both png"),
    ],
)
def test_what_is_wrong_with_the_keys_is_one_line(values: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(Shards, {"urls": "a.tar", **values}))


def test_a_key_in_two_shards_and_a_mask_that_is_missing_are_named(tmp_path: Path) -> None:
    members = members_of(put_pairs(tmp_path, 2))
    urls = put_shards(tmp_path, members, each=1)
    said = message_of(lambda: len(Shards(urls=urls)))
    assert "pool-000001.tar: key 00000 is also in" in said
    del members["00001.seg.png"]
    urls = put_shards(tmp_path, members, each=3)
    said = message_of(lambda: len(Shards(urls=f"{tmp_path}/pool-000000.tar", masks="seg.png", classes=CLASSES)))
    assert "no mask for 1 of the 2 images (keys 00001)" in said


# ---- behind URLs ----


class Server(ThreadingHTTPServer):
    """Files of a folder, and what is to go wrong."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.ranges = True
        self.failing = 0  # how many answers are errors
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        path = self.server.folder / self.path.lstrip("/")
        if self.server.failing > 0:
            self.server.failing -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        payload, total = path.read_bytes(), path.stat().st_size
        if asked and self.server.ranges:
            start, end = asked.removeprefix("bytes=").split("-")
            payload = payload[int(start) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(payload)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def served(server: Server, folder: Path) -> str:
    put_shards(server.folder, members_of(put_pairs(folder)))
    return f"{server.url}/pool-{{000000..000002}}.tar"


def test_shards_behind_http_are_read_in_parts_also_by_workers(server: Server, tmp_path: Path) -> None:
    urls = served(server, tmp_path)
    ours = Shards(urls=urls, masks="seg.png", classes=CLASSES)
    local = Shards(urls=f"{server.folder}/*.tar", masks="seg.png", classes=CLASSES)
    check_dataset(ours)
    assert_same(ours, local)
    assert ours.files(0) == ()
    # Forked, as the loader of a run: the connections of the process before are not theirs.
    fetched = DataLoader(_Read(ours), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for index, image in enumerate(fetched):
        np.testing.assert_array_equal(image, local.read(index).image)
    server.asked.clear()
    assert len(Shards(urls=urls)) == 5
    assert len(server.asked) == 3, "with an index they are asked for their tags alone"


class _Read:
    def __init__(self, dataset: Shards) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.dataset.read(index).image


def test_another_tag_is_another_shard(server: Server, tmp_path: Path) -> None:
    urls = served(server, tmp_path)
    assert len(Shards(urls=urls)) == 5
    path = server.folder / "pool-000002.tar"
    about = path.stat()
    path.write_bytes(packed({"y.png": (tmp_path / "images" / "00004.png").read_bytes()}).ljust(about.st_size, b"\0"))
    assert Shards(urls=urls).name(4) == "y.png"


def test_a_network_that_fails_is_asked_again_and_then_told_of(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Shards(urls=served(server, tmp_path))
    monkeypatch.setattr(shards, "PAUSES", (0.01, 0.01))
    whole = ours.read(0)
    server.failing = 2
    np.testing.assert_array_equal(ours.read(0).image, whole.image)
    server.failing = 3
    said = message_of(lambda: ours.read(0))
    assert said.startswith(f"{server.url}/pool-000000.tar: no answer, asked 3 times (503")
    monkeypatch.setattr(shards, "PAUSES", ())
    said = message_of(lambda: len(Shards(urls="http://127.0.0.1:9/a.tar")))
    assert "a.tar: no answer, asked 1 times" in said
    assert "no such shard" in message_of(lambda: len(Shards(urls=f"{server.url}/none.tar")))


def test_a_server_of_whole_files_is_refused_and_read_through_a_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = served(server, tmp_path)
    server.ranges = False
    assert f"filecache::{server.url}" in message_of(lambda: Shards(urls=urls).read(0))
    monkeypatch.setitem(fsspec.config.conf, shards.CACHE, {"cache_storage": str(tmp_path / "whole")})
    server.asked.clear()
    cached = [f"{shards.CACHE}::{urls}"]
    ours = Shards(urls=cached)
    assert_same(ours, Shards(urls=f"{server.folder}/*.tar"))
    fetched = DataLoader(_Read(ours), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert len([*fetched]) == 5
    assert len(server.asked) < 15, "none is got twice"
    new = packed({"y.png": (tmp_path / "images" / "00004.png").read_bytes()})
    (server.folder / "pool-000002.tar").write_bytes(new)
    assert Shards(urls=cached).name(4) == "y.png", "what is kept is not used for another"


def test_shards_of_any_file_system_of_fsspec(tmp_path: Path) -> None:
    members = members_of(put_pairs(tmp_path))
    put_shards(tmp_path, members)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/pool/{path.name}", path.read_bytes())
    ours = Shards(urls=["memory://pool/pool-{000000..000001}.tar", f"file://{tmp_path}/pool-000002.tar"])
    check_dataset(ours)
    assert_same(ours, Folder(images=str(tmp_path / "images")))
    assert json.loads(json.dumps(ours.dump()))["urls"][0] == "memory://pool/pool-{000000..000001}.tar"
