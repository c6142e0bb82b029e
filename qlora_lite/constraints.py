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
