"""Choose 4-bit codes of a merged model by what they make of training rows: a run's own NF4 ones, or Q4_0.

A merge-aware run computed with such codes, which are written as they are. Of any other run they are found one block
after the other, in one forward over rows of the training data: the block computes with its LoRA weights, each layer's
inputs are seen, codes are chosen for which its products with them change least (``quant.merging.closest_codes``,
``quant.closest.closest_q4_0``), and the blocks behind it get what those give. The memory is that of the 4-bit model, of
the forward, and of one block's sums X^T X beside what one weight takes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.adapters.lora.inject import blocks_of
from qlora_lite.adapters.lora.layer import LoraLinear, merging_of
from qlora_lite.adapters.read import Adapter
from qlora_lite.artifacts.trained_run import TrainedRun
from qlora_lite.data.tokens.batch import Batch, pack_in_order
from qlora_lite.kernels.token_rows import EmbeddingWithRows, HeadWithRows
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.load import load_model
from qlora_lite.models.merge import Merged
from qlora_lite.models.progress import Progress
from qlora_lite.models.save import save_quantized
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.start import resolve_start
from qlora_lite.quant.closest import closest_q4_0
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.merging import NF4, OFF, closest_codes, merged_codes
from qlora_lite.quant.product import materialize
from qlora_lite.train.causal_lm import TextBatches
from qlora_lite.train.forward import hidden_states, prepare
from qlora_lite.train.text_guards import check_forward

CALIBRATION_TOKENS = 4096


def calibration_rows(trained: TrainedRun) -> Batch:
    """Return the first rows of a run's training data, as many as there is room for.

    Longer ones than that are left out; where all are, there is room for the longest.

    Raises:
        DataError: they cannot be read.
    """
    rows, examples = TextBatches(), build_data(trained.recipe, trained.tokenizer()).examples
    lengths = rows.lengths(examples)
    fitting = [row for row, length in enumerate(lengths) if length <= CALIBRATION_TOKENS]
    room = CALIBRATION_TOKENS if fitting else max(lengths)
    first = pack_in_order(lengths, room, fitting or range(len(lengths)))[0]
    return rows.collate([examples[row] for row in first])


@torch.no_grad()
def write_codes(trained: TrainedRun, adapter: Adapter, rows: Batch | None, out: Path) -> None:
    """Write a run's NF4 codes with the update in them.

    Args:
        adapter: LoRA, and weights of the base that were trained beside it; rows of tokens that the base knows.
        rows: to choose the codes by, of a run that was not merge-aware; None rounds stochastically.
    """
    model = _with_adapter(trained, adapter)
    if adapter.merge_aware == OFF and rows is not None:

        def merge(block: nn.Module, grams: dict[nn.Module, Tensor]) -> None:
            _merge(model, block, grams)

        _block_by_block(model, rows, {m for m in model.modules() if isinstance(m, LoraLinear)}, merge)
    _merge(model, model, {})
    for path, table in list(model.named_modules()):
        if isinstance(table, EmbeddingWithRows | HeadWithRows):
            model.set_submodule(path, table.put_in())
    save_quantized(model, out, trained.tokenizer())


@torch.no_grad()
def q4_0_weights(trained: TrainedRun, merged: Merged, rows: Batch, stored: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights of a merged model in Q4_0 blocks, uint8 [out, in / 32 * 18], by the parameter's name.

    Args:
        merged: what they are to be near to.
        rows: to choose the codes by.
        stored: by parameter, the name in ``merged`` of those that are wanted; those in no block are left out.
    """
    model, found = _with_adapter(trained, merged.adapter), dict[str, Tensor]()
    layers = {model.get_submodule(name.removesuffix(".weight")): name.removesuffix(".weight") for name in stored}

    def choose(_block: nn.Module, grams: dict[nn.Module, Tensor]) -> None:
        for layer, gram in grams.items():
            path, base = layers[layer], layer.base if isinstance(layer, LoraLinear) else layer
            weight = merged.weight(stored[f"{path}.weight"], torch.float32)
            found[f"{path}.weight"] = closest_q4_0(weight.to(trained.device), gram.to(trained.device)).cpu()
            packed = [found[f"{path}.weight"]], tuple(weight.shape), base.bias, "q4_0", model.dtype
            model.set_submodule(path, QuantLinear.from_packed(*packed))

    _block_by_block(model, rows, layers.keys(), choose)
    return found


def _with_adapter(trained: TrainedRun, adapter: Adapter) -> nn.Module:
    m = trained.recipe.model
    model = load_model(
        m.path,
        m.quant,
        m.double_quant,
        trained.compute_dtype,
        "cpu",
        m.revision,
        keep_16bit=m.keep_16bit,
        start=resolve_start(trained.recipe),
    )
    return attach_adapter(model, replace(adapter, dropout=0.0))


def _block_by_block(
    model: nn.Module,
    rows: Batch,
    layers: Collection[nn.Module],
    put: Callable[[nn.Module, dict[nn.Module, Tensor]], None],
) -> None:
    """Run a model over rows, and let each block be changed before it is run, with what its layers' inputs are.

    Args:
        layers: whose inputs are seen.
        put: changes a block; it is given X^T X of its layers.
    """
    check_forward(model.eval())
    blocks = blocks_of(model)
    progress = Progress("choosing codes, blocks", len(blocks))

    def change(block: nn.Module, arguments: tuple, named: dict) -> None:
        grams: dict[nn.Module, Tensor] = {}

        def see(layer: nn.Module, inputs: tuple) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            grams[layer] = grams[layer].addmm_(x.t(), x) if layer in grams else x.t() @ x

        seen = [layer.register_forward_pre_hook(see) for layer in block.modules() if layer in layers]
        if seen:
            block.forward(*arguments, **named)
        for hook in seen:
            hook.remove()
        put(block, grams)
        progress.step()

    hooks = [block.register_forward_pre_hook(change, with_kwargs=True) for block in blocks.values()]
    hidden_states(model, prepare(rows, device_of(model)))
    for hook in hooks:
        hook.remove()


def _merge(model: nn.Module, inside: nn.Module, grams: dict[nn.Module, Tensor]) -> None:
    """Put frozen layers with the updates in their weights into the place of LoRA layers inside of a module.

    Args:
        grams: of a layer's inputs, X^T X, where they are known.
    """
    for layer in [module for module in inside.modules() if isinstance(module, LoraLinear)]:
        if merging := layer.merging or merging_of(layer.base, NF4, layer.scale, layer.path):
            own = merging, layer.base.packed, layer.lora_A, layer.lora_B
            layer.base.set_packed(closest_codes(*own, grams[layer]) if layer in grams else merged_codes(*own))
        else:
            weight = materialize(*frozen_weight(layer.base), layer.base.weight.dtype)
            update = layer.lora_B.float(), layer.lora_A.float()
            weight.copy_(torch.addmm(weight.float(), *update, alpha=layer.scale))
        model.set_submodule(layer.path, layer.base)
