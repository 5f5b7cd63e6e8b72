"""What selections of images hold and train: a convolutional network and a vision transformer on scikit-learn's digits.

    python benchmarks/vision.py            # two models, three seeds, a few minutes; draws docs/plots/vision.svg

The pool, its mislabeled and off-task images, and the convolutional network are those of examples/digits.py; the vision
transformer is transformers' ViT of two layers, from a random start. Scores are from a proxy, with validation gradients
on the target. A new model is then trained on the selection, on as many random images of the pool, on as many random
good ones, and on the whole pool, with as many steps each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from digits import digits, network, train
from selected import arguments_of, draw, measure


def transformer() -> nn.Module:
    """Return a vision transformer of 16 patches of 2 by 2 pixels."""
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_labels=10))


def losses(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return the loss of each image [B]."""
    output = model(batch[0])
    return nn.functional.cross_entropy(getattr(output, "logits", output), batch[1], reduction="none")


def main() -> None:
    """Measure, draw and print."""
    models = {"CNN": network, "ViT": transformer}
    arguments = arguments_of("vision", __doc__, count=200)
    results = measure(arguments, models, digits, losses, lambda *given: train(*given, losses), epochs=30)
    draw(results, list(models), ("good", "mislabeled", "off-task"), "vision")


if __name__ == "__main__":
    main()
