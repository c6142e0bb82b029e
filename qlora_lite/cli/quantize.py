"""``qlora-lite quantize``: write a model as a 4-bit checkpoint that transformers loads."""

from pathlib import Path

import click

from qlora_lite.files import require_empty

from .output import echo, prepare


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must be new or empty.")
@click.option("--quant", type=click.Choice(["nf4", "fp4"]), default="nf4", show_default=True)
@click.option("--double-quant/--no-double-quant", default=True, show_default=True)
@click.option("--keep-16bit", multiple=True, metavar="PATTERN", help="Layers that stay in 16 bit; may be repeated.")
def quantize(model: str, out: Path, quant: str, double_quant: bool, keep_16bit: tuple[str, ...]) -> None:
    """Write MODEL (as in model.path) as an ordinary bitsandbytes 4-bit checkpoint."""
    require_empty(out)
    prepare()
    import torch

    from qlora_lite.export.merge import loses_its_update
    from qlora_lite.models.kept import check_kept
    from qlora_lite.models.load import KEEP, load_model
    from qlora_lite.models.locate import locate
    from qlora_lite.models.nested import read_language_part
    from qlora_lite.models.published import published_formats
    from qlora_lite.models.save import bnb_config, save_quantized
    from qlora_lite.models.skeleton import meta_model
    from qlora_lite.models.tokenizer import load_tokenizer

    if loses_its_update(model):
        echo(
            "warning: a merged model quantised again loses much or all of the update; qlora-lite merge RUN "
            "--quantize measures that, and refuses where the update is lost",
            err=True,
        )
    files = locate(model)
    config = read_language_part(files.folder, model, files.gguf_file).config
    check_kept(config, keep_16bit, model)
    formats = published_formats(config)
    how = KEEP if formats else quant, double_quant, torch.bfloat16, False, keep_16bit, formats
    bnb_config(meta_model(config, *how))  # refuses before anything large is read
    loaded = load_model(model, quant, double_quant, torch.bfloat16, use_cache=False, keep_16bit=keep_16bit)
    save_quantized(loaded, out, load_tokenizer(model))
    echo(f"wrote {out}")
