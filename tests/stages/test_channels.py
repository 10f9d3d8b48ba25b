"""Images of 1 and of 4 channels, from files to masks and to other programs: the whole way, by the words of a user."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from ssl_seg import (
    EvaluateConfig,
    FinetuneConfig,
    Options,
    PredictConfig,
    PretrainConfig,
    evaluate,
    export,
    finetune,
    images,
    load_model,
    predict,
    pretrain,
)
from ssl_seg.config import load
from ssl_seg.weights.onnx import runner
from tests.faults import message_of
from tests.small import UNTRACKED

SIDE = 40
WHITE = 4095  # of 12 bits in 16
CLASSES = ("ground", "crop")
TASKS = {"denoise": {}, "inpaint": {}, "jigsaw": {"grid": 2, "gap": 0.0, "jitter": 0.0}}
TRAIN = {"steps": 12, "batch_size": 4, "lr": 2e-3, "workers": 0, "device": "cpu"}


def field(number: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """12-bit values `(H, W, C)` uint16 and ids `(H, W)`: a crop that is seen in the last channel alone."""
    random = np.random.default_rng(number)
    ids = np.zeros((SIDE, SIDE), np.uint8)
    top, left = random.integers(4, 18, 2)
    ids[top : top + 18, left : left + 18] = 1
    values = random.integers(900, 1500, (SIDE, SIDE, channels))
    values[..., -1] += 2200 * ids.astype(np.int64)
    return values.astype(np.uint16), ids


def write(folder: Path, count: int, channels: int, first: int = 0) -> None:
    """TIFFs of 12 bits in 16, as programs write them: channels last, channels first, in planes and as pages."""
    forms = (
        lambda path, own: tifffile.imwrite(path, own, photometric="minisblack", planarconfig="contig"),
        lambda path, own: tifffile.imwrite(path, own.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"}),
        lambda path, own: tifffile.imwrite(path, own.transpose(2, 0, 1), photometric="minisblack"),
    )
    (folder / "images").mkdir(parents=True)
    for number in range(first, first + count):
        values, ids = field(number, channels)
        form = forms[number % len(forms) if channels > 1 else 0]
        form(folder / "images" / f"{number:02}.tif", values if channels > 1 else values[..., 0])
        images.write_mask(folder / "masks" / f"{number:02}.png", ids)


def data(folder: Path, **more: object) -> dict[str, object]:
    labelled = {"masks": f"{folder}/masks", "classes": list(CLASSES)}
    return {"type": "folder", "images": f"{folder}/images", "range": [0, WHITE], **labelled, **more}


@pytest.mark.parametrize("channels", [4, 1])
def test_images_of_any_channels_go_the_whole_way(tmp_path: Path, channels: int) -> None:
    write(tmp_path / "train", 8, channels)
    write(tmp_path / "pool", 6, channels, first=20)
    write(tmp_path / "test", 3, channels, first=50)
    pool = {"type": "folder", "images": f"{tmp_path}/pool/images", "range": [0, WHITE]}
    encoder = {"type": "r2unet", "widths": [8, 16, 32], "unit": "plain"}
    model = {"channels": channels, "encoder": encoder, "decoder": {"type": "unet", "channels": [16, 8]}}
    shared = {"augment": {"crop": [32, 32]}, "tracking": UNTRACKED}
    own = {"model": model, "tasks": TASKS, "train": TRAIN, "recalibrate": 4}
    pretrained = pretrain(
        load(PretrainConfig, {"data": {"pool": pool}, **shared, **own}), Options(tmp_path / "pretrained", quiet=True)
    )
    assert json.loads((tmp_path / "pretrained" / "encoder" / "encoder.json").read_text())["range"] == [0, WHITE]
    assert f"channels: {channels}" in (tmp_path / "pretrained" / "config.yaml").read_text()

    # What fine-tuning starts from says how many channels there are.
    given = {"data": {"labelled": data(tmp_path / "train")}, "init": str(pretrained.folder), **shared}
    config = load(FinetuneConfig, {**given, "transfer": "encoder+denoise", "train": {**TRAIN, "steps": 60}})
    tuned = finetune(config, Options(tmp_path / "tuned", quiet=True))
    assert tuned.val.miou > 0.7

    scored = data(tmp_path / "test")
    del scored["range"]  # the model has learnt it
    at = {"model": str(tuned.folder), "workers": 0, "device": "cpu"}
    found = evaluate(load(EvaluateConfig, {"data": {"test": scored}, **at}), tmp_path / "scored")
    assert found.scores.miou > 0.7
    assert images.read_image(tmp_path / "scored" / "predictions.png").shape[-1] == 3
    unlabelled = {key: scored[key] for key in ("type", "images")}
    predicted = predict(load(PredictConfig, {"data": {"images": unlabelled}, **at}), tmp_path / "masks")
    assert images.read_image(tmp_path / "masks" / "overlays" / "50.png").shape == (SIDE, SIDE, 3)

    network = load_model(tuned.folder)
    path = tmp_path / "test" / "images" / "50.tif"
    mask = images.read_mask(predicted.out / "masks" / "50.png")
    np.testing.assert_array_equal(network.predict(path), mask)
    values, _ = field(50, channels)
    np.testing.assert_array_equal(network.predict(values), mask)  # the array that the file was made of
    pixels = np.rint(values / WHITE * 255) / 255
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()
    np.testing.assert_array_equal(network.predict(tensor), mask)
    assert f"give one image, ({channels}, H, W)" in message_of(lambda: network.predict(torch.zeros(5, 8, 8)))

    made = export(tuned.folder, tmp_path / "model.onnx")
    answer = runner(made.path.read_bytes())(tensor[None])
    np.testing.assert_array_equal(answer[0].argmax(0).numpy(), mask)
    receipt = json.loads((tmp_path / "model.onnx.json").read_text())
    assert receipt["input"]["image"].startswith(f"(B, {channels}, H, W)")
