"""Whether an encoder of timm does what the table of `models.support` says: built with its numbers, and run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ssl_seg.config import UserError
from ssl_seg.models import DenseHead, EncoderNet, evaluating
from ssl_seg.models.support import GENERAL, Support
from ssl_seg.models.timm import Timm
from ssl_seg.testing.common import check_gradients, pictures
from ssl_seg.testing.networks import check_encoder

SIZE = (33, 70)  # of the images, which no network's multiple divides


def faults_of(row: Support) -> Iterator[str]:
    """What is not as a row of the table says, in a sentence each."""
    config = Timm(name=row.encoder)
    if row.state == "refused":
        return
    try:
        check_encoder(config, sizes=[SIZE])
    except AssertionError as error:
        yield str(error)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = config.build()
        for decoder in GENERAL:
            try:
                head = DenseHead(decoder.build(encoder.channels, encoder.strides), 2)
            except UserError as error:
                if decoder.type not in row.refused_by.split():
                    yield f"{decoder.type}: {error}"
            else:
                yield from _faults_of_pair(encoder, head, decoder.type)


def _faults_of_pair(encoder: EncoderNet, head: DenseHead, name: str) -> Iterator[str]:
    images = pictures(2, *SIZE)
    with evaluating(encoder):
        features = encoder(images)
    answer = head(features, SIZE)
    if answer.shape != (2, 2, *SIZE):
        yield f"{name}: answers with {tuple(answer.shape)}"
        return
    answer.square().mean().backward()
    try:
        check_gradients(name, head, every=True)
    except AssertionError as error:
        yield str(error)
