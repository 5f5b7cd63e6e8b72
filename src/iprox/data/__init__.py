"""Read examples, turn them into labeled tokens, and group these into batches."""

from iprox.data.batching import Batch, collate, example_batches, iter_batches, on_device, token_budget_batches
from iprox.data.chat import ChatEncoder
from iprox.data.formats import Example
from iprox.data.messages import Message, said
from iprox.data.pool import GENERATED_ID, Overlap, Pool, PoolSummary
from iprox.data.tokens import IGNORE, Encoded

__all__ = [
    "GENERATED_ID",
    "IGNORE",
    "Batch",
    "ChatEncoder",
    "Encoded",
    "Example",
    "Message",
    "Overlap",
    "Pool",
    "PoolSummary",
    "collate",
    "example_batches",
    "iter_batches",
    "on_device",
    "said",
    "token_budget_batches",
]
