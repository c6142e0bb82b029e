"""What other settings must be beside one, in a recipe's words: a recipe is checked by it, and so is a trainer."""

WITH_COMPILE = {"tile_tokens": "off", "resident_layers": "all", "layers_per_checkpoint": 1}  # of the memory section
WITH_UPDATES_IN_BACKWARD = {"max_grad_norm": 0, "gradient_accumulation_steps": 1, "on_not_finite": "stop"}  # of train
UPDATES_IN_FLOAT16 = "in float16 an overflow is seen too late for that; write model.compute_dtype: float32"
STREAMED_TRAINED = "streamed weights are trained one at a time, each in host memory when its gradient is there"
DIVIDED_ON_GPUS = "weights that are trained are divided in equal parts, each on its rank's device"
WITH_FULL = {  # of a recipe whose adapter.method is full
    ("model", "quant_head"): False,
    ("train", "loraplus_lr_ratio"): 1,
    ("memory", "embeddings"): "device",
    ("memory", "head"): "device",
    ("memory", "cache_dequantized"): False,
}
WITH_HEAD = {  # of a recipe whose task.kind is another than language-model
    ("model", "quant_head"): False,
    ("adapter", "train_also"): [],
    ("adapter", "train_tokens"): [],
    ("adapter", "switch_every"): 0,
    ("lora", "start"): "kaiming",
    ("data", "template"): None,
    ("data", "train_on"): "assistant",
    ("data", "train_on_end"): True,
    ("train", "merge_aware"): "off",
    ("train", "compile"): False,
    ("train", "metrics_every_steps"): 0,
    ("train", "metrics_examples"): 0,
    ("train", "metrics_choices"): None,
    ("memory", "loss_chunk_tokens"): "auto",
    ("memory", "head"): "auto",
    ("train", "objective"): "sft",
}
WITH_PICTURES: dict[tuple[str, str], tuple[object, ...]] = {  # of a recipe whose rows are pictures; what else is auto
    ("data", "max_tokens"): (1024,),
    ("data", "overflow"): ("error",),
    ("data", "order"): ("shuffle", "as-is"),
    ("data", "streaming"): (False,),
    ("memory", "tile_tokens"): ("off",),
    ("memory", "embeddings"): ("device",),
    ("model", "quant"): ("none", "nf4", "fp4"),
}
WITH_VISION: dict[tuple[str, str], tuple[object, ...]] = {  # of a recipe whose chats have pictures
    ("adapter", "method"): ("lora", "dora"),
    ("adapter", "train_tokens"): ([],),
    ("lora", "start"): ("kaiming",),
    ("model", "quant"): ("nf4", "fp4", "none"),
    ("data", "overflow"): ("error", "drop"),
    ("data", "streaming"): (False,),
    ("train", "objective"): ("sft",),
    ("train", "compile"): (False,),
    ("train", "merge_aware"): ("off",),
}
WITH_DENOISERS: dict[tuple[str, str], tuple[object, ...]] = {  # of one whose model is a denoiser, likewise
    ("data", "augment"): ("none",),
    ("memory", "optimizer_in_backward"): (False,),
    ("memory", "layers_per_checkpoint"): (1,),
    ("memory", "stream_from"): ("host",),
    ("model", "compute_dtype"): ("bfloat16", "float32"),
    ("model", "keep_16bit"): ([],),
}
OF_CHATS = ("data", "template"), ("data", "train_on"), ("data", "train_on_end")  # of those, what rewards have a use for
