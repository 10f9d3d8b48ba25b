"""Memory of SegNet's unpooling against a U-Net's skips, and of checkpointing. Printed, never asserted: `make bench`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from ssl_seg.models.timm import Timm
from ssl_seg.models.timm_maps import kept_bytes

pytestmark = pytest.mark.slow
# A process for each, whose peak is that of one network: bytes above what it held before the pass. What is kept for the
# gradient is counted exactly, each storage once, without the weights.
PEAK = """
import json, resource, sys
import psutil, torch
from ssl_seg.config import load
from ssl_seg.models import ModelConfig, SegmentationModel

torch.manual_seed(0)
config = load(ModelConfig, {"encoder": {"type": "segnet"}, "decoder": json.loads(sys.argv[1])})
encoder = config.build_encoder()
model = SegmentationModel(encoder, config.spec(encoder).dense(11), tuple("abcdefghijk"))
image = torch.rand(1, 3, 352, 480)
held = psutil.Process().memory_info().rss
kept = {}
own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

def keep(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in own:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor

if sys.argv[2] == "train":
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(image).square().mean()
    loss.backward()
else:
    with torch.no_grad():
        model.eval()(image)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
decoder = sum(weight.numel() for weight in model.head.decoder.parameters())
print(json.dumps({"peak": peak, "kept": sum(kept.values()), "weights": decoder}))
"""
DECODERS = {
    "segnet": {"type": "segnet"},
    "a U-Net as wide": {"type": "unet", "channels": [512, 512, 256, 128, 64]},
    "the default U-Net": {"type": "unet"},
}


def test_segnet_against_a_unet() -> None:
    """One image of 352 x 480: a step of training, and a prediction."""
    for name, decoder in DECODERS.items():
        figures = {}
        for mode in ("train", "predict"):
            command = [sys.executable, "-c", PEAK, json.dumps(decoder), mode]
            figures[mode] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        train, predict = figures["train"], figures["predict"]
        print(
            f"\n{name}: training {train['peak'] / 2**20:.0f} MiB (kept for the gradient {train['kept'] / 2**20:.0f}), "
            f"prediction {predict['peak'] / 2**20:.0f} MiB; {train['weights'] / 1e6:.1f} M weights in the decoder",
            end="",
        )


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_checkpointing_of_an_encoder(name: str) -> None:
    """What a training pass of four images of 256 x 256 keeps for the gradient, and its time with the way back."""
    encoder = Timm(name=name).build()
    figures = []
    for checkpointing in (False, True):
        if checkpointing:
            encoder.checkpoint()
        kept = kept_bytes(encoder.backbone, torch.rand(4, 3, 256, 256))
        began = time.process_time()
        maps = encoder(torch.rand(4, 3, 256, 256))
        torch.stack([level.square().mean() for level in maps if level.numel()]).sum().backward()
        figures.append(f"{kept / 2**20:.0f} MiB, {time.process_time() - began:.2f} s")
    print(f"\n{name}: {figures[0]} without, {figures[1]} with checkpointing", end="")
