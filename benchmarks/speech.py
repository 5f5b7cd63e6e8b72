"""What selections of recordings hold and train: an audio spectrogram transformer on words that espeak-ng says.

    python benchmarks/speech.py            # three seeds; needs espeak-ng; draws docs/plots/speech.svg

The pool, with other accents, noise and wrong labels, and the model are those of examples/spoken_words.py. Scores are
from a proxy, with validation gradients on the model. A new model is then trained on the selection, on as many random
recordings of the pool, on as many random good ones, and on the whole pool, with as many steps each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from selected import arguments_of, draw, measure
from spoken_words import losses, network, recordings, train


def main() -> None:
    """Measure, draw and print."""
    arguments = arguments_of("speech", __doc__, count=140)
    results = measure(arguments, {"AST": network}, recordings, losses, train, epochs=60, warm=8)
    draw(results, ["AST"], ("good", "mislabeled", "other accent", "noise"), "speech")


if __name__ == "__main__":
    main()
