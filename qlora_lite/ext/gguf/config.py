"""What a GGUF file says about a model: shapes, rotary positions, attention windows; ``models.gguf_settings`` reads it.

A setting that llama.cpp computes otherwise, or not at all, would give a file that loads and answers wrongly; every such
setting is refused by name, except where it only shows in texts longer than a window: that is a note.
"""

from qlora_lite.models.gguf_settings import (
    CAPS,
    FULL_ATTENTION_EVERY,
    SCALING,
    SCALING_TYPE,
    SCALINGS,
    check_config,
    head_size,
    rope_of,
)


def write_config(writer, config, architecture: str) -> list[str]:
    """Write a model's settings; return notes on what differs.

    Args:
        writer: a ``gguf.GGUFWriter`` of the architecture.
        config: the model's transformers configuration.

    Raises:
        ModelError: see ``check_config``.
    """
    check_config(config, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if architecture == "llama":
        writer.add_rope_dimension_count(head_size(config))
    _write_rope(writer, config, architecture)
    if architecture == "gemma2":
        for cap in CAPS:
            writer.add_float32(f"{architecture}.{cap}", getattr(config, cap))
    if architecture in FULL_ATTENTION_EVERY:
        writer.add_sliding_window(config.sliding_window)
        return []
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        return [f"llama.cpp has no attention window for this model: texts over {window} tokens are attended whole"]
    return []


def _write_rope(writer, config, architecture: str) -> None:
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if settings := SCALINGS.get(rope["rope_type"]):
        writer.add_string(f"{architecture}.{SCALING_TYPE}", rope["rope_type"])
        for name, key in settings.items():
            if name in rope:
                add = writer.add_uint32 if name == "original_max_position_embeddings" else writer.add_float32
                add(f"{architecture}.{SCALING}{key}", rope[name])
