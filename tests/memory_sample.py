"""A record of one training step as the planner and the profiler write them, made up but of realistic sizes."""

MIB = 2**20
BASE = {
    "base weights": 3441 * MIB,
    "quantisation constants": 109 * MIB,
    "embeddings": 1002 * MIB,
    "head": 1002 * MIB,
    "adapter": 80 * MIB,
    "gradients": 80 * MIB,
    "optimizer": 161 * MIB,
}
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def timeline(blocks=32):
    """Return the moments of a step with checkpointed blocks, a chunked loss, an optimizer step and an evaluation."""
    points = []

    def hold(phase, module, saved, workspace, logits=0, base=BASE):
        sizes = base | {"saved activations": saved * MIB, "workspace": workspace * MIB, "logits": logits * MIB}
        points.append({"phase": phase, "module": module, "bytes": sizes})

    def block(phase, number, saved, grows, base=BASE):
        for place, part in enumerate(PARTS):
            inside = saved + (26 * (place + 1) if grows else 0)
            for work in (12, 118 if part.startswith("mlp") else 40, 20):
                hold(phase, f"model.layers.{number}.{part}", inside, work, base=base)

    for number in range(blocks):
        block("forward", number, 16 * (number + 1), False)
    for chunk in range(8):
        for work, logits in ((20, 250), (260, 501), (20, 250), (10, 0)):
            hold("forward", f"loss chunk {chunk}", 16 * blocks, work, logits)
    for number in reversed(range(blocks)):
        block("backward", number, 16 * (number + 1), True)
        block("backward", number, 16 * (number + 1) + 60, False)
    for _ in range(30):
        hold("optimizer", "adapter", 0, 40)
    for number in range(blocks):
        block("evaluation", number, 0, False, BASE | {"gradients": 0})
    for chunk in range(4):
        hold("evaluation", f"loss chunk {chunk}", 0, 260, 501, BASE | {"gradients": 0})
    return points


def sample_record(**changes):
    """Return a whole record; keyword arguments replace keys."""
    points = timeline()
    fullest = max(points, key=lambda point: sum(point["bytes"].values()))
    predicted = fullest["bytes"]
    record = {
        "title": "Llama-3.1-8B, NF4",
        "subtitle": "rank 16 on all linears · 1 x 2,048 tokens, 16 accumulated · blocks checkpointed · loss chunk 512",
        "budget_bytes": 8 * 2**30,
        "peak": {
            "bytes": sum(predicted.values()),
            "phase": fullest["phase"],
            "module": fullest["module"],
            "breakdown": predicted,
        },
        "timeline": points,
        "sentences": ["Loss chunk 256 instead of 512 saves 375.0 MiB and takes 2 % longer."],
        "predicted": predicted,
        "measured": predicted | {"workspace": predicted["workspace"] + 9 * MIB, "adapter": 81 * MIB},
        "alternatives": [
            {"change": "loss chunk 256", "peak_bytes": 6900 * MIB, "step_seconds": 14.2, "fits": True},
            {"change": "offload checkpoints", "peak_bytes": 6420 * MIB, "step_seconds": 15.9, "fits": True},
            {"change": "no checkpointing", "peak_bytes": 15300 * MIB, "step_seconds": 11.0, "fits": False},
            {"change": "4,096 tokens", "peak_bytes": 7993 * MIB, "step_seconds": None, "fits": None},
        ],
        "constants": [
            {"name": "CUDA context", "bytes": 412 * MIB, "why": "driver, cuBLAS and kernels"},
            {"name": "allocator rounding", "bytes": 96 * MIB, "why": "blocks of 2 MiB, 1.5 % of the peak"},
        ],
    }
    return record | changes
