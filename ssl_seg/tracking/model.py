"""A fine-tuned model as one of MLflow's own: `mlflow.pytorch.load_model` gives it back, and needs torch alone.

It is traced by torch.export, MLflow's own form that holds no pickle, and compared with the run's network before it is
sent. This file is the only one of the mirror that wants torch.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow import pytorch as flavour
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from ssl_seg.config import UserError, first_line
from ssl_seg.models import evaluating
from ssl_seg.weights import forms
from ssl_seg.weights.export import load_model, read_model_info
from ssl_seg.weights.program import Freedom, freedoms, tracing_any_size

NAME = "model"  # in MLflow, beside which the run and the model's own id stand
SHA256 = "model_sha256"  # the tag by which a model that is there is known
# What a traced program is run by; NumPy is what its signature speaks of.
REQUIREMENTS = ("torch", "numpy", "mlflow")


class Shares(nn.Module):
    """The share of each class: `(B, C, H, W)` in [0, 1] to `(B, K, H, W)`, which sum to 1 over the classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).softmax(dim=1)


def log_model(client: MlflowClient, run_id: str, folder: Path) -> bool:
    """Send the model of a run folder to its run, unless it is there; whether it was sent.

    Raises UserError where torch cannot trace the network, or the program answers otherwise than it.
    """
    sha256 = read_model_info(folder)["sha256"]
    experiment = client.get_run(run_id).info.experiment_id
    there = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    if any(own.tags.get(SHA256) == sha256 and own.status == "READY" for own in there):
        return False
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / NAME
        # Traced first: what cannot be traced leaves no model without files in MLflow.
        signature = save(folder, target)
        made = client.create_logged_model(
            experiment, NAME, source_run_id=run_id, tags={SHA256: sha256}, model_type="segmentation"
        )
        described = Model.load(str(target))
        described.run_id, described.model_id, described.signature = run_id, made.model_id, signature
        described.save(str(target / "MLmodel"))
        client.log_model_artifacts(made.model_id, str(target))
        client.finalize_logged_model(made.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
    return True


def save(folder: Path, target: Path) -> ModelSignature:
    """Write the model of a run folder as MLflow keeps models; gives what it takes and gives.

    Any number of images of any size, else one of any size, else those of the run's `data.resize`.
    Raises as `log_model`.
    """
    network, resize = load_model(folder)
    shares = Shares(network).eval()
    channels, classes = network.image_channels, len(network.class_names)
    refusal: Exception | None = None
    for freedom in freedoms(resize):
        signature = _signature(freedom, channels, classes)
        try:
            with evaluating(shares), forms.quietly(), tempfile.TemporaryDirectory() as place:
                written = Path(place) / NAME
                with tracing_any_size():
                    flavour.save_model(
                        shares,
                        str(written),
                        signature=signature,
                        input_example=np.full(freedom.example(channels), 0.5, dtype=np.float32),
                        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
                        metadata={"classes": list(network.class_names), "resize": resize},
                        serialization_format="pt2",
                    )
                read = flavour.load_model(str(written))
                differences = {
                    forms.words_of(shape): forms.difference(shares, read, shape) for shape in freedom.shapes()
                }
                written.rename(target)
        except Exception as error:  # torch raises many kinds, with pages of text
            refusal = refusal or error
        else:
            forms.check_equal(differences, "MLflow's model", "share")
            return signature
    assert refusal is not None, "the first way was tried"
    raise UserError(
        f"tracking.model: torch cannot write this network for images of any size ({first_line(refusal)[:200]}); "
        "tracking.weights=true sends its weights"
    ) from refusal


def _signature(freedom: Freedom, channels: int, classes: int) -> ModelSignature:
    """float32 images to float32 shares; -1 is any number. Without names, or an array would be no input."""
    count = -1 if freedom.number else 1
    height, width = freedom.size or (-1, -1)
    taken = TensorSpec(np.dtype(np.float32), (count, channels, height, width))
    given = TensorSpec(np.dtype(np.float32), (count, classes, height, width))
    return ModelSignature(Schema([taken]), Schema([given]))
