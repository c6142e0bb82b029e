"""Adapter files for llama.cpp's ``--lora``.

``BLOCK.weight.lora_a`` [r, in] and ``.lora_b`` [out, r] in a GGUF file of type "adapter", with one alpha
(``src/llama-adapter.cpp``; scale = alpha / r of each pair). Rows of B follow the rows of the base's weight.
"""

from pathlib import Path

import torch

from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.errors import ModelError
from qlora_lite.export.adapters import with_one_scaling
from qlora_lite.files import replacing_folder
from qlora_lite.models.gguf_names import GgufNames

ADAPTER_FILE = "adapter.gguf"


def write_gguf_adapter(adapter: Adapter, names: GgufNames, out: Path) -> None:
    """Write an adapter file for llama.cpp's ``--lora`` into a new folder.

    Raises:
        ModelError: an adapted layer has no name in GGUF.
        OutputError: the folder cannot be written.
    """
    from gguf import GGUFWriter, Keys

    folded = with_one_scaling(adapter)
    with replacing_folder(out) as new:
        writer = GGUFWriter(new / ADAPTER_FILE, names.architecture)
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, next(iter(folded.layers.values())).alpha)
        for path, factors in folded.layers.items():
            name = names.of(f"{path}.weight")
            rows = names.to_gguf(f"{path}.weight", factors.lora_B.float())
            writer.add_tensor(f"{name}.lora_a", factors.lora_A.float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", rows.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf_adapter(path: Path, names: GgufNames, adapted: list[str]) -> Adapter:
    """Read an adapter file as llama.cpp does.

    Args:
        adapted: paths of the layers that it must adapt.

    Raises:
        ModelError: it is no adapter, or a pair is missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (fields.get("general.type"), fields.get("adapter.type")) != ("adapter", "lora"):
        raise ModelError(f"{path} is not a LoRA adapter")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = {}
    for path_in_model in adapted:
        parameter = f"{path_in_model}.weight"
        lora_a, stored_b = (tensors.get(f"{names.of(parameter)}.lora_{side}") for side in "ab")
        if lora_a is None or stored_b is None:
            raise ModelError(f"{path} has no LoRA weights for {path_in_model}")
        lora_b = names.from_gguf(parameter, stored_b)
        layers[path_in_model] = Factors(lora_a, lora_b.contiguous(), float(fields["adapter.lora.alpha"]))
    return Adapter(layers, 0.0)
