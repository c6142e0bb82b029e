"""Count the work of what a test runs."""

from contextlib import contextmanager

from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.work import WorkCounter

# of a model that the table of known ones lacks
GPT_OSS_20B = dict(
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
    num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
)  # fmt: skip


@contextmanager
def counted():
    """Give a counter of the work of all operations inside."""
    counter = WorkCounter()
    with Ledger(work=counter):
        yield counter
