"""The table of embeddings and the output head while their weights stay in host memory."""

import torch
from torch import nn

from qlora_lite.ops.around import Around
from qlora_lite.ops.host_rows import HostRows
from qlora_lite.ops.loss import Head, head_products
from qlora_lite.ops.offload import host_memory
from qlora_lite.ops.shapes import device_type
from qlora_lite.ops.transfer import on_host, sent


class HostEmbedding(Around):
    """An embedding whose table stays in host memory; only the rows of the batch travel."""

    def __init__(self, inner: nn.Module, device: torch.device):
        super().__init__(inner)
        self.device = device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return sent(self.inner(on_host(input_ids, self.weight.device)), self.device)


class HostHead(Around):
    """A linear head whose weight [V, D] stays in host memory; ``rows`` brings it a few thousand words at a time."""

    def __init__(self, inner: nn.Linear, device: torch.device):
        super().__init__(inner)
        self.device = device
        if device_type(device) == "cuda":
            memory = host_memory(self.weight.nbytes, device).view(self.weight.dtype).view(self.weight.shape)
            self.weight.data = memory.copy_(self.weight.data)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(device)
        self.rows = HostRows(self.weight, device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_products(hidden, Head(self.rows, self.bias))
