from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import store
from ssl_seg.config import Config, UserError
from ssl_seg.models import DecoderNet, DenseHead, EncoderNet, Features, SegmentationModel

# Children start from a server that has imported torch once and runs no threads, so that starting one takes little.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ssl_seg.store", "hypothesis", "pytest"])
SYSTEM_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]


# ---- parts ----


class Backbone(nn.Module):
    def __init__(self, width: int = 4, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.activation = activation

    def forward(self, image: Tensor) -> Features:
        first = self.activation(self.norm1(self.conv1(image)))
        second = self.activation(self.conv2(first))
        third = self.conv3(second)
        fourth = F.avg_pool2d(third, 2)
        return [first, second, third, fourth, F.avg_pool2d(fourth, 2)]


class Decoder(DecoderNet):
    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 5
        self.mix = nn.Conv2d(6, 5, 1)

    def forward(self, features: Features) -> Tensor:
        return self.mix(features[1])


def make_encoder(seed: int, width: int = 4, activation: Callable[[Tensor], Tensor] = F.relu) -> EncoderNet:
    torch.manual_seed(seed)
    encoder = EncoderNet(Backbone(width, activation), channels=(width, 6, 8, 8, 8))
    encoder(torch.rand(2, 3, 32, 32))  # so that the running statistics are not those of a fresh layer
    return encoder


def make_model(seed: int) -> SegmentationModel:
    encoder = make_encoder(seed)
    head = DenseHead(Decoder(), 2, encoder.strides)
    return SegmentationModel(encoder, head, ("road", "sky"))


class Settings(Config):
    lr: float = 1e-3
    tasks: dict[str, float] = Field(default={"denoise": 1.0})
    sides: tuple[int, int] = (32, 64)


def open_run(folder: Path, config: Config | None = None, stage: str = "pretrain", **options) -> store.Run:
    return store.Run.open(folder, stage, config or Settings(), **options)


def tensors_of(step: int, size: int = 50) -> dict[str, Tensor]:
    return {"model/a": torch.full((size,), float(step)), "optimizer/a/step": torch.tensor(step)}


def save(folder: Path, step: int, keep: tuple[int, ...] = ()) -> None:
    store.save_state(folder, step, tensors_of(step), {"step": step}, keep)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("step_")) for entry in (folder / "state").glob("step_*"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".ssl_seg")]


def message_of(action: Callable[[], object]) -> str:
    """The one line of the UserError that `action` raises."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_whole(state: store.State | None) -> None:
    assert state is not None
    assert state.skipped == []
    assert state.data == {"step": state.step}
    assert all(bool((tensor == state.step).all()) for tensor in state.tensors.values())


# ---- checkpoints ----


def test_checkpoint_comes_back_as_it_was(tmp_path):
    shared = torch.arange(12, dtype=torch.float32).view(3, 4)
    tensors = {
        "whole": shared,
        "row": shared[1],
        "transposed": shared.t(),
        "expanded": torch.tensor([2.0]).expand(5),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "grad": torch.ones(3, requires_grad=True),
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    data = {"best": -math.inf, "loss": math.nan, "names": ["é", "\u2028"], "none": None, "deep": {"a": [1, 2.5]}}
    store.save_state(tmp_path, 5, tensors, data)
    state = store.load_state(tmp_path)
    assert state.step == 5
    assert state.skipped == []
    assert state.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = state.tensors[name]
        assert loaded.dtype == tensor.dtype
        assert not loaded.requires_grad
        np.testing.assert_array_equal(loaded.numpy(), tensor.detach().numpy())
    assert math.isnan(state.data.pop("loss"))
    data.pop("loss")
    assert state.data == data


DESCRIBED = st.tuples(
    st.sampled_from(FLOATS + INTEGERS),
    st.lists(st.integers(0, 3), max_size=3),  # the shape
    st.integers(0, 2**31),  # the seed of the values
    st.booleans(),  # not contiguous
)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(NAMES, DESCRIBED, max_size=4))
@settings(max_examples=40, deadline=None)
def test_checkpoint_round_trip(described):
    tensors = {}
    for name, (dtype, shape, seed, turned) in described.items():
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
        tensors[name] = tensor.movedim(0, -1) if turned and shape else tensor
    with tempfile.TemporaryDirectory() as folder:
        store.save_state(folder, 0, tensors, {})
        loaded = store.load_state(folder).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_no_checkpoint_is_none(tmp_path):
    assert store.load_state(tmp_path) is None
    (tmp_path / "state" / ".ssl_seg-new-step_00000003").mkdir(parents=True)
    (tmp_path / "state" / "notes").mkdir()
    assert store.load_state(tmp_path) is None


def test_the_newest_two_and_the_named_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 10):
        save(tmp_path, step, keep=(2,))
    assert steps_in(tmp_path) == [2, 4, 10]
    assert store.load_state(tmp_path).step == 10
    assert store.load_state(tmp_path, step=2).step == 2
    assert "step 3" in message_of(lambda: store.load_state(tmp_path, step=3))
    store.save_state(tmp_path, 11, tensors_of(11), {}, newest=1)
    assert steps_in(tmp_path) == [11]


def test_checkpoints_are_ordered_by_number(tmp_path):
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert store.load_state(tmp_path).step == 100_000_000


def test_damaged_later_checkpoints_give_way(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "state/step_00000008/state.json").unlink()
    assert store.load_state(tmp_path).step == 4
    save(tmp_path, 6)
    assert steps_in(tmp_path) == [4, 6]


def damage_files(folder: Path, times: int, seed: int) -> None:
    """Flip one bit of, or cut, a random file of the newest checkpoint; each time the one before it must be loaded."""
    random = np.random.default_rng(seed)
    for step in (1, 2):
        save(folder, step)
    newest = folder / "state/step_00000002"
    files = sorted(newest.iterdir())
    assert [file.name for file in files] == ["manifest.json", "state.json", "state.safetensors"]
    for trial in range(times):
        file = files[trial % 3]
        intact = file.read_bytes()
        place = int(random.integers(len(intact)))
        if trial % 2:
            flipped = intact[place] ^ (1 << int(random.integers(8)))
            file.write_bytes(intact[:place] + bytes([flipped]) + intact[place + 1 :])
        else:
            file.write_bytes(intact[:place])
        state = store.load_state(folder)
        assert state.step == 1
        assert len(state.skipped) == 1
        # A digest that has changed in the manifest cannot tell itself from a changed file: then that file is named.
        assert Path(state.skipped[0]) == file or (file.name == "manifest.json" and str(newest) in state.skipped[0])
        file.write_bytes(intact)
    assert store.load_state(folder).step == 2


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    damage_files(tmp_path, times=42, seed=0)


@pytest.mark.slow
def test_every_flipped_bit_and_every_cut_is_noticed_500_times(tmp_path):
    damage_files(tmp_path, times=500, seed=1)


def test_every_cut_of_the_manifest_is_noticed(tmp_path):
    save(tmp_path, 1)
    manifest = tmp_path / "state/step_00000001/manifest.json"
    intact = manifest.read_bytes()
    for size in range(len(intact)):
        manifest.write_bytes(intact[:size])
        assert str(manifest) in message_of(lambda: store.load_state(tmp_path))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    lost = tmp_path / "state/step_00000002" / name
    lost.unlink()
    state = store.load_state(tmp_path)
    assert (state.step, state.skipped) == (1, [str(lost)])


def test_all_damaged_is_an_error_that_names_the_first_file(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        path = tmp_path / f"state/step_0000000{step}/state.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    text = message_of(lambda: store.load_state(tmp_path))
    assert "step_00000002/state.safetensors" in text
    assert "--overwrite" in text


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save(tmp_path, 1)
    for file in (tmp_path / "state/step_00000001").iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(file.read_bytes())


# ---- kills ----


def run_in_child(target: Callable, *arguments: object) -> int | None:
    child = PROCESSES.Process(target=target, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def save_without_end(folder: Path, first: int, saved: Connection) -> None:
    for step in count(first):
        store.save_state(folder, step, tensors_of(step, size=100_000), {"step": step})
        saved.send(step)


def kill_while_saving(folder: Path, times: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    step = 0
    for _ in range(times):
        reader, writer = PROCESSES.Pipe(duplex=False)
        child = PROCESSES.Process(target=save_without_end, args=(folder, step + 1, writer))
        child.start()
        writer.close()
        step = reader.recv()
        time.sleep(random.uniform(0.0, 0.03))
        child.kill()
        child.join()
        while reader.poll():
            try:
                step = reader.recv()
            except EOFError:
                break
        reader.close()
        state = store.load_state(folder)
        assert_whole(state)
        assert step <= state.step <= step + 1  # a commit may come before the word that it has
        step = state.step


def test_kill_9_while_saving_loses_nothing(tmp_path):
    kill_while_saving(tmp_path, times=8, seed=0)


@pytest.mark.slow
def test_200_kills_while_saving_lose_nothing(tmp_path):
    kill_while_saving(tmp_path, times=200, seed=1)


def exit_at_call(number: int, action: Callable[[Path], None], folder: Path) -> None:
    """Do `action`, but die without a trace right before its system call of that number."""
    calls = count()

    def dying(call: Callable) -> Callable:
        def counted(*arguments, **options):
            if next(calls) == number:
                os._exit(9)
            return call(*arguments, **options)

        return counted

    for name in SYSTEM_CALLS:
        setattr(os, name, dying(getattr(os, name)))
    action(folder)


def crash_everywhere(
    folder: Path, prepare: Callable[[Path], None], action: Callable[[Path], None], check: Callable[[Path], None]
) -> int:
    """Kill `action` at each of its system calls, on a fresh copy of what `prepare` made; then `check` the folder."""
    prepare(folder / "template")
    for number in count():
        trial = folder / str(number)
        shutil.copytree(folder / "template", trial)
        exitcode = run_in_child(exit_at_call, number, action, trial)
        check(trial)
        shutil.rmtree(trial)
        if exitcode == 0:
            return number
        assert exitcode == 9


def save_1_and_2(folder: Path) -> None:
    save(folder, 1)
    save(folder, 2)


def save_3(folder: Path) -> None:
    save(folder, 3)


def save_2_again(folder: Path) -> None:
    store.save_state(folder, 2, tensors_of(2, size=70), {"step": 2})


def check_checkpoints(folder: Path) -> None:
    state = store.load_state(folder)
    assert_whole(state)
    assert state.step in (2, 3)
    for step in steps_in(folder):
        assert_whole(store.load_state(folder, step))
    save(folder, 4)
    assert_whole(store.load_state(folder))
    assert leftovers(folder) == []
    assert steps_in(folder) == [state.step, 4]


@pytest.mark.parametrize("action", [save_3, save_2_again])
def test_a_kill_at_each_system_call_of_a_save_loses_nothing(tmp_path, action):
    assert crash_everywhere(tmp_path, save_1_and_2, action, check_checkpoints) >= 10


def export_0(folder: Path) -> None:
    store.export_encoder(folder, make_encoder(0), {"seed": 0})
    store.export_decoder(folder, "denoise", Decoder())


def export_1(folder: Path) -> None:
    store.export_encoder(folder, make_encoder(1), {"seed": 1})
    store.export_decoder(folder, "inpaint", Decoder())


def check_exports(folder: Path) -> None:
    encoder = make_encoder(2)
    assert store.load_encoder(encoder, folder).features_equal
    seed = store.read_encoder_info(folder)["config"]["seed"]
    assert torch.equal(encoder.backbone.conv1.weight, make_encoder(seed).backbone.conv1.weight)
    assert store.load_decoder(Decoder(), folder, "denoise").share == 1.0


def test_a_kill_at_each_system_call_of_an_export_leaves_the_old_or_the_new(tmp_path):
    assert crash_everywhere(tmp_path, export_0, export_1, check_exports) >= 20


def make_folder(folder: Path) -> None:
    folder.mkdir()


def make_finished_run(folder: Path) -> None:
    with open_run(folder) as run:
        run.metrics(1, {"loss": 1.0})
        run.save_state(1, tensors_of(1), {"step": 1})
        run.picture_path("denoise", 1).write_bytes(b"picture")


def start(folder: Path) -> None:
    open_run(folder)


def start_anew(folder: Path) -> None:
    open_run(folder, Settings(lr=0.5), overwrite=True)


def resume(folder: Path) -> None:
    run = open_run(folder)
    assert run.resume().step == 1


def check_same_command_starts(folder: Path) -> None:
    with open_run(folder) as run:
        assert run.resume() is None
    assert leftovers(folder) == []


def check_same_command_starts_anew(folder: Path) -> None:
    with open_run(folder, Settings(lr=0.5), overwrite=True) as run:
        assert run.resume() is None
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "lock", "run.json"]


def check_resumes(folder: Path) -> None:
    with open_run(folder) as run:
        assert_whole(run.resume())
    assert store.read_metrics(folder) == [{"step": 1, "loss": 1.0}]
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    ("prepare", "action", "check"),
    [
        (make_folder, start, check_same_command_starts),
        (make_finished_run, start_anew, check_same_command_starts_anew),
        (make_finished_run, resume, check_resumes),
    ],
)
def test_a_kill_at_each_system_call_of_a_start_lets_the_same_command_go_on(tmp_path, prepare, action, check):
    assert crash_everywhere(tmp_path, prepare, action, check) >= 5


# ---- full disks ----


class FullDisk:
    """System calls of which the one numbered `failing` finds no room."""

    def __init__(self, failing: int) -> None:
        self.failing = failing
        self.calls = 0

    def wrap(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            self.calls += 1
            if self.calls == self.failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return counted


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("failing", range(2, 8))  # the first makes a folder that is there
def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch, step, failing):
    save_1_and_2(tmp_path)
    disk = FullDisk(failing)
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        text = message_of(lambda: store.save_state(tmp_path, step, tensors_of(step), {"step": step}))
    assert "No space left on device" in text
    assert str(tmp_path / "state") in text
    assert leftovers(tmp_path) == []
    assert_whole(store.load_state(tmp_path))
    assert {1, 2} <= set(steps_in(tmp_path))
    save(tmp_path, 4)
    assert store.load_state(tmp_path).step == 4


def test_a_log_that_finds_no_room_is_one_line(tmp_path, monkeypatch):
    run = open_run(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", FullDisk(1).wrap(os.fsync))
    assert "result.json" in message_of(lambda: run.write_json("result.json", {"miou": 0.5}))
    monkeypatch.setattr(os, "fsync", FullDisk(1).wrap(os.fsync))
    run.metrics(1, {"loss": 1.0})
    assert "metrics.jsonl" in message_of(lambda: run.save_state(1, {}, {}))
    (tmp_path / "a/pictures").write_text("in the way")
    assert "pictures" in message_of(lambda: run.picture_path("x", 1))


def save_with_little_room(folder: Path, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        store.save_state(folder, 3, tensors_of(3, size=1000), {"step": 3})
    except UserError as error:
        answer.send(str(error))


def test_a_write_that_fails_is_named_with_its_size(tmp_path):
    save_1_and_2(tmp_path)
    reader, writer = PROCESSES.Pipe(duplex=False)
    assert run_in_child(save_with_little_room, tmp_path, writer) == 0
    text = reader.recv()
    assert "step_00000003" in text
    needed = next(int(word) for word in text.split() if word.isdigit())
    assert 4000 < needed < 5000
    assert leftovers(tmp_path) == []
    assert steps_in(tmp_path) == [1, 2]


# ---- the run folder ----


def test_a_run_writes_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ssl-seg", "pretrain", "my config.yaml"])
    folder = tmp_path / "runs/a"
    with open_run(folder, device="2 x cuda", seed=3) as run:
        assert json.loads((folder / "run.json").read_text())["status"] == "running"
        run.write_json("result.json", {"miou": math.nan, "steps": 5})
        assert run.read_json("result.json") == {"miou": None, "steps": 5}
        assert run.read_json("tasks.json") is None
        with pytest.raises(ValueError, match="RUN_FILES"):
            run.write_json("other.json", {})
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["command"] == "ssl-seg pretrain 'my config.yaml'"
    assert (record["device"], record["seed"], record["stage"]) == ("2 x cuda", 3, "pretrain")
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert record["started"] <= record["ended"]
    assert record["config"] == Settings().dump()
    assert "lr: 0.001" in (folder / "config.yaml").read_text()


def test_the_commit_of_the_checkout_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run(tmp_path / "a")._record["git_commit"] is None
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "x")):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert open_run(tmp_path / "b")._record["git_commit"] == head


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "failed"), (KeyboardInterrupt, "killed"), (SystemExit, "killed")]
)
def test_the_status_tells_how_a_run_ended(tmp_path, error, status):
    with pytest.raises(error), open_run(tmp_path / "a"):
        raise error
    assert json.loads((tmp_path / "a/run.json").read_text())["status"] == status
    open_run(tmp_path / "a").close("killed")
    record = json.loads((tmp_path / "a/run.json").read_text())
    assert record["status"] == "killed"
    assert len(record["resumed"]) == 1


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    with open_run(tmp_path / "a", main=False) as run:
        run.metrics(1, {"loss": 1.0})
        run.save_state(1, {}, {})
        run.write_json("result.json", {})
        run.picture_path("x", 1)
        assert run.resume() is None
    assert list(tmp_path.iterdir()) == []


def test_a_changed_config_is_refused_by_its_first_key(tmp_path):
    make_finished_run(tmp_path / "a")
    changed = Settings(lr=0.01, sides=(32, 32))
    text = message_of(lambda: open_run(tmp_path / "a", changed))
    for part in ("lr was 0.001 and is now 0.01", "--overwrite", "--allow-changed lr"):
        assert part in text
    assert "sides" in message_of(lambda: open_run(tmp_path / "a", changed, allow_changed=["lr"]))
    added = Settings(tasks={"denoise": 1.0, "jigsaw": 0.5})
    assert "tasks.jigsaw was null and is now 0.5" in message_of(lambda: open_run(tmp_path / "a", added))
    with open_run(tmp_path / "a", changed, allow_changed=["lr", "si*"]) as run:
        assert run.resume().step == 1
    open_run(tmp_path / "a", changed).close()  # what was allowed is the run's config from then on


def test_another_stage_is_refused(tmp_path):
    make_finished_run(tmp_path / "a")
    assert "pretrain" in message_of(lambda: open_run(tmp_path / "a", stage="finetune"))


def test_a_finished_run_without_checkpoints_is_refused(tmp_path):
    open_run(tmp_path / "a").close()
    assert "finished" in message_of(lambda: open_run(tmp_path / "a"))
    open_run(tmp_path / "a", overwrite=True).close()


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(tmp_path):
    run = open_run(tmp_path / "a")
    run.metrics(1, {"loss": 1.0})
    run.write_json("tasks.json", {"denoise": {}})
    run.close("failed")
    with open_run(tmp_path / "a") as run:
        assert run.read_json("tasks.json") is None
        assert run.resume() is None
        assert store.read_metrics(tmp_path / "a") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite):
    (tmp_path / "state").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    text = message_of(lambda: open_run(tmp_path, overwrite=overwrite))
    assert "notes.txt" in text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.txt", "state"]


def test_overwrite_deletes_only_what_a_run_writes(tmp_path):
    folder = tmp_path / "a"
    make_finished_run(folder)
    outside = tmp_path / "photos"
    outside.mkdir()
    (outside / "1.png").write_bytes(b"photo")
    (folder / "notes.txt").write_text("mine")
    (folder / "encoder").symlink_to(outside)
    with open_run(folder, Settings(lr=0.5), overwrite=True) as run:
        assert run.resume() is None
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "lock", "notes.txt", "run.json"]
    assert (outside / "1.png").exists()


def test_an_empty_folder_becomes_a_run(tmp_path):
    open_run(tmp_path).close()
    assert (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_run_json_of_other_origin_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert "run.json" in message_of(lambda: open_run(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in message_of(lambda: open_run(tmp_path / "file"))
    assert "cannot be used" in message_of(lambda: open_run(tmp_path / "file/a"))
    assert "cannot be used" in message_of(lambda: open_run(tmp_path / ("a" * 300)))


def test_a_folder_without_write_permission_is_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    make_finished_run(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # The tests may run as root, whom no permission binds.
    monkeypatch.setattr(os, "open", forbidden)
    text = message_of(lambda: open_run(folder))
    monkeypatch.undo()
    assert "Permission denied" in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_runs_in_one_process_cannot_share_a_folder(tmp_path):
    with open_run(tmp_path / "a"):
        text = message_of(lambda: open_run(tmp_path / "a", overwrite=True))
        assert f"in use by process {os.getpid()}" in text
    make_finished_run(tmp_path / "b")
    open_run(tmp_path / "b").close()


def test_a_refused_start_lets_go_of_the_folder(tmp_path):
    make_finished_run(tmp_path / "a")
    for _ in range(2):
        assert "lr was" in message_of(lambda: open_run(tmp_path / "a", Settings(lr=1.0)))


def hold_run(folder: Path, answer: Connection) -> None:
    open_run(folder)
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    answer.send((os.getpid(), worker))
    time.sleep(60)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    reader, writer = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=hold_run, args=(tmp_path / "a", writer))
    child.start()
    holder, worker = reader.recv()
    try:
        assert f"in use by process {holder}" in message_of(lambda: open_run(tmp_path / "a"))
        child.kill()
        child.join()
        os.kill(worker, 0)  # its worker still lives, as a data loader's does for seconds, and holds nothing
        open_run(tmp_path / "a").close()
    finally:
        os.kill(worker, 9)


# ---- metrics ----


def test_metrics_come_back(tmp_path):
    run = open_run(tmp_path / "a")
    run.metrics(1, {"train/loss": torch.tensor(0.25), "lr": 1e-3})
    run.metrics(2, {"train/loss": math.nan, "lr": math.inf})
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 0.25, "lr": 0.001},
        {"step": 2, "train/loss": None, "lr": None},
    ]
    assert "NaN" not in "".join(lines)
    first, second = store.read_metrics(tmp_path / "a")
    assert first == {"step": 1, "train/loss": 0.25, "lr": 0.001}
    assert math.isnan(second["lr"])
    assert store.read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', '{"step": 3, "loss": 3.0}', "\x00\x00"])
def test_resuming_drops_the_metrics_after_the_checkpoint_and_a_torn_line(tmp_path, torn):
    run = open_run(tmp_path / "a")
    for step in (1, 2, 3, 4, 5):
        run.metrics(step, {"loss": step})
        if step == 3:
            run.save_state(3, tensors_of(3), {"step": 3})
    run.close("killed")
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [line["step"] for line in store.read_metrics(tmp_path / "a")] == [1, 2, 3, 4, 5]
    with open_run(tmp_path / "a") as run:
        assert run.resume().step == 3
        run.metrics(4, {"loss": 4.5})
    assert [tuple(line.values()) for line in store.read_metrics(tmp_path / "a")] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert "line 2" in message_of(lambda: store.read_metrics(tmp_path))


def test_pictures_have_a_place(tmp_path):
    run = open_run(tmp_path / "a")
    path = run.picture_path("val/denoise", 250)
    assert path == tmp_path / "a/pictures/00000250_val_denoise.png"
    path.write_bytes(b"")


# ---- receipts ----


def write_foreign(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def replace_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an exported encoder as a tool would that keeps the sha256 right."""
    file = folder / "encoder/encoder.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    described = file.with_suffix(".json")
    info = json.loads(described.read_text())
    described.write_text(json.dumps({**info, "sha256": store._file_sha256(file)}))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("place", ["", "encoder", "encoder/encoder.safetensors"])
def test_an_encoder_comes_back_with_a_full_receipt(tmp_path, place):
    exported, encoder = make_encoder(0), make_encoder(1)
    store.export_encoder(tmp_path, exported, {"norm": "keep"}, {"steps": 7})
    receipt = store.load_encoder(encoder, tmp_path / place)
    assert same_weights(encoder, exported)
    assert (receipt.share, receipt.features_equal) == (1.0, True)
    assert receipt.matched == {name: name for name in encoder.state_dict()}
    unusual = (receipt.renamed, receipt.missing, receipt.left_over, receipt.mismatched, receipt.converted)
    assert not any(unusual)
    assert "100.0%" in receipt.summary()
    assert "features equal" in receipt.summary()
    json.dumps(asdict(receipt))
    info = store.read_encoder_info(tmp_path / place)
    assert (info["config"], info["channels"], info["steps"]) == ({"norm": "keep"}, [4, 6, 8, 8, 8], 7)
    assert sorted(entry.name for entry in (tmp_path / "encoder").iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_the_files_can_be_read_by_others(tmp_path):
    former = os.umask(0o022)
    try:
        store.export_encoder(tmp_path, make_encoder(0), {})
    finally:
        os.umask(former)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "encoder").iterdir()} == {"0o644"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "_orig_mod.", "module._orig_mod.encoder."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, suffix, prefix):
    exported, encoder = make_encoder(0), make_encoder(1)
    path = write_foreign(tmp_path / f"x{suffix}", {prefix + name: t for name, t in exported.state_dict().items()})
    receipt = store.load_encoder(encoder, path)
    assert same_weights(encoder, exported)
    assert (receipt.share, receipt.features_equal) == (1.0, None)
    assert len(receipt.renamed) == (len(receipt.matched) if prefix else 0)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_torch_checkpoint_may_hold_its_tensors_under_a_key(tmp_path, key):
    exported, encoder = make_encoder(0), make_encoder(1)
    torch.save({key: exported.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    store.load_encoder(encoder, tmp_path / "x.pth")
    assert same_weights(encoder, exported)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_torch_checkpoint_runs_no_code(tmp_path):
    torch.save({"state_dict": make_encoder(0).state_dict(), "x": Canary(tmp_path / "canary")}, tmp_path / "x.pt")
    assert "x.pt" in message_of(lambda: store.load_encoder(make_encoder(1), tmp_path / "x.pt"))
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol=2))
    assert "y.pt" in message_of(lambda: store.load_encoder(make_encoder(1), tmp_path / "y.pt"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": {"b": torch.ones(1)}}}, torch.ones(3)])
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "x.pt" in message_of(lambda: store.load_encoder(make_encoder(1), tmp_path / "x.pt"))


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin"])
@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 100, b"PK\x03\x04" + b"\0" * 50, bytes(range(256))])
def test_a_file_of_another_kind_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in message_of(lambda: store.load_encoder(make_encoder(1), tmp_path / name))


def test_missing_and_left_over_tensors_are_refused_unless_allowed(tmp_path):
    tensors = make_encoder(0).state_dict()
    tensors["fc.weight"] = torch.ones(3)
    del tensors["backbone.conv3.weight"]
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    encoder, untouched = make_encoder(1), make_encoder(1)
    text = message_of(lambda: store.load_encoder(encoder, path))
    for part in ("1 missing: backbone.conv3.weight", "1 left over: fc.weight", "init_allow=[backbone.conv3.weight]"):
        assert part in text
    assert "fc.weight" in message_of(lambda: store.load_encoder(encoder, path, ["backbone.conv3.*"]))
    assert same_weights(encoder, untouched)
    receipt = store.load_encoder(encoder, path, ["backbone.conv3.*", "fc.*"])
    assert (receipt.missing, receipt.left_over) == (["backbone.conv3.weight"], ["fc.weight"])
    counts = [parameter.numel() for parameter in encoder.parameters()]
    absent = encoder.backbone.conv3.weight.numel()
    assert receipt.share == pytest.approx(1 - absent / sum(counts))
    assert torch.equal(encoder.backbone.conv1.weight, tensors["backbone.conv1.weight"])
    assert torch.equal(encoder.backbone.conv3.weight, untouched.backbone.conv3.weight)


def test_another_encoder_is_refused_by_its_shapes(tmp_path):
    store.export_encoder(tmp_path, make_encoder(0, width=5), {})
    text = message_of(lambda: store.load_encoder(make_encoder(1), tmp_path))
    assert "backbone.conv1.weight (5, 3, 3, 3) for (4, 3, 3, 3)" in text
    globs = ["backbone.conv1.*", "backbone.norm1.*", "backbone.conv2.weight"]
    receipt = store.load_encoder(make_encoder(1), tmp_path, globs)
    assert receipt.features_equal is False
    assert 0.0 < receipt.share < 1.0
    assert receipt.mismatched["backbone.conv1.weight"] == "(5, 3, 3, 3) for (4, 3, 3, 3)"


def test_weights_of_another_kind_of_number_are_refused(tmp_path):
    tensors = make_encoder(0).state_dict()
    tensors["backbone.conv1.weight"] = torch.ones(4, 3, 3, 3, dtype=torch.uint8)
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    assert "torch.uint8 for torch.float32" in message_of(lambda: store.load_encoder(make_encoder(1), path))


def test_a_file_that_gives_nothing_is_refused_even_when_everything_is_allowed(tmp_path):
    # The normalization's constants match in every encoder of ours, so they must not count.
    tensors = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1), "layer1.weight": torch.ones(2)}
    path = write_foreign(tmp_path / "x.safetensors", tensors)
    assert "layer1.weight" in message_of(lambda: store.load_encoder(make_encoder(1), path, ["*"]))
    empty = write_foreign(tmp_path / "empty.safetensors", {})
    assert "no tensors" in message_of(lambda: store.load_encoder(make_encoder(1), empty, ["*"]))


def swap_colours(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.conv1.weight"] = tensors["backbone.conv1.weight"].flip(1).contiguous()


def forget_statistics(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.norm1.running_mean"].zero_()
    tensors["backbone.norm1.running_var"].fill_(1.0)


def nudge_the_last_stage(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.conv3.weight"][0, 0, 0, 0] += 0.01


def swap_the_order_of_features(tensors: dict[str, Tensor]) -> None:
    for name in ("weight", "bias"):
        tensors[f"backbone.conv3.{name}"] = tensors[f"backbone.conv3.{name}"].flip(0).contiguous()


@pytest.mark.parametrize("change", [swap_colours, forget_statistics, nudge_the_last_stage, swap_the_order_of_features])
def test_features_tell_what_names_and_shapes_do_not(tmp_path, change):
    store.export_encoder(tmp_path, make_encoder(0), {})
    replace_weights(tmp_path, change)
    encoder, untouched = make_encoder(1), make_encoder(1)
    text = message_of(lambda: store.load_encoder(encoder, tmp_path))
    assert "init_allow=[features]" in text
    assert same_weights(encoder, untouched)
    receipt = store.load_encoder(encoder, tmp_path, ["features"])
    assert (receipt.share, receipt.features_equal) == (1.0, False)
    assert "features differ" in receipt.summary()


def test_the_same_weights_in_another_architecture_are_refused(tmp_path):
    store.export_encoder(tmp_path, make_encoder(0), {})
    assert "other features" in message_of(lambda: store.load_encoder(make_encoder(0, activation=F.silu), tmp_path))
    dilated = make_encoder(0, activation=F.silu)
    dilated.strides = (2, 4, 8, 16, 16)
    text = message_of(lambda: store.load_encoder(dilated, tmp_path))
    assert "strides [2, 4, 8, 16, 16] here and [2, 4, 8, 16, 32] there" in text


def test_a_file_changed_after_its_export_is_refused(tmp_path):
    store.export_encoder(tmp_path, make_encoder(0), {})
    file = tmp_path / "encoder/encoder.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    text = message_of(lambda: store.load_encoder(make_encoder(1), tmp_path, ["*"]))
    assert "encoder.safetensors" in text
    assert "sha256" in text


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_an_export_without_its_json_is_refused(tmp_path, content):
    store.export_encoder(tmp_path, make_encoder(0), {})
    described = tmp_path / "encoder/encoder.json"
    described.unlink()
    if content is not None:
        described.write_text(content)
    assert "encoder.json" in message_of(lambda: store.load_encoder(make_encoder(1), tmp_path))


def test_half_precision_is_converted_and_reported(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in make_encoder(0).state_dict().items()}
    encoder = make_encoder(1)
    receipt = store.load_encoder(encoder, write_foreign(tmp_path / "x.safetensors", half))
    assert receipt.converted["backbone.conv1.weight"] == "torch.float16 to torch.float32"
    assert "converted" in receipt.summary()
    assert torch.equal(encoder.backbone.conv1.weight, half["backbone.conv1.weight"].float())
    store.export_encoder(tmp_path, make_encoder(0).half(), {})
    assert store.load_encoder(encoder, tmp_path).features_equal


def test_a_fingerprint_leaves_the_network_as_it_is():
    encoder = make_encoder(0)
    encoder.backbone.norm1.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    dice = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = store.fingerprint(encoder)
    assert inside == store.fingerprint(encoder)
    assert torch.equal(torch.get_rng_state(), dice)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_fingerprint_bears_a_map_that_is_absent():
    encoder = make_encoder(0)
    encoder.backbone.forward = lambda image: [image[:, :0], image]
    assert [len(level) for level in store.fingerprint(encoder)] == [0, 6]


def test_a_diverged_encoder_is_not_exported(tmp_path):
    encoder = make_encoder(0)
    with torch.no_grad():
        encoder.backbone.conv2.bias[0] = math.nan
    assert "not finite" in message_of(lambda: store.export_encoder(tmp_path, encoder, {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_place_without_an_export_is_one_line(tmp_path, name):
    text = message_of(lambda: store.load_encoder(make_encoder(0), tmp_path / name))
    assert str(tmp_path / name) in text


def test_decoders_of_several_tasks_lie_side_by_side(tmp_path):
    torch.manual_seed(0)
    first, second, third = Decoder(), Decoder(), Decoder()
    store.export_decoder(tmp_path, "denoise", first, {"type": "toy"})
    store.export_decoder(tmp_path, "inpaint", second)
    store.export_decoder(tmp_path, "inpaint", third)
    decoder = Decoder()
    assert store.load_decoder(decoder, tmp_path, "denoise").share == 1.0
    assert same_weights(decoder, first)
    store.load_decoder(decoder, tmp_path / "decoders", "inpaint")
    assert same_weights(decoder, third)
    store.load_decoder(decoder, tmp_path / "decoders/denoise.safetensors", "denoise")
    assert same_weights(decoder, first)
    assert "decoders/jigsaw" in message_of(lambda: store.load_decoder(decoder, tmp_path, "jigsaw"))
    assert "../x" in message_of(lambda: store.export_decoder(tmp_path, "../x", decoder))


@pytest.mark.parametrize("place", ["", "model", "model/model.safetensors"])
def test_a_model_comes_back_with_what_must_be_known_of_it(tmp_path, place):
    exported, model = make_model(0), make_model(1)
    store.export_model(tmp_path, exported, {"norm": "keep"}, {"resize": (64, 96), "metrics": {"miou": math.nan}})
    info = store.read_model_info(tmp_path / place)
    assert info["config"] == {"norm": "keep"}
    assert info["class_names"] == ["road", "sky"]
    assert info["resize"] == [64, 96]
    assert info["metrics"] == {"miou": None}
    assert "RGB in [0, 1]" in info["preprocessing"]
    receipt = store.load_model_weights(model, tmp_path / place)
    assert receipt.features_equal
    assert same_weights(model, exported)


def test_a_model_file_without_its_json_has_no_info(tmp_path):
    path = write_foreign(tmp_path / "model.safetensors", make_model(0).state_dict())
    assert "model.json" in message_of(lambda: store.read_model_info(path))


def test_an_encoder_can_be_taken_out_of_a_whole_model(tmp_path):
    exported, encoder = make_model(0), make_encoder(1)
    store.export_model(tmp_path, exported, {})
    path = shutil.copy(tmp_path / "model/model.safetensors", tmp_path / "weights.safetensors")
    receipt = store.load_encoder(encoder, path, ["head.*"])
    assert same_weights(encoder, exported.encoder)
    assert receipt.renamed["backbone.conv1.weight"] == "encoder.backbone.conv1.weight"


def test_tensors_are_paired_with_exact_names_first():
    module = nn.Linear(2, 2)
    given = {"module.weight": torch.zeros(2, 2), "weight": torch.ones(2, 2), "encoder.bias": torch.ones(2)}
    receipt = store.match_tensors(Path("x"), module, given)
    assert receipt.matched == {"weight": "weight", "bias": "encoder.bias"}
    assert receipt.left_over == ["module.weight"]
