"""Choose the recordings that help to recognize words in one accent: `python examples/spoken_words.py`.

The recordings are made by espeak-ng (on Debian: apt-get install espeak-ng).
"""

import io
import subprocess
from collections.abc import Callable

import numpy as np
import torch
from scipy.io import wavfile
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import ASTConfig, ASTForAudioClassification
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import iprox

WORDS = ("yes", "no", "up", "down", "left", "right", "stop", "go")
TASK, OTHERS = "en-gb-scotland", ("en-us", "en-gb-x-rp", "en-029")  # Scottish; American, British, Caribbean
SPEAKERS = ("m1", "m2", "m3", "m5", "f1", "f2", "f3", "f4")
RATE, FRAMES = 22050, 64


def say(word: str, accent: str, speaker: str, speed: int, pitch: int) -> np.ndarray:
    """Return a word as espeak-ng says it, samples [N] between -1 and 1."""
    how = ["-v", f"{accent}+{speaker}", "-s", str(speed), "-p", str(pitch), "--stdout", word]
    sound = subprocess.run(["espeak-ng", *how], capture_output=True, check=True).stdout
    return wavfile.read(io.BytesIO(sound))[1] / 2**15


def features(sound: np.ndarray) -> torch.Tensor:
    """Return the log mel spectrogram of a sound [FRAMES, 40], from where it starts."""
    sound = sound[np.argmax(np.abs(sound) > 0.02) :][: FRAMES * 220]
    mel = mel_filter_bank(257, 40, 50.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    whole = np.pad(sound, (0, FRAMES * 220 - len(sound)))
    power = spectrogram(whole, window_function(400), 400, 220, 512, mel_filters=mel, log_mel="log10", mel_floor=1e-5)
    return torch.tensor(power[:, :FRAMES].T / 2 + 1, dtype=torch.float32)


def recordings(seed: int, count: int = 1600, say: Callable = say) -> tuple[dict[str, TensorDataset], np.ndarray]:
    """Return words in the sets "pool", "validation" and "test", and what each recording of the pool is.

    The task is Scottish. Half of the pool has other accents, a sixth is under loud noise, and a ninth is mislabeled.
    """
    draw = np.random.default_rng(seed)
    held_out = count // 8
    kinds = draw.choice(["good", "other accent", "noise", "mislabeled"], count, p=[2 / 9, 0.5, 1 / 6, 1 / 9])
    kinds[:held_out] = "good"
    sounds, labels = [], draw.integers(len(WORDS), size=count)
    given = np.where(kinds == "mislabeled", (labels + draw.integers(1, len(WORDS), count)) % len(WORDS), labels)
    for kind, label in zip(kinds, labels, strict=True):
        accent = draw.choice(OTHERS) if kind == "other accent" else TASK
        sound = say(
            WORDS[label], accent, draw.choice(SPEAKERS), int(draw.integers(120, 220)), int(draw.integers(20, 80))
        )
        loudness = 0.3 if kind == "noise" else 0.003
        sounds.append(features(sound + loudness * draw.standard_normal(len(sound))))
    x, y = torch.stack(sounds), torch.tensor(given)
    parts = {
        "validation": slice(0, held_out // 4),
        "test": slice(held_out // 4, held_out),
        "pool": slice(held_out, None),
    }
    return {name: TensorDataset(x[part], y[part]) for name, part in parts.items()}, kinds[held_out:]


def network() -> nn.Module:
    """Return a small audio spectrogram transformer."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    places = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": FRAMES, "num_mel_bins": 40}
    return ASTForAudioClassification(ASTConfig(**sizes, **places, num_labels=len(WORDS)))


def losses(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return the loss of each recording [B]."""
    return nn.functional.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")


def train(model: nn.Module, sounds: Dataset, epochs: int) -> nn.Module:
    """Train a model with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in DataLoader(sounds, 32, shuffle=True):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    return model


def main(count: int = 1600, say: Callable = say) -> dict[str, int]:
    """Return how many of the selected recordings are of each kind."""
    sets, kinds = recordings(0, count, say)
    model = train(network(), sets["pool"], epochs=8)  # the warm-up
    proxy = iprox.compress(model, sets["pool"], sparsity=0.5, loss_fn=losses)
    scores = iprox.score(proxy, sets["pool"], {"Scottish": sets["validation"]}, target=model, loss_fn=losses)
    chosen = iprox.select(scores, fraction=0.1)
    return {str(kind): int((kinds[chosen] == kind).sum()) for kind in np.unique(kinds)}


if __name__ == "__main__":
    print(main())
