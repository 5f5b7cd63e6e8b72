"""Choose the images that help a task from a pool with wrong labels and other digits: `python examples/digits.py`."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import iprox


def digits(seed: int) -> tuple[dict[str, TensorDataset], np.ndarray]:
    """Return images in the sets "pool", "validation" and "test", and what each of the pool is.

    The task is to tell 0 to 4 apart. Other digits are off the task, and every fourth image of the pool is mislabeled.
    """
    draw = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    of_task = labels < 5
    held_out = draw.permutation(np.flatnonzero(of_task))[:300]
    pool = draw.permutation(np.setdiff1d(np.arange(len(labels)), held_out))
    given, wrong = labels.copy(), pool[of_task[pool]][::4]
    given[wrong] = (labels[wrong] + draw.integers(1, 5, len(wrong))) % 5
    kinds = np.where(of_task[pool], np.where(given[pool] == labels[pool], "good", "mislabeled"), "off-task")
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(given)
    rows = {"pool": pool, "validation": held_out[:50], "test": held_out[50:]}
    return {name: TensorDataset(x[of], y[of]) for name, of in rows.items()}, kinds


def network() -> nn.Module:
    """Return a small convolutional network."""
    body = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def losses(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return the loss of each image [B]."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model: nn.Module, images: Dataset, epochs: int, losses=losses) -> nn.Module:
    """Train a model with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in DataLoader(images, 32, shuffle=True):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    return model


if __name__ == "__main__":
    sets, kinds = digits(seed=0)
    model = train(network(), sets["pool"], epochs=3)  # the warm-up
    proxy = iprox.compress(model, sets["pool"], sparsity=0.5, loss_fn=losses)
    scores = iprox.score(proxy, sets["pool"], {"0 to 4": sets["validation"]}, target=model, loss_fn=losses)
    chosen = iprox.select(scores, count=200)
    print({kind: int((kinds[chosen] == kind).sum()) for kind in np.unique(kinds)})
    print(iprox.audit(model, proxy, sets["pool"], {"0 to 4": sets["validation"]}, loss_fn=losses).mean["spearman"])
