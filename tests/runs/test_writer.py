from __future__ import annotations

import errno
import json
import math
import os
import pickle
import subprocess
import tempfile
import time
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor

from ssl_seg.config import Config
from ssl_seg.runs.checkpoint import State, load_state, save_state
from ssl_seg.runs.folder import TIME, read_metrics
from ssl_seg.runs.writer import EXPORTS, Run
from tests.faults import FullDisk, crash_everywhere, leftovers, message_of
from tests.processes import PROCESSES

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]


# ---- parts ----


class Settings(Config):
    lr: float = 1e-3
    tasks: dict[str, float] = Field(default={"denoise": 1.0})
    sides: tuple[int, int] = (32, 64)


def open_run(folder: Path, config: Config | None = None, stage: str = "pretrain", **options) -> Run:
    return Run.open(folder, stage, config or Settings(), **options)


def logged(folder: Path) -> list[dict[str, float]]:
    """The metrics without the time of day."""
    return [{key: value for key, value in line.items() if key != TIME} for line in read_metrics(folder)]


def tensors_of(step: int, size: int = 50) -> dict[str, Tensor]:
    return {"model/a": torch.full((size,), float(step)), "optimizer/a/step": torch.tensor(step)}


def save(folder: Path, step: int, keep: tuple[int, ...] = ()) -> None:
    save_state(folder, step, tensors_of(step), {"step": step}, keep)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("step_")) for entry in (folder / "state").glob("step_*"))


def assert_whole(state: State | None) -> None:
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
    save_state(tmp_path, 5, tensors, data)
    state = load_state(tmp_path)
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
        save_state(folder, 0, tensors, {})
        loaded = load_state(folder).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_no_checkpoint_is_none(tmp_path):
    assert load_state(tmp_path) is None
    (tmp_path / "state" / ".ssl_seg-new-step_00000003").mkdir(parents=True)
    (tmp_path / "state" / "notes").mkdir()
    assert load_state(tmp_path) is None


def test_the_newest_two_and_the_named_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 10):
        save(tmp_path, step, keep=(2,))
    assert steps_in(tmp_path) == [2, 4, 10]
    assert load_state(tmp_path).step == 10
    assert load_state(tmp_path, step=2).step == 2
    assert "step 3" in message_of(lambda: load_state(tmp_path, step=3))


def test_checkpoints_are_ordered_by_number(tmp_path):
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert load_state(tmp_path).step == 100_000_000


def test_damaged_later_checkpoints_give_way(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "state/step_00000008/state.json").unlink()
    assert load_state(tmp_path).step == 4
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
        state = load_state(folder)
        assert state.step == 1
        assert len(state.skipped) == 1
        # A digest that has changed in the manifest cannot tell itself from a changed file: then that file is named.
        assert Path(state.skipped[0]) == file or (file.name == "manifest.json" and str(newest) in state.skipped[0])
        file.write_bytes(intact)
    assert load_state(folder).step == 2


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
        assert str(manifest) in message_of(lambda: load_state(tmp_path))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    lost = tmp_path / "state/step_00000002" / name
    lost.unlink()
    state = load_state(tmp_path)
    assert (state.step, state.skipped) == (1, [str(lost)])


def test_all_damaged_is_an_error_that_names_the_first_file(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        path = tmp_path / f"state/step_0000000{step}/state.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    text = message_of(lambda: load_state(tmp_path))
    assert "step_00000002/state.safetensors" in text
    assert "--overwrite" in text


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save(tmp_path, 1)
    for file in (tmp_path / "state/step_00000001").iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(file.read_bytes())


# ---- kills ----


def save_without_end(folder: Path, first: int, saved: Connection) -> None:
    for step in count(first):
        save_state(folder, step, tensors_of(step, size=100_000), {"step": step})
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
        state = load_state(folder)
        assert_whole(state)
        assert step <= state.step <= step + 1  # a commit may come before the word that it has
        step = state.step


def test_kill_9_while_saving_loses_nothing(tmp_path):
    kill_while_saving(tmp_path, times=8, seed=0)


@pytest.mark.slow
def test_200_kills_while_saving_lose_nothing(tmp_path):
    kill_while_saving(tmp_path, times=200, seed=1)


def save_1_and_2(folder: Path) -> None:
    save(folder, 1)
    save(folder, 2)


def save_3(folder: Path) -> None:
    save(folder, 3)


def save_2_again(folder: Path) -> None:
    save_state(folder, 2, tensors_of(2, size=70), {"step": 2})


def check_checkpoints(folder: Path) -> None:
    state = load_state(folder)
    assert_whole(state)
    assert state.step in (2, 3)
    for step in steps_in(folder):
        assert_whole(load_state(folder, step))
    save(folder, 4)
    assert_whole(load_state(folder))
    assert leftovers(folder) == []
    assert steps_in(folder) == [state.step, 4]


@pytest.mark.parametrize("action", [save_3, save_2_again])
def test_a_kill_at_each_system_call_of_a_save_loses_nothing(tmp_path, action):
    assert crash_everywhere(tmp_path, save_1_and_2, action, check_checkpoints) >= 10


def make_folder(folder: Path) -> None:
    folder.mkdir()


def make_finished_run(folder: Path) -> None:
    with open_run(folder) as run:
        run.metrics(1, {"loss": 1.0})
        run.save_state(1, tensors_of(1), {"step": 1})
        run.picture_path("denoise", 1).write_bytes(b"picture")


def make_run_without_checkpoint(folder: Path) -> None:
    run = open_run(folder)
    run.metrics(1, {"loss": 1.0})
    run.write_json("tasks.json", {"denoise": {}})
    run.picture_path("denoise", 1).write_bytes(b"picture")
    (folder / "state/.ssl_seg-new-step_00000001").mkdir(parents=True)
    run.close("killed")


def start(folder: Path) -> None:
    open_run(folder)


def start_anew(folder: Path) -> None:
    open_run(folder, Settings(lr=0.5), overwrite=True)


def start_changed(folder: Path) -> None:
    open_run(folder, Settings(lr=0.5))


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


def check_same_changed_command_starts_anew(folder: Path) -> None:
    with open_run(folder, Settings(lr=0.5)) as run:
        assert run.resume() is None
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "lock", "run.json"]


def check_resumes(folder: Path) -> None:
    with open_run(folder) as run:
        assert_whole(run.resume())
    assert logged(folder) == [{"step": 1, "loss": 1.0}]
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    ("prepare", "action", "check"),
    [
        (make_folder, start, check_same_command_starts),
        (make_finished_run, start_anew, check_same_command_starts_anew),
        (make_run_without_checkpoint, start_changed, check_same_changed_command_starts_anew),
        (make_finished_run, resume, check_resumes),
    ],
)
def test_a_kill_at_each_system_call_of_a_start_lets_the_same_command_go_on(tmp_path, prepare, action, check):
    assert crash_everywhere(tmp_path, prepare, action, check) >= 5


# ---- full disks ----


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("failing", range(2, 8))  # the first makes a folder that is there
def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch, step, failing):
    save_1_and_2(tmp_path)
    disk = FullDisk(failing)
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        text = message_of(lambda: save_state(tmp_path, step, tensors_of(step), {"step": step}))
    assert "No space left on device" in text
    assert str(tmp_path / "state") in text
    assert leftovers(tmp_path) == []
    assert_whole(load_state(tmp_path))
    assert {1, 2} <= set(steps_in(tmp_path))
    save(tmp_path, 4)
    assert load_state(tmp_path).step == 4


def test_a_log_that_finds_no_room_is_one_line(tmp_path, monkeypatch):
    run = open_run(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", FullDisk(1).wrap(os.fsync))
    assert "result.json" in message_of(lambda: run.write_json("result.json", {"miou": 0.5}))
    monkeypatch.setattr(os, "fsync", FullDisk(1).wrap(os.fsync))
    run.metrics(1, {"loss": 1.0})
    assert "metrics.jsonl" in message_of(lambda: run.save_state(1, {}, {}))
    (tmp_path / "a/pictures").write_text("in the way")
    assert "pictures" in message_of(lambda: run.picture_path("x", 1))


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
    folder = tmp_path / "a"

    def stop() -> None:
        with open_run(folder) as run:
            run.save_state(1, tensors_of(1), {"step": 1})
            raise error

    with pytest.raises(error):
        stop()
    first = json.loads((tmp_path / "a/run.json").read_text())
    assert (first["status"], first["resumed"]) == (status, [])
    run = open_run(tmp_path / "a")
    run.go_on()
    run.close("killed")
    record = json.loads((tmp_path / "a/run.json").read_text())
    assert record["status"] == "killed"
    assert record["started"] == first["started"]
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
        run.go_on()
    open_run(tmp_path / "a", changed).close()  # what was allowed is the run's config from then on


def test_a_changed_config_that_fails_before_it_goes_on_leaves_the_record_of_the_former(tmp_path):
    make_finished_run(tmp_path / "a")
    files_of = [tmp_path / "a" / name for name in ("run.json", "config.yaml")]
    config = json.loads(files_of[0].read_text())["config"]
    described = files_of[1].read_text()

    def fail_before_it_goes_on() -> None:
        with open_run(tmp_path / "a", Settings(lr=0.5), allow_changed=["lr"]) as run:
            run.write_json("data.json", {"pool": {"images": 3}})
            assert run.read_json("data.json") == {"pool": {"images": 3}}, "the run itself sees what it has written"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_before_it_goes_on()
    record = json.loads(files_of[0].read_text())
    assert (record["config"], record["status"], record["resumed"]) == (config, "failed", [])
    assert files_of[1].read_text() == described
    assert not (tmp_path / "a" / "data.json").exists()
    open_run(tmp_path / "a").close()


def test_another_stage_is_refused(tmp_path):
    make_finished_run(tmp_path / "a")
    assert "pretrain" in message_of(lambda: open_run(tmp_path / "a", stage="finetune"))


@pytest.mark.parametrize("config", [Settings(), Settings(lr=0.5)])
def test_a_finished_run_without_checkpoints_is_refused(tmp_path, config):
    run = open_run(tmp_path / "a")
    run.metrics(1, {"loss": 1.0})
    run.close()
    assert "finished" in message_of(lambda: open_run(tmp_path / "a", config))
    assert "finished" in message_of(lambda: open_run(tmp_path / "a", config, allow_changed=["*"]))
    assert logged(tmp_path / "a") == [{"step": 1, "loss": 1.0}]
    open_run(tmp_path / "a", config, overwrite=True).close()


@pytest.mark.parametrize("export", EXPORTS)
def test_exported_weights_without_checkpoints_are_not_deleted(tmp_path, export):
    run = open_run(tmp_path / "a")
    (tmp_path / "a" / export).mkdir()
    run.close("killed")
    assert "--overwrite" in message_of(lambda: open_run(tmp_path / "a"))
    assert (tmp_path / "a" / export).exists()


def test_a_changed_config_starts_anew_where_there_is_no_checkpoint_to_lose(tmp_path):
    folder = tmp_path / "a"
    make_run_without_checkpoint(folder)
    (folder / "notes.txt").write_text("mine")
    with open_run(folder, Settings(lr=0.5)) as run:
        assert run.read_json("tasks.json") is None
        assert run.resume() is None
        assert logged(folder) == []
        assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "lock", "notes.txt", "run.json"]
        run.save_state(1, tensors_of(1), {"step": 1})
    record = json.loads((folder / "run.json").read_text())
    assert (record["config"]["lr"], record["resumed"]) == (0.5, [])
    assert "lr: 0.5" in (folder / "config.yaml").read_text()
    assert "lr was 0.5 and is now 0.001" in message_of(lambda: open_run(folder))


def test_a_damaged_checkpoint_is_still_something_to_lose(tmp_path):
    make_finished_run(tmp_path / "a")
    (tmp_path / "a/state/step_00000001/manifest.json").unlink()
    assert "lr was" in message_of(lambda: open_run(tmp_path / "a", Settings(lr=0.5)))
    assert logged(tmp_path / "a") == [{"step": 1, "loss": 1.0}]


def test_another_stage_is_refused_even_without_a_checkpoint(tmp_path):
    make_run_without_checkpoint(tmp_path / "a")
    assert "pretrain" in message_of(lambda: open_run(tmp_path / "a", stage="finetune"))
    assert logged(tmp_path / "a") == [{"step": 1, "loss": 1.0}]


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(tmp_path):
    run = open_run(tmp_path / "a")
    run.metrics(1, {"loss": 1.0})
    run.write_json("tasks.json", {"denoise": {}})
    run.close("failed")
    with open_run(tmp_path / "a") as run:
        assert run.read_json("tasks.json") is None
        assert run.resume() is None
        assert logged(tmp_path / "a") == []


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
    written = [json.loads(line) for line in lines]
    times = [line.pop("time") / 1000 for line in written]
    assert written == [{"step": 1, "train/loss": 0.25, "lr": 0.001}, {"step": 2, "train/loss": None, "lr": None}]
    assert time.time() - 60 < times[0] <= times[1] <= time.time()
    assert "NaN" not in "".join(lines)
    first, second = logged(tmp_path / "a")
    assert first == {"step": 1, "train/loss": 0.25, "lr": 0.001}
    assert math.isnan(second["lr"])
    assert logged(tmp_path) == []


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
    assert [line["step"] for line in logged(tmp_path / "a")] == [1, 2, 3, 4, 5]
    with open_run(tmp_path / "a") as run:
        assert run.resume().step == 3
        run.metrics(4, {"loss": 4.5})
    assert [tuple(line.values()) for line in logged(tmp_path / "a")] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert "line 2" in message_of(lambda: logged(tmp_path))


def test_pictures_have_a_place(tmp_path):
    run = open_run(tmp_path / "a")
    path = run.picture_path("val/denoise", 250)
    assert path == tmp_path / "a/pictures/00000250_val_denoise.png"
    path.write_bytes(b"")
