"""Every kind of run, interrupted: each method, objective, start, form of codes and task on a tiny model.

What ``faults.lab`` does to one fine-tune of a language model, at few points of many kinds of runs.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

from faults.faults import at_call, disk_error, disk_operations, hindered, kill, killed_at, signalled, signalled_twice
from faults.lab import Lab, Row
from faults.random_recipes import with_settings
from faults.subjects import Subject, subjects

FULL = {"adapter.method": "full", "model.quant": "none", "lora": None}
# name -> name of a subject, and settings of its recipe
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "LoRA": ("llama", {"lora.dropout": 0.1}),
    "DoRA": ("llama", {"adapter.method": "dora"}),
    "bottleneck": ("llama", {"adapter.method": "bottleneck", "lora": None}),
    "prompt tuning": ("llama", {"adapter.method": "prompt", "lora": None}),
    "p-tuning": ("llama", {"adapter.method": "prompt", "prompt.encoder_width": 8, "lora": None}),
    "prefix tuning": ("llama", {"adapter.method": "prefix", "lora": None}),
    "full": ("llama", FULL),
    "full, updates in backward": (
        "llama",
        FULL | {"memory.optimizer_in_backward": True, "train.max_grad_norm": 0.0},
    ),
    "full, blocks in turn": ("llama", FULL | {"adapter.switch_every": 2}),
    "embeddings and norms": ("llama", {"adapter.train_also": ["embeddings", "norms"]}),
    "new tokens": ("llama", {"adapter.train_tokens": ["<|call|>"]}),
    "merge-aware nf4": ("llama", {"train.merge_aware": "nf4"}),
    "merge-aware q8_0": ("llama", {"train.merge_aware": "q8_0"}),
    "start qera": ("llama", {"lora.start": "qera"}),
    "start eva": ("llama", {"lora.start": "eva"}),
    "start loftq": ("llama", {"lora.start": "loftq"}),
    "start pissa": ("llama", {"lora.start": "pissa"}),
    "GPTQ": ("gptq codes", {}),
    "GGUF codes": ("llama gguf", {}),
    "mixture of experts": ("qwen3_moe", {"lora.targets": ["all-linear", "experts"]}),
    "state-space layers": ("mamba2", {}),
    "DPO": ("llama dpo", {}),
    "KTO": ("llama kto", {}),
    "GRPO": ("llama grpo", {}),
    "classification": ("modernbert classification", {}),
    "reward model": ("llama reward", {}),
    "picture classes": ("dinov2 image-classification", {}),
    "masks": ("vit image-segmentation", {}),
    "picture embeddings": ("siglip image-embedding", {}),
    "chats, LLaVA": ("llava chats", {}),
    "chats, Qwen3-VL": ("qwen3_vl chats", {}),
    "chats, Gemma 3 with DoRA": ("gemma3 chats", {"adapter.method": "dora"}),
    "SD": ("sd", {}),
    "SDXL": ("sdxl", {}),
    "FLUX": ("flux", {}),
    "DiT, full": ("dit", FULL),
}
PAIRS = (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)


class KindLab(Lab):
    """The undisturbed run of a kind."""

    def __init__(self, folder: Path, subject: Subject, settings: dict[str, object]):
        self.subject, self.settings = subject, settings
        super().__init__(folder)

    def write(self, folder: Path) -> Path:
        """See ``Lab``; planned micro-batches, which a resumed run has to take again."""
        self.subject.save(folder / "model")
        path = self.subject.write(folder, folder / "model")
        train = {"max_steps": 8, "eval_every_steps": 3, "save_every_steps": 2, "keep_checkpoints": 2}
        planned = {f"train.{name}": value for name, value in train.items()} | {"memory.micro_batches": "auto"}
        with_settings(path, planned | self.settings)
        return path


def interrupted(name: str, folder: Path, chance: random.Random, times: int) -> Row:
    """Interrupt a kind of run so many times, each resumed once, and let its disk fail once."""
    wanted, settings = KINDS[name]
    subject = next(each for found in subjects().values() for each in found if each.name == wanted)
    lab, row = KindLab(folder, subject, settings), Row(name)
    places = [place for place in ("step", "evaluation", "save") if lab.calls[place]]
    for number in range(times):
        place = places[number % len(places)]
        call = place, chance.randrange(lab.calls[place])
        if number % 3 == 0:
            killed_at(lab, row, f"SIGKILL in {place} {call[1]}", at_call(*call, kill))
        elif number % 3 == 1:
            signalled(lab, row, signal.SIGKILL, chance.uniform(0.2, 1.0) * lab.seconds, {-signal.SIGKILL, 0})
        else:
            signalled_twice(lab, row, chance.choice(PAIRS), chance.uniform(0.02, 0.12), call)
    hindered(lab, row, chance.randrange(disk_operations(lab)), disk_error(chance), False)
    return row
