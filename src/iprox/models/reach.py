"""What models can read: how many positions they have, and tokens they have embeddings of."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Reach:
    """The most that a model reads, or several that are to read the same.

    Attributes:
        positions: longest input in tokens; None where the config sets no limit.
        vocabulary: number of embeddings; None where the config does not say.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, *configs: PretrainedConfig) -> Reach:
        """Of models by their configs: the least of each."""
        texts = [config.get_text_config() for config in configs]
        return cls(_least(texts, "max_position_embeddings"), _least(texts, "vocab_size"))


def _least(configs: list[PretrainedConfig], name: str) -> int | None:
    found = [getattr(config, name, None) for config in configs]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)
