"""Ragged rows reach a CPU's matrix kernels in few shapes, since oneDNN keeps a compiled kernel for each."""

import torch
from tiny import build_tiny, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.memory.shapes import CPU_MULTIPLE
from qlora_lite.models.load import use_row_attention
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.step import accumulate_gradients


class Heights(TorchDispatchMode):
    """Note the number of tokens that each matrix product runs over, and the sizes of attention's products."""

    def __init__(self):
        super().__init__()
        self.products, self.attentions = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.products.add(args[-2].shape[0])
        elif function is torch.ops.aten.bmm.default and args[0].shape[2] > 1:  # not transformers 5.17's rotary angles
            self.attentions |= {*args[0].shape[1:], *args[1].shape[1:]}
        return function(*args, **(kwargs or {}))


def test_products_and_attention_run_over_multiples_only():
    model = build_tiny("llama")
    use_row_attention(model)
    add_lora(model, rank=4, dtype=torch.float32)
    own = {4, 8, 12, 32, 64, 96, 160}  # the only other heights: of one, two or three A factors, and the model's own
    with Heights() as seen:
        for lengths in [(9, 14, 6), (31, 33), (5,), (64, 1 + 1), (40, 7, 50)]:
            accumulate_gradients(causal_lm(), model, [prepare(random_batch(lengths), model.device)])
    assert {height for height in seen.products if height % CPU_MULTIPLE} <= own
    assert seen.attentions
    assert {size for size in seen.attentions if size % CPU_MULTIPLE} == {16}  # the head's own size
