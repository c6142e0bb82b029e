"""Every kind of run, interrupted: each method, objective, start, form of codes and task on a tiny model.

What ``faults.lab`` does to one fine-tune of a language model, at few points of many kinds of runs.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path

from faults.faults import at_call, disk_error, disk_operations, hindered, kill, killed_at, signalled, signalled_twice
from faults.lab import SAVE_EVERY, STEPS, Lab, Row
from faults.ranks import RanksLab, signalled_rank, signalled_rank_at
from faults.subjects import subjects, with_settings

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
    "start olora": ("llama", {"lora.start": "olora"}),
    "GPTQ": ("gptq codes", {}),
    "AWQ": ("awq codes", {}),
    "FP8": ("fp8 codes", {}),
    "MXFP4": ("mxfp4 codes", {}),
    "GGUF codes": ("llama gguf", {}),
    "mixture of experts": ("qwen3_moe", {"lora.targets": ["all-linear", "experts"]}),
    "state-space layers": ("mamba2", {}),
    "DPO": ("llama dpo", {}),
    "KTO": ("llama kto", {}),
    "ORPO": ("llama orpo", {}),
    "GRPO": ("llama grpo", {}),
    "classification": ("modernbert classification", {}),
    "several labels": ("llama multi-label", {}),
    "regression": ("bert regression", {}),
    "reward model": ("llama reward", {}),
    "picture classes": ("dinov2 image-classification", {}),
    "masks": ("vit image-segmentation", {}),
    "picture embeddings": ("siglip image-embedding", {}),
    "chats, LLaVA": ("llava chats", {}),
    "chats, Qwen3-VL": ("qwen3_vl chats", {}),
    "chats, Gemma 3 with DoRA": ("gemma3 chats", {"adapter.method": "dora"}),
    "SD": ("sd", {}),
    "SDXL": ("sdxl", {}),
    "FLUX": ("flux", {"data.resolution": 16}),  # its configuration names none
    "DiT, full": ("dit", FULL),
}
PLANNED = {
    "train.max_steps": STEPS,
    "train.eval_every_steps": 3,
    "train.save_every_steps": SAVE_EVERY,
    "train.keep_checkpoints": 2,
    "memory.micro_batches": "auto",  # which a resumed run has to take again
}
PAIRS = (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)


class KindLab(Lab):
    """The undisturbed run of a kind, by its name in ``KINDS``."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        super().__init__(folder)

    def write(self, folder: Path) -> Path:
        """See ``Lab``."""
        return write_kind(self.name, folder, PLANNED)


class RanksKindLab(RanksLab):
    """The undisturbed run of a kind by several processes."""

    def __init__(self, folder: Path, name: str, ranks: int):
        self.name = name
        super().__init__(folder, ranks)

    def write(self, folder: Path) -> Path:
        """See ``Lab``."""
        return write_kind(self.name, folder, PLANNED)


def write_kind(name: str, folder: Path, settings: Mapping[str, object]) -> Path:
    """Write the files of a kind; return the path of its recipe, with further settings."""
    wanted, own = KINDS[name]
    subject = next(each for found in subjects().values() for each in found if each.name == wanted)
    subject.save(folder / "model")
    path = subject.write(folder, folder / "model")
    with_settings(path, {**settings, **own})
    return path


def interrupted(name: str, folder: Path, chance: random.Random, times: int) -> Row:
    """Interrupt a kind of run so many times, let its disk fail once, and begin it twice with one cache."""
    lab, row = KindLab(folder, name), Row(name)
    places = [place for place in ("step", "evaluation", "save") if lab.calls[place]]
    for number in range(times):
        place = chance.choice(places)
        call = place, chance.randrange(lab.calls[place])
        if number % 3 == 0:
            killed_at(lab, row, f"SIGKILL in {place} {call[1]}", at_call(*call, kill))
        elif number % 3 == 1:
            signalled(lab, row, signal.SIGKILL, chance.uniform(0.2, 1.0) * lab.seconds, {-signal.SIGKILL, 0})
        else:
            signalled_twice(lab, row, chance.choice(PAIRS), chance.uniform(0.02, 0.12), call)
    hindered(lab, row, chance.randrange(disk_operations(lab)), disk_error(chance), False)
    _with_one_cache(lab, row)
    return row


def _with_one_cache(lab: Lab, row: Row) -> None:
    """Begin the run twice at one time, with one empty cache."""
    outs = [lab.folder / f"at-once-{number}" for number in range(2)]
    cache = str(lab.folder / "one-cache")

    def install() -> None:
        os.environ["QLORA_LITE_CACHE"] = cache

    children = [lab.start(out, install=install) for out in outs]
    for out, child in zip(outs, children, strict=True):
        lab.judge(row, out, "two processes with one cache", (0, lab.wait(child)), {0})


def interrupted_ranks(name: str, folder: Path, chance: random.Random, times: int, ranks: int) -> Row:
    """Kill one rank of a kind of run so many times, in a step or at a random moment, and stop the launcher once."""
    lab, row = RanksKindLab(folder, name, ranks), Row(name)
    for number in range(times):
        rank = number % ranks
        words = f"rank {rank} was killed by SIGKILL"
        if number % 2:
            signalled_rank(lab, row, rank, signal.SIGKILL, chance.uniform(0.0, lab.seconds), words)
        else:
            call = "step", chance.randrange(lab.calls["step"])
            signalled_rank_at(lab, row, rank, signal.SIGKILL, call, words)
    signalled_rank(lab, row, None, signal.SIGTERM, chance.uniform(0.0, lab.seconds), "")
    return row
