"""A run that was stopped, killed or hindered goes on as if nothing had happened, and is never taken for another one."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import save_tiny, write_recipe, write_rows

from qlora_lite.artifacts.run_files import read_run
from qlora_lite.artifacts.run_folder import newest_path, open_run
from qlora_lite.errors import CheckpointError, Interrupted, ModelError, OutputError, RecipeError
from qlora_lite.files import sha256
from qlora_lite.inference import course
from qlora_lite.models import quantizer
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.schema import Output
from qlora_lite.runs import async_checkpoint as saver
from qlora_lite.runs import saving, training
from qlora_lite.runs.resume import RUN, Continuation
from qlora_lite.runs.run import run_recipe
from qlora_lite.train import checkpoints, loop
from qlora_lite.train.checkpoints import MANIFEST, folder_of, steps_on_disk
from qlora_lite.train.loop import Trainer
from qlora_lite.train.step import Evaluation
from qlora_lite.train.workload import Workload

TIMES = {"seconds", "tokens_per_second", "peak_bytes"}
OTHER_RUN = {*TIMES, "metrics_sha256", "started", "resumed", "plan", "memory_table"}  # of the summary
STEPS = {
    "max_steps": 8,
    "eval_every_steps": 3,
    "save_every_steps": 2,
    "keep_checkpoints": 3,
    "learning_rate": 0.003,
    "metrics_examples": 0,
}
WHOLE = {"train": STEPS, "lora": {"rank": 64, "dropout": 0.1}}


class Lab:
    """One recipe in a folder of its own, begun and resumed."""

    def __init__(self, folder, model_folder, overrides=(), stopped=None):
        self.folder, self.model, self.out, self.overrides = folder, model_folder, folder / "out", overrides
        self._stopped = stopped
        folder.mkdir(exist_ok=True)

    def begin_with_stopped(self, step):
        """Give the folder what it has after ``stop(step)``: the first test that asks for it runs so far."""
        stopped = self._stopped / f"after-{step}"
        if not stopped.exists():
            self.stop(step)
            shutil.copytree(self.folder, stopped)
        shutil.copytree(stopped, self.folder, dirs_exist_ok=True)

    def recipe(self, **sections):
        merged = {name: {**WHOLE.get(name, {}), **sections.get(name, {})} for name in {*WHOLE, *sections}}
        return load_recipe(write_recipe(self.folder, self.model, **merged), self.overrides)

    def run(self, stop_at=None, number=signal.SIGTERM, resume=None, force=False, at_step=None, **sections):
        """Run, with a signal after a step if one is given, or a call at each step."""

        def progress(metrics, _total):
            if metrics.step == stop_at:
                os.kill(os.getpid(), number)
            if at_step:
                at_step(metrics.step)

        return run_recipe(self.recipe(**sections), progress, resume, force)

    def stop(self, step, **options):
        with pytest.raises(Interrupted) as caught:
            self.run(stop_at=step, **options)
        return str(caught.value)

    @property
    def summary(self):
        return json.loads((self.out / "summary.json").read_text())

    @property
    def lines(self):
        """The lines of metrics without times."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]

    @property
    def digest(self):
        return sha256(self.out / "adapter" / "adapter_model.safetensors")

    @property
    def checkpoints(self):
        return steps_on_disk(self.out / "checkpoints")


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory):
    """One folder for all tests, since a run keeps the paths that it began with."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture
def lab(lab_folder, model_folder):
    shutil.rmtree(lab_folder / "lab", ignore_errors=True)
    return Lab(lab_folder / "lab", model_folder, stopped=lab_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    """The same recipe, never interrupted."""
    lab = Lab(tmp_path_factory.mktemp("whole"), model_folder)
    lab.run()
    return lab


def assert_same_run(one, other):
    assert one.lines == other.lines
    assert one.digest == other.digest
    for name in ("adapter", "adapter-last"):
        mine, theirs = (load_file(lab.out / name / "adapter_model.safetensors") for lab in (one, other))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    mine, theirs = ({k: v for k, v in lab.summary.items() if k not in OTHER_RUN} for lab in (one, other))
    assert mine == theirs
    assert (one.out / "report.html").exists()


@pytest.mark.parametrize("stops", [[2], [3, 4], [1, 5, 7]], ids=str)
def test_a_stopped_run_goes_on_to_the_very_same_end(lab, whole, stops):
    lab.stop(stops[0])
    for stop in stops[1:]:
        lab.stop(stop, resume="")
    lab.run(resume=lab.out)
    assert_same_run(lab, whole)
    assert [part["after_step"] for part in lab.summary["resumed"]] == stops
    assert [line["step"] for line in lab.lines if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"order": "as-is", "streaming": True}, "train": {"optimizer": "paged_adamw_8bit"}},
        {
            "data": {"packing": False},
            "train": {
                "gradient_accumulation_steps": 3,
                "micro_batch_size": 2,
                "max_steps": None,
                "epochs": 1.5,
                "optimizer": "adamw_8bit",
            },
        },
        {"data": {"eval": None}, "train": {"eval_every_steps": 0, "metrics_examples": 0, "optimizer": "lion_8bit"}},
        {"train": {"metrics": ["exact_match", "bleu", "answer_loss"], "metrics_examples": 2, "metrics_every_steps": 2}},
    ],
    ids=["streaming", "accumulation", "no evaluation", "metrics"],
)
def test_runs_of_every_kind_go_on_to_the_very_same_end(lab, tmp_path, model_folder, sections):
    other = Lab(tmp_path / "whole", model_folder)
    other.run(**sections)
    lab.stop(3, **sections)
    lab.run(resume="", **sections)
    assert_same_run(lab, other)


def test_a_run_with_layers_in_16_bit_goes_on_to_the_very_same_end_and_not_with_others(tmp_path, model_folder):
    keep = ['model.keep_16bit=[v_proj, "model.layers.0.*"]']
    whole, lab = (Lab(tmp_path / name, model_folder, keep) for name in ("whole", "lab"))
    whole.run()
    lab.stop(3)
    lab.overrides = ["model.keep_16bit=v_proj"]
    with pytest.raises(CheckpointError, match=r"model.keep_16bit: \['v_proj', 'model.layers.0.\*'\] -> \['v_proj'\]"):
        lab.run(resume="")
    lab.overrides = keep
    lab.run(resume="")
    assert_same_run(lab, whole)
    kinds = {entry["why"] for entry in lab.summary["memory_table"]}
    assert "frozen, not quantised" in kinds and any("nf4 codes" in kind for kind in kinds)


def test_a_merge_aware_run_goes_on_to_the_very_same_end_with_streamed_weights(tmp_path, model_folder):
    aware = "train.merge_aware=nf4", "lora.dropout=0"
    whole, lab = (Lab(tmp_path / name, model_folder, aware) for name in ("whole", "lab"))
    whole.run()
    lab.stop(3)
    assert whole.summary["plan"]["chosen"]["memory.cache_merged"] is True
    lab.run(resume="", memory={"resident_layers": 0})
    assert_same_run(lab, whole)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"offload_checkpoints": True, "embeddings": "host", "head": "host"},
        {"resident_layers": 0, "checkpointing": "selective", "cache_dequantized": True},
    ],
    ids=str,
)
def test_on_a_gpu_a_repeatable_run_goes_on_to_the_very_same_end(tmp_path, model_folder, memory):
    train = {"deterministic": True, "optimizer": "paged_adamw_8bit", "metrics_examples": 2}
    lab, other = (Lab(tmp_path / name, model_folder, ["model.device=cuda"]) for name in ("stopped", "whole"))
    other.run(train=train, memory=memory)
    assert torch.cuda.max_memory_allocated()
    lab.stop(3, train=train, memory=memory)
    lab.run(resume="", train=train, memory=memory)
    assert_same_run(lab, other)


def test_a_killed_run_loses_the_steps_since_its_checkpoint_and_their_lines_only(lab, whole):
    lab.begin_with_stopped(5)
    shutil.rmtree(folder_of(lab.out / "checkpoints", 5))  # as if the process had been killed instead
    with (lab.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    (lab.out / ".summary.json.7.partial").write_text("{")
    (lab.out / "checkpoints" / ".step-00000006.7.partial").mkdir()
    lab.run(resume="")
    assert_same_run(lab, whole)
    assert lab.summary["resumed"][0]["after_step"] == 4
    assert not list(lab.out.rglob(".*"))


def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_the_one_before_is_used(lab, whole, caplog):
    lab.begin_with_stopped(5)
    file = folder_of(lab.out / "checkpoints", 5) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    lab.run(resume="")
    assert_same_run(lab, whole)
    assert any("skipped a damaged checkpoint" in m and "optimizer.safetensors has" in m for m in caplog.messages)
    assert "skipped a damaged checkpoint" in (lab.out / "log.txt").read_text()
    assert lab.checkpoints == [8, 6, 4]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_afresh(lab):
    lab.begin_with_stopped(3)
    for step in lab.checkpoints:
        (folder_of(lab.out / "checkpoints", step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left .*manifest.json is missing"):
        lab.run(resume="")
    assert lab.checkpoints == [3, 2]


def test_a_run_without_a_checkpoint_begins_afresh_and_says_so(lab, whole, caplog):
    lab.out.mkdir()
    (lab.out / ".recipe.yaml.1.partial").write_text("half")  # killed at once
    lab.run(resume="")
    assert_same_run(lab, whole)
    shutil.rmtree(lab.out / "checkpoints")
    summary = lab.summary
    (lab.out / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    caplog.clear()
    lab.run(resume=lab.out)
    assert_same_run(lab, whole)
    assert sum("has no checkpoint yet; it begins afresh" in message for message in caplog.messages) == 1


def test_without_a_folder_in_the_recipe_the_newest_run_is_gone_on_with(lab, whole, monkeypatch, caplog):
    monkeypatch.chdir(lab.folder)
    nowhere = {"output": {"dir": None, "name": "mine"}}
    for name in ("mine-20200101-000000", "other-29990101-000000", "mine-x-29990101-000000"):
        (lab.folder / "runs" / name).mkdir(parents=True)
    lab.out = lab.folder / "runs" / "mine-29980101-000000"
    first = lab.stop(3, resume="", **{"output": {"dir": str(lab.out), "name": "mine"}})
    assert f"--resume {lab.out}" in first
    assert lab.run(resume="", **nowhere).resolve() == lab.out.resolve()
    assert lab.digest == whole.digest
    other = Lab(lab.folder / "x", lab.model)
    caplog.set_level(logging.INFO, "qlora_lite")
    with pytest.raises(Interrupted):
        other.run(stop_at=1, resume="", output={"dir": None, "name": "new"})
    assert any("there is no run of this recipe yet" in message for message in caplog.messages)


def test_a_complete_run_is_left_as_it_is(lab, caplog):
    lab.run()
    before = {path: path.stat().st_mtime_ns for path in lab.out.rglob("*") if path.name != "log.txt"}
    lab.run(resume="")
    assert {path: path.stat().st_mtime_ns for path in lab.out.rglob("*") if path.name != "log.txt"} == before
    assert any("is complete" in message for message in caplog.messages)


@pytest.mark.parametrize("change", ["steps", "rows"])
def test_a_complete_run_is_left_as_it_is_by_one_that_turns_out_to_be_another(lab, change, caplog):
    schedule = {"lr_scheduler": "cosine" if change == "steps" else "constant"}
    lab.run(train=schedule)
    before = {path: path.read_bytes() for path in lab.out.rglob("*") if path.is_file() and path.name != "log.txt"}
    rows = {"train": str(write_rows(lab.folder / "other.jsonl", 24, "#"))} if change == "rows" else {}
    with pytest.raises(CheckpointError, match=rf"this would not be the run that was begun:\n.*{change}"):
        lab.run(resume="", train=schedule | {"max_steps": 12}, data=rows)
    assert not any("accepted" in message for message in caplog.messages)
    assert {path: path.read_bytes() for path in before} == before


def test_a_complete_run_without_checkpoints_is_not_overwritten_by_another_recipe(lab):
    lab.run()
    shutil.rmtree(lab.out / "checkpoints")
    digest = lab.digest
    with pytest.raises(CheckpointError, match="is complete and has no checkpoint"):
        lab.run(resume="", train={"seed": 4})
    assert lab.digest == digest


# --- changes


def test_changes_that_make_another_run_are_refused_one_by_one_and_leave_it_as_it_is(lab, whole):
    lab.begin_with_stopped(4)
    names = ("metrics.jsonl", "recipe.yaml", "summary.json")
    before = [(lab.out / name).read_bytes() for name in names]
    with pytest.raises(CheckpointError) as caught:
        lab.run(resume="", lora={"rank": 32, "alpha": 16}, train={"seed": 3, "optimizer": "lion_32bit"})
    for text in (
        "lora.rank: 64 -> 32",
        "lora.alpha: 8.0 -> 16.0",
        "train.seed: 0 -> 3",
        "--force",
        "train.optimizer: adamw_torch -> lion_32bit",
    ):
        assert text in str(caught.value)
    assert [(lab.out / name).read_bytes() for name in names] == before
    lab.run(resume="")
    assert_same_run(lab, whole)


def test_harmless_changes_are_listed_and_change_nothing(lab, whole, caplog):
    lab.begin_with_stopped(4)
    lab.run(resume="", train={"save_every_steps": 1, "keep_checkpoints": 1, "max_hours": 3.0})
    assert_same_run(lab, whole)
    (part,) = lab.summary["resumed"]
    assert part["forced_changes"] == []
    assert "train.save_every_steps: 2 -> 1" in part["changes"]
    assert any("resume: accepted: train.keep_checkpoints: 3 -> 1" in message for message in caplog.messages)
    assert lab.checkpoints == [8]


def test_a_checkpoint_of_another_version_is_refused_in_one_line_that_says_so(lab, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT - 1)
        lab.stop(3)
    with pytest.raises(CheckpointError) as caught:
        lab.run(resume="")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("no whole checkpoint is left in") and "resume with the version that wrote it" in line


def test_a_run_that_is_gone_on_with_to_count_matches_that_it_did_not_count_before_ends_well(tmp_path, model_folder):
    from qlora_lite.cli.train import _result

    lab = Lab(tmp_path, model_folder)
    lab.stop(2, train={"metrics_examples": 0})
    lab.run(resume="", force=True, train={"metrics_examples": 2})
    assert lab.summary["status"] == "complete" and "exact_match_after" in lab.summary and not lab.summary["samples"]
    assert "exact match" not in _result(lab.out, lab.summary)
    earlier = {key: value for key, value in lab.summary.items() if key != "eval_loss_before"}
    assert "evaluation loss" in _result(lab.out, lab.summary) and "evaluation loss" not in _result(lab.out, earlier)


def test_another_instruction_set_is_reported(tmp_path, model_folder, monkeypatch, caplog):
    lab = Lab(tmp_path, model_folder)
    lab.stop(2)
    here = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    with caplog.at_level("WARNING", "qlora_lite"):
        lab.run(resume="")
    assert f"resume: instructions {here} -> OTHER; the last digits may differ" in caplog.text


def test_whose_loss_is_computed_is_compared_with_what_the_checkpoint_knows_of_it():
    for before, now, said in (
        ("liger", "chunked", ["loss liger -> chunked"]),
        ("chunked", "liger", ["loss chunked -> liger"]),
        ("liger", "liger", []),
    ):
        continuation = Continuation(SimpleNamespace(documents={RUN: {"environment": {"loss": before}}}))
        continuation.say_changes({"loss": now})
        assert continuation.accepted == said


def test_a_setting_that_is_newer_than_the_checkpoint_has_been_what_it_is_by_default(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {train: rows.jsonl}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    others = ("memory", "fused_loss", "off"), ("train", "seed", 5), ("memory", "optimizer_in_backward", True)
    for section, name, other in others:
        written = recipe.model_dump(mode="json")
        del written[section][name]
        continuation = Continuation(SimpleNamespace(documents={RUN: {"recipe": written}}))
        continuation.compare_settings(recipe)
        assert not continuation.accepted and not continuation.forced
        values = {section: getattr(recipe, section).model_copy(update={name: other})}
        with pytest.raises(CheckpointError, match=rf"{section}.{name}: {getattr(getattr(recipe, section), name)} -> "):
            continuation.compare_settings(recipe.model_copy(update=values))


@pytest.mark.parametrize(
    "place", ["objective.rewards", "adapter.train_also", "train.metrics", "lora.targets", "diffusion.sample_prompts"]
)
def test_a_list_that_is_newer_than_the_checkpoint_has_been_what_it_is_by_default(tmp_path, place):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {train: rows.jsonl}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    written = recipe.model_dump(mode="json")
    section, name = place.split(".")
    del written[section][name]
    continuation = Continuation(SimpleNamespace(documents={RUN: {"recipe": written}}))
    continuation.compare_settings(recipe)
    assert not continuation.accepted and not continuation.forced


def test_paging_is_accepted_and_another_optimizer_is_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text("model: {path: gpt2}\ndata: {train: rows.jsonl}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.train.optimizer == "adamw_8bit"
    for before, accepted in (("paged_adamw_8bit", True), ("paged_lion_8bit", False), ("adamw_32bit", False)):
        written = recipe.model_dump(mode="json")
        written["train"]["optimizer"] = before  # the first was what a recipe without it meant
        continuation = Continuation(SimpleNamespace(documents={RUN: {"recipe": written}}), force=True)
        continuation.compare_settings(recipe)
        change = [f"train.optimizer: {before} -> adamw_8bit"]
        assert (continuation.accepted, continuation.forced) == ((change, []) if accepted else ([], change))


def test_a_forced_change_is_taken_and_the_summary_says_so(lab, whole):
    lab.begin_with_stopped(4)
    lab.run(resume="", force=True, lora={"alpha": 16})
    assert lab.summary["resumed"][0]["forced_changes"] == ["lora.alpha: 8.0 -> 16.0"]
    assert lab.digest != whole.digest
    assert "alpha: 16" in (lab.out / "recipe.yaml").read_text()
    assert "with --force, despite changes" in (lab.out / "report.html").read_text()


def test_a_forced_change_of_the_shape_of_the_weights_is_refused_all_the_same(lab):
    lab.begin_with_stopped(2)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not fit this run"):
        lab.run(resume="", force=True, lora={"rank": 8})


def test_more_steps_give_the_longer_run_where_the_learning_rates_are_the_same(lab, tmp_path, model_folder):
    constant = {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    longer = Lab(tmp_path / "longer", model_folder)
    longer.run(train={**constant, "max_steps": 11})
    lab.run(train=constant)
    lab.run(resume="", train={**constant, "max_steps": 11})
    assert_same_run(lab, longer)
    assert "steps: 8 -> 11" in lab.summary["resumed"][0]["changes"]


def test_more_steps_under_a_schedule_that_bends_are_refused_and_fewer_always(lab, monkeypatch):
    lab.begin_with_stopped(4)
    monkeypatch.setattr("qlora_lite.runs.stages.find_task", None)  # before anything is loaded
    with pytest.raises(
        CheckpointError, match=r"steps: 8 -> 11, for which train\.lr_scheduler cosine gives the 4 steps"
    ):
        lab.run(resume="", train={"max_steps": 11})
    with pytest.raises(CheckpointError, match="the checkpoint is of step 4, and the run now ends after 3"):
        lab.run(resume="", force=True, train={"max_steps": 3})
    monkeypatch.undo()
    lab.run(resume="", force=True, train={"max_steps": 11})
    assert lab.summary["steps"] == 11
    assert len(lab.summary["resumed"][-1]["forced_changes"]) == len({*lab.summary["resumed"][-1]["forced_changes"]})


def test_other_rows_another_tokenizer_and_another_model_are_refused_by_name(lab, tmp_path, caplog):
    lab.begin_with_stopped(2)
    rows = write_rows(tmp_path / "other.jsonl", 24, "#")
    with pytest.raises(CheckpointError, match="other training rows than before"):
        lab.run(resume="", data={"train": str(rows)})
    with pytest.raises(CheckpointError, match="other evaluation rows than before"):
        lab.run(resume="", data={"eval": str(write_rows(tmp_path / "eval.jsonl", 7, "!"))})
    save_tiny(tmp_path / "model", seed=5)
    lab.model = tmp_path / "model"
    caplog.clear()
    with pytest.raises(CheckpointError, match="other base model than before"):
        lab.run(resume="")
    assert lab.summary["status"] == "interrupted"
    assert "the largest micro-batch peaks" not in caplog.text  # refused before a step is probed


def test_another_tokenizer_is_refused_by_name_though_the_rows_are_the_same(lab, tmp_path):
    lab.begin_with_stopped(2)
    lab.model = shutil.copytree(lab.model, tmp_path / "model")
    content = json.loads((lab.model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["\u0100"], vocabulary["\u0101"] = vocabulary["\u0101"], vocabulary["\u0100"]  # the bytes 0 and 1
    (lab.model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="other tokenizer than before") as caught:
        lab.run(resume="")
    assert "rows" not in str(caught.value)


def test_rows_and_model_that_only_moved_are_the_same(lab, whole, tmp_path):
    lab.begin_with_stopped(3)
    lab.model = shutil.copytree(lab.model, tmp_path / "elsewhere")
    rows = write_rows(tmp_path / "moved.jsonl", 24)
    lab.run(resume="", data={"train": str(rows)})
    assert lab.lines == whole.lines
    mine, theirs = (load_file(other.out / "adapter" / "adapter_model.safetensors") for other in (lab, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def as_an_earlier_version_wrote(run):
    """Name the base model by the bits of its frozen weights; its content was in the summary alone."""
    run["identity"]["base model"] = run["environment"].pop("frozen weights")


@pytest.mark.parametrize("earlier", [False, True])
def test_weights_whose_last_bit_is_another_machine_s_are_the_same_base_model(
    lab, tmp_path, monkeypatch, caplog, earlier
):
    lab.stop(3)
    if earlier:
        rewrite_run(lab, 3, as_an_earlier_version_wrote)
    quantize, found = quantizer.quantize, []

    def quantize_elsewhere(*arguments):
        packed = quantize(*arguments)
        found.append(packed.absmax_offset)
        return packed._replace(absmax_offset=packed.absmax_offset.nextafter(torch.tensor(torch.inf)))

    monkeypatch.setattr(quantizer, "quantize", quantize_elsewhere)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "empty"))
    lab.run(resume="")
    assert found and lab.summary["status"] == "complete" and not lab.summary["resumed"][0]["forced_changes"]
    (said,) = [message for message in caplog.messages if "last digits may differ" in message]
    assert "frozen weights" in said


def test_another_base_model_than_that_of_an_earlier_version_s_checkpoint_is_refused(lab, tmp_path):
    lab.begin_with_stopped(3)
    rewrite_run(lab, 3, as_an_earlier_version_wrote)
    save_tiny(tmp_path / "model", seed=5)
    lab.model = tmp_path / "model"
    with pytest.raises(CheckpointError, match="other base model than before"):
        lab.run(resume="")


def test_another_compute_type_is_refused_where_auto_has_become_one(tmp_path, model_folder, monkeypatch):
    lab = Lab(tmp_path / "lab", model_folder, ["model.compute_dtype=auto"])
    monkeypatch.setattr("qlora_lite.models.load.fast_dtype", lambda _: torch.float32)
    lab.stop(2)
    monkeypatch.setattr("qlora_lite.models.load.fast_dtype", lambda _: torch.bfloat16)
    with pytest.raises(CheckpointError, match="other compute type than before"):
        lab.run(resume="")
    rewrite_run(lab, 2, lambda run: run["identity"].pop("compute type"))  # as an earlier version wrote
    lab.run(resume="")
    assert lab.summary["status"] == "complete"


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(lab, number):
    earlier = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    message = lab.stop(3, number=number)
    assert message.startswith(f"stopped by {number.name} after step 3; all of it is saved. To resume: qlora-lite")
    assert message.endswith(f"{lab.out / 'recipe.yaml'} --resume {lab.out}")
    assert lab.checkpoints == [3, 2] and lab.lines[-1]["step"] == 3
    assert lab.summary["status"] == "interrupted" and lab.summary["steps"] == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == earlier
    assert (lab.out / "adapter-last" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_signal_in_an_evaluation_ends_it_at_once_and_it_is_done_again(lab, whole, monkeypatch, call):
    """The first evaluation comes before training, the second and third in it, the fourth behind it."""
    evaluate, calls = Trainer.evaluate, []

    def signalled(trainer, examples, *watched):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, examples, *watched)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", signalled)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step"):
            lab.run()
    assert len(calls) == call
    assert lab.checkpoints[:1] == {1: [], 2: [3], 3: [6], 4: [8]}[call]
    lab.run(resume="")
    assert_same_run(lab, whole)


def test_a_signal_while_loading_acts_at_once(lab, whole, monkeypatch):
    from qlora_lite.runs import stages

    def signalled(*_arguments, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "build_model", signalled)
        with pytest.raises(Interrupted, match="stopped at once by SIGTERM"):
            lab.run()
    assert lab.summary["status"] == "interrupted"
    lab.run(resume="")
    assert_same_run(lab, whole)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["handled", "ignored"])
def test_a_second_signal_stops_at_once(lab, whole, request, before):
    earlier = signal.signal(signal.SIGINT, before)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, earlier))

    def twice(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at once by SIGINT"):
        lab.run(at_step=twice)
    assert lab.checkpoints == [4, 2]
    lab.run(resume="")
    assert_same_run(lab, whole)


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    "sent",
    [
        [(loop, "train_step", 6, [INT, INT])],
        [(loop, "train_step", 6, [TERM, TERM])],  # its number is counted already
        [(loop, "train_step", 5, [INT]), (saving, "capture", 3, [TERM])],  # in the save of what was learned
        [(Trainer, "evaluate", 3, [TERM]), (saving, "capture", 3, [INT])],
    ],
    ids=["step", "step by TERM", "save", "save from evaluation"],
)
def test_two_signals_to_the_command_never_save_half_a_step(lab, whole, monkeypatch, command, sent):
    """The second one acts by the command line's handler, which ends the run at any place."""
    for owner, name, call, numbers in sent:
        signal_at(monkeypatch, owner, name, call, numbers)
    lab.recipe()
    code, _, said = command("train", lab.folder / "recipe.yaml")
    monkeypatch.undo()
    lab.run(resume="")
    assert_same_run(lab, whole)
    assert code == 130 and lab.summary["resumed"][0]["after_step"] == 4
    assert f"stopped at once by {sent[-1][-1][-1].name}; the newest checkpoint is of step 4. To resume: " in said


def signal_at(monkeypatch, owner, name, call, numbers):
    """Send this process signals at a call of a function."""
    real, calls = getattr(owner, name), iter(range(1, 999))

    def signalled(*arguments, **options):
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)


def test_time_that_is_over_stops_the_run_like_a_signal(lab, whole):
    with pytest.raises(Interrupted, match=r"stopped by train\.max_hours after step 1; all of it is saved"):
        lab.run(train={"max_hours": 1e-9})
    lab.run(resume="")
    assert_same_run(lab, whole)


def test_checkpoints_are_due_by_steps_or_by_time(lab):
    lab.run(train={"save_every_steps": 0, "save_every_minutes": 1e-6, "keep_checkpoints": 100})
    assert lab.checkpoints == [8, 7, 6, 5, 4, 3, 2, 1]
    shutil.rmtree(lab.out)
    lab.run(train={"save_every_steps": 0, "save_every_minutes": 0.0})
    assert lab.checkpoints == [8]


def test_two_runs_cannot_write_one_folder_and_a_killed_one_blocks_nobody(lab):
    lab.begin_with_stopped(2)
    code = (
        "import sys, time, pathlib, qlora_lite.files\n"
        "with qlora_lite.files.locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, lab.out], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(OutputError, match=r"another process is writing .*; wait for it"):
        lab.run(resume="")
    holder.kill()
    holder.communicate()
    lab.run(resume="")
    assert lab.summary["status"] == "complete"


def test_a_run_that_was_killed_can_be_used_with_its_newest_checkpoint(lab):
    lab.begin_with_stopped(4)
    for name in ("adapter", "adapter-last"):
        shutil.rmtree(lab.out / name, ignore_errors=True)
    opened = open_run(lab.out)
    assert opened.adapter == folder_of(lab.out / "checkpoints", 4)
    from qlora_lite.inference.evaluate import evaluate_recipe

    assert evaluate_recipe(opened.recipe, opened.adapter, 0)["eval_loss"] < lab.lines[0]["eval_loss"]


def flip_a_bit(path, place=-9):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_adapter_is_refused_with_what_there_is_instead_and_written_again_by_resume(lab, whole, caplog):
    lab.begin_with_stopped(4)
    flip_a_bit(lab.out / "adapter-last" / "adapter_model.safetensors")
    assert open_run(lab.out).adapter.name == "adapter"  # the best one is another file
    (lab.out / "adapter").rename(lab.folder / "best")
    again = (
        "write it again from the checkpoint of step {}: qlora-lite train " + f"{lab.out}/recipe.yaml --resume {lab.out}"
    )
    with pytest.raises(ModelError, match=r"adapter-last/adapter_model\.safetensors is damaged: its SHA-256") as caught:
        open_run(lab.out)
    assert str(caught.value).endswith(again.format(4))
    lab.run(resume="")
    flip_a_bit(lab.out / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter/adapter_model") as caught:
        open_run(lab.out)
    cure = f"{again.format(8)}, or remove {lab.out}/adapter to use {lab.out}/adapter-last, that of the last step"
    assert str(caught.value).endswith(cure)
    lab.run(resume="")
    assert "adapter is lost or damaged; it is written again" in caplog.text
    (lab.out / "adapter" / "adapter_model.safetensors").unlink()
    lab.run(resume="")
    assert_same_run(lab, whole)
    shutil.rmtree(lab.out / "checkpoints")
    flip_a_bit(lab.out / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is complete and has no checkpoint"):
        lab.run(resume="")


def test_damaged_metrics_are_said_by_resume_and_by_the_report(lab, caplog):
    lab.begin_with_stopped(4)
    flip_a_bit(lab.out / "metrics.jsonl", lab.out.joinpath("metrics.jsonl").read_text().index("loss") + 7)
    assert any("metrics.jsonl is damaged" in problem for problem in read_run(lab.out).problems)
    lab.run(resume="")
    said = f"{lab.out}/metrics.jsonl is damaged: its lines of earlier steps are not those that were written"
    assert sum(said in message for message in caplog.messages) == 1
    assert [line["step"] for line in lab.lines if "loss" in line] == list(range(1, 9))
    assert not read_run(lab.out).problems
    caplog.clear()
    lab.run(resume="")
    assert "is damaged" not in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "checkpoints"])
def test_nothing_is_written_through_a_link_in_a_run_folder(lab, tmp_path, name):
    lab.begin_with_stopped(3)
    target = (lab.out / name).rename(tmp_path / "elsewhere")
    (lab.out / name).symlink_to(target)
    if target.is_dir():
        (target / ".theirs.partial").write_text("")
    before = content_of(target)
    with pytest.raises(OutputError, match=f"cannot write .*/{name}: it is a symbolic link, and files are not written"):
        lab.run(resume="")
    assert content_of(target) == before
    (lab.out / name).unlink()
    target.rename(lab.out / name)
    lab.run(resume="")
    assert lab.summary["status"] == "complete"


def content_of(path):
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {file: file.read_bytes() for file in files}


def test_a_lost_recipe_is_recovered_from_the_newest_checkpoint(lab, whole, command):
    lab.begin_with_stopped(4)
    recipe = lab.out / "recipe.yaml"
    before = recipe.read_text()
    with pytest.raises(OutputError, match="its run reached a checkpoint of step 4"):
        lab.run()
    recipe.unlink()
    again = f"qlora-lite train {recipe} --resume {lab.out}"
    with pytest.raises(RecipeError, match=rf"has lost its recipe\.yaml; its checkpoints contain it: {again}$"):
        open_run(lab.out)
    code, _, said = command("train", recipe, "--resume", lab.out, "train.seed=9")
    assert code == 2 and "train.seed: 0 -> 9" in said, "a change is refused as ever"
    assert f"{recipe} was lost; it is written again from the checkpoint of step 4" in said
    assert recipe.read_text() == before
    recipe.unlink()
    lab.run(resume=lab.out)  # with the recipe that it was begun with
    assert_same_run(lab, whole)


def rewrite_run(lab, step, change):
    """Let a function change what a checkpoint holds of its run, and seal it again."""
    folder = folder_of(lab.out / "checkpoints", step)
    run, manifest = (json.loads((folder / file).read_text()) for file in (RUN, MANIFEST))
    change(run)
    (folder / RUN).write_text(json.dumps(run))
    content = (folder / RUN).read_bytes()
    manifest["manifest"]["files"][RUN] = {"bytes": len(content), "sha256": sha256(folder / RUN)}
    (folder / MANIFEST).write_text(checkpoints.sealed(manifest["manifest"]))


@pytest.mark.parametrize(("name", "value"), [("plan", {}), ("metrics_bytes", -5)])
def test_what_no_version_writes_of_a_run_is_refused_though_it_is_sealed(lab, name, value):
    lab.begin_with_stopped(2)
    rewrite_run(lab, 2, lambda run: run.update({name: value}))
    with pytest.raises(CheckpointError, match=f"the checkpoint of step 2 lacks {name} in their right form"):
        lab.run(resume="")


# --- early stopping

PATIENT = {"train": {"eval_every_steps": 1, "early_stopping_patience": 2}}
LOSSES = [0.1, 5.0, 6.0, 4.0, 4.0, 4.5, 3.0, 7.0, 7.5]  # by step: the first is the best, and that before training


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluations give the losses above."""

    def evaluate(trainer, _examples, _done=None):
        return Evaluation(LOSSES[trainer.step], 2.0, 10)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return evaluate


def test_training_ends_when_evaluations_bring_no_better_loss_for_so_long(lab, scripted, caplog):
    lab.run(**PATIENT)
    evaluated = [line["step"] for line in lab.lines if "eval_loss" in line]
    assert evaluated == [0, 1, 2, 3, 4, 5], "a better one starts the count again, an equal one does not"
    assert [line["step"] for line in lab.lines if "loss" in line][-1] == lab.summary["steps"] == 5
    assert lab.summary["ended_by"] == "train.early_stopping_patience" and lab.summary["status"] == "complete"
    assert sum("step 5: 2 evaluations in a row brought no better loss" in m for m in caplog.messages) == 1
    assert "ended by train.early_stopping_patience" in (lab.out / "report.html").read_text()
    best = load_file(lab.out / "adapter" / "adapter_model.safetensors")
    last = load_file(lab.out / "adapter-last" / "adapter_model.safetensors")
    assert not all(torch.equal(tensor, last[name]) for name, tensor in best.items()), "the best is of step 3"


def test_without_patience_or_with_enough_of_it_training_goes_on_to_its_last_step(lab, scripted):
    lab.run(train={"eval_every_steps": 1})
    assert lab.summary["steps"] == 8 and lab.summary["ended_by"] == "train.max_steps"
    shutil.rmtree(lab.out)
    lab.run(train={"eval_every_steps": 1, "early_stopping_patience": 3})
    assert lab.summary["steps"] == 8 and lab.summary["ended_by"] == "train.max_steps"


@pytest.mark.parametrize("stops", [[2], [4], [3, 5]], ids=str)
def test_a_resumed_run_ends_early_where_the_uninterrupted_one_does(lab, tmp_path, model_folder, scripted, stops):
    undisturbed = Lab(tmp_path / "undisturbed", model_folder)
    undisturbed.run(**PATIENT)
    lab.stop(stops[0], **PATIENT)
    for stop in stops[1:]:
        lab.stop(stop, resume="", **PATIENT)
    lab.run(resume="", **PATIENT)
    assert_same_run(lab, undisturbed)


def test_a_run_stopped_after_its_early_end_takes_no_further_step(lab, tmp_path, model_folder, scripted, monkeypatch):
    undisturbed = Lab(tmp_path / "undisturbed", model_folder)
    answering = {"train": PATIENT["train"] | {"metrics_examples": 2}}
    undisturbed.run(**answering)
    answer, calls = course.measure, []

    def measure(*arguments):
        calls.append(1)
        if len(calls) == 2:  # of the best factors, behind the end
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(*arguments)

    monkeypatch.setattr(course, "measure", measure)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 5; all of it is saved"):
        lab.run(**answering)
    lab.run(resume="", **answering)
    assert_same_run(lab, undisturbed)


def test_more_patience_goes_on_with_a_run_that_ended_early(lab, tmp_path, model_folder, scripted):
    patient = {"train": PATIENT["train"] | {"early_stopping_patience": 3}}
    undisturbed = Lab(tmp_path / "undisturbed", model_folder)
    undisturbed.run(**patient)
    lab.run(**PATIENT)
    lab.run(resume="", **patient)
    assert_same_run(lab, undisturbed)
    assert "train.early_stopping_patience: 2 -> 3" in lab.summary["resumed"][0]["changes"]


# --- who watches, and where


def test_a_console_that_is_gone_ends_no_run(lab, whole, caplog):
    shown = []

    def gone(step):
        shown.append(step)
        if step == 3:
            raise BrokenPipeError(32, "Broken pipe")

    lab.run(at_step=gone)
    assert_same_run(lab, whole)
    assert shown == [1, 2, 3] and "step 3: progress cannot be shown" in caplog.text


def test_a_closed_terminal_stops_a_run_as_other_signals_do_unless_it_is_ignored(lab, whole):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run below nohup
    try:
        assert "stopped by SIGHUP after step 3; all of it is saved" in lab.stop(3, number=signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        lab.run(stop_at=5, number=signal.SIGHUP, resume="")
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert_same_run(lab, whole)


def test_the_newest_run_is_not_one_that_failed_before_its_first_checkpoint(lab, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = lab.recipe().model_copy(update={"output": Output(name="night")})

    def made(stamp, status, step=None):
        path = tmp_path / "runs" / f"night-20260101-00000{stamp}"
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps({"status": status}))
        if step is not None:
            folder_of(path / "checkpoints", step).mkdir(parents=True)
        return path

    failed = made(1, "failed")
    assert newest_path(recipe).name == failed.name, "there is no other"
    stopped = made(2, "interrupted", 4)
    for stamp in (3, 4):
        made(stamp, "failed")
        assert newest_path(recipe).name == stopped.name
    assert made(5, "failed", 2).name == newest_path(recipe).name
    running = made(6, "running")
    assert newest_path(recipe).name == running.name, "its first checkpoint may be on its way"


def test_a_folder_of_other_things_is_no_run_to_go_on_with(lab, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"other is not a run folder: it has no recipe\.yaml"):
        lab.run(resume=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_folder_of_the_users_recipe_models_and_rows_is_no_run_to_begin_afresh(model_folder, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(model_folder, project / "model")
    (project / ".profile.old").write_text("mine")
    path = write_recipe(project, project / "model", output={"dir": str(project)}, **WHOLE)
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}
    with pytest.raises(OutputError, match="project is not empty; choose another"):
        run_recipe(load_recipe(path), resume="")
    with pytest.raises(CheckpointError, match=r"project is not a run folder: it has no summary\.json"):
        run_recipe(load_recipe(path), resume=str(project))
    assert {file: file.read_bytes() for file in project.rglob("*") if file.is_file()} == before


def test_a_run_that_was_killed_when_it_had_written_its_recipe_alone_begins_afresh(lab):
    lab.out.mkdir()
    (lab.out / "recipe.yaml").write_text(resolve_to_yaml(lab.recipe()))
    lab.run(resume=lab.out)
    assert read_run(lab.out).summary["status"] == "complete"


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(lab, monkeypatch, caplog):
    monkeypatch.setattr("qlora_lite.prepare.early.find_spec", lambda name: name == "tensorboard" or None)
    with pytest.raises(RecipeError, match=r"train\.trackers: aim, wandb is not installed"):
        lab.run(train={"trackers": ["wandb", "tensorboard", "aim"]})
    assert "plan:" not in caplog.text


# --- disks


def test_training_goes_on_while_a_slow_disk_takes_a_checkpoint(lab, whole, monkeypatch):
    """The disk waits for two further steps: it would wait in vain if training waited for it."""
    from qlora_lite.runs import async_checkpoint as saver

    write, reached, in_time = saver.write_checkpoint, threading.Event(), []

    def slow(root, checkpoint, *rest):
        if checkpoint.step == 2:
            in_time.append(reached.wait(30))
        return write(root, checkpoint, *rest)

    monkeypatch.setattr(saver, "write_checkpoint", slow)
    lab.run(train={"save_every_steps": 2}, at_step=lambda step: reached.set() if step == 4 else None)
    assert in_time == [True]
    assert_same_run(lab, whole)


def test_a_disk_that_takes_no_checkpoint_for_a_while_does_not_end_the_run(lab, whole, monkeypatch, caplog):
    blocked, failed, write = lab.out / "checkpoints", [threading.Event(), threading.Event()], saver.write_checkpoint

    def writing(root, checkpoint, *about):  # in a thread of its own
        try:
            write(root, checkpoint, *about)
        except OutputError:
            failed[checkpoint.step // 2 - 1].set()
            raise

    def block(step):
        if step == 1:
            blocked.write_text("in the way")
        if step == 5:
            assert all(each.wait(30) for each in failed)
            blocked.unlink()

    monkeypatch.setattr(saver, "write_checkpoint", writing)
    lab.run(at_step=block)
    assert_same_run(lab, whole)
    assert sum("no checkpoint was written: cannot write" in message for message in caplog.messages) == 2
    assert lab.checkpoints == [8, 6]


def test_memory_that_runs_out_in_a_save_costs_that_checkpoint_and_no_step(lab, whole, monkeypatch, caplog):
    capture, calls = saving.capture, []

    def short(trainer, *more, **how):
        calls.append(trainer.step)
        if trainer.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return capture(trainer, *more, **how)

    monkeypatch.setattr(saving, "capture", short)
    lab.run()
    assert_same_run(lab, whole)
    assert calls == [2, 4, 6, 8] and lab.checkpoints == [8, 6, 2]
    said = "step 4: no checkpoint was written: there is no memory for it (CUDA out of memory.). Training goes on"
    assert sum(said in message for message in caplog.messages) == 1


def test_memory_that_runs_out_in_the_writer_costs_that_checkpoint_and_is_told_of_at_the_end(lab, whole, monkeypatch):
    write, calls = saver.write_checkpoint, []

    def short(root, checkpoint, *about):
        calls.append(checkpoint.step)
        if checkpoint.step in (2, 4):
            raise MemoryError
        return write(root, checkpoint, *about)

    monkeypatch.setattr(saver, "write_checkpoint", short)
    said = lab.stop(4)
    assert "no checkpoint is there (there is no memory for it (MemoryError))" in said
    shutil.rmtree(lab.out)
    lab.run()
    assert_same_run(lab, whole)
    assert calls == [2, 4, 2, 4, 6, 8] and lab.checkpoints == [8, 6]


def test_a_writer_with_any_other_fault_ends_the_run(lab, monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(saver, "write_checkpoint", broken)
    with pytest.raises(RuntimeError, match="of another kind"):
        lab.run()


def test_a_finished_run_that_goes_on_and_is_stopped_gives_others_its_new_adapter(lab):
    unmeasured = {"eval_every_steps": 0, "lr_scheduler": "constant", "warmup_ratio": 0.0, "metrics_examples": 0}
    without = Lab(lab.folder, lab.model, ["data.eval=null"])
    without.run(train=unmeasured | {"max_steps": 2})
    first = sha256(open_run(lab.out).adapter / "adapter_model.safetensors")
    without.stop(4, resume="", train=unmeasured | {"max_steps": 6})
    assert open_run(lab.out).adapter.name == "adapter-last"
    assert sha256(open_run(lab.out).adapter / "adapter_model.safetensors") != first


def test_the_last_evaluation_is_that_of_the_last_step_and_the_best_one_is_not_made_again(lab, scripted):
    lab.run(train={"eval_every_steps": 1})
    assert [(line["step"], line["eval_loss"]) for line in lab.lines if "eval_loss" in line] == list(enumerate(LOSSES))
    assert lab.summary["eval_loss_after"] == min(LOSSES[1:]) < LOSSES[8]


def test_a_run_gone_on_with_knows_the_step_of_its_best_weights(lab, scripted):
    lab.stop(7, train={"eval_every_steps": 1})
    lab.run(resume="", train={"eval_every_steps": 1})
    assert lab.summary["adapter_step"] == LOSSES.index(min(LOSSES[1:])) == 6


def test_trackers_are_sent_steps_and_evaluations(lab, monkeypatch):
    sent = []

    @contextmanager
    def tracking(*_arguments):
        yield lambda values, step: sent.append((step, "eval_loss" in values))

    monkeypatch.setattr(training, "tracking", tracking)
    lab.run()
    lines = [(line["step"], "eval_loss" in line) for line in lab.lines]
    assert sent == lines and {is_evaluation for _, is_evaluation in sent} == {True, False}


class TrackersOwn(Exception):
    """As mlflow's and wandb's are: a kind of its own."""


@pytest.mark.parametrize(
    ("kind", "package"),
    [(ConnectionError, "wandb"), (RuntimeError, "wandb"), (TrackersOwn, "wandb"), (TrackersOwn, "mlflow")],
)
def test_a_tracker_that_fails_is_sent_no_more_and_ends_no_training(lab, whole, kind, package, monkeypatch, caplog):
    sent = []

    class Failing:
        def __init__(self, **_arguments):
            pass

        def init_trackers(self, _name):
            pass

        def log(self, _values, step):
            sent.append(step)
            if step == 3:
                raise kind("away")

        def finish(self):
            raise kind("away")

        @property
        def trackers(self):
            return [self]

    module, name = {"mlflow": ("mlflow.exceptions", "MlflowException"), "wandb": ("wandb.errors", "Error")}[package]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: TrackersOwn}))
    monkeypatch.setattr("accelerate.Accelerator", Failing)
    monkeypatch.setattr("qlora_lite.prepare.early.find_spec", lambda name: name)
    lab.run(train={"trackers": ["mlflow"]})
    assert_same_run(lab, whole)
    assert max(sent) == 3 and lab.summary["status"] == "complete"
    assert [m for m in caplog.messages if "mlflow" in m] == [
        "step 3: mlflow takes no metrics (away); it is sent no more",
        "mlflow did not end well (away)",
    ]


def test_a_tracker_that_cannot_begin_ends_no_training(lab, whole, monkeypatch, caplog):
    class Unknown:
        def __init__(self, **_arguments):
            pass

        def init_trackers(self, _name):
            raise TrackersOwn("no API key")

    monkeypatch.setitem(sys.modules, "wandb.errors", SimpleNamespace(Error=TrackersOwn))
    monkeypatch.setattr("accelerate.Accelerator", Unknown)
    monkeypatch.setattr("qlora_lite.prepare.early.find_spec", lambda name: name)
    lab.run(train={"trackers": ["wandb"]})
    assert_same_run(lab, whole)
    assert [m for m in caplog.messages if "wandb" in m] == ["wandb cannot begin (no API key); no metrics are sent"]


def test_a_disk_that_takes_no_metrics_for_a_while_gets_them_later(lab, whole, caplog):
    metrics, aside = lab.out / "metrics.jsonl", lab.folder / "aside"

    def block(step):
        if step == 3:
            metrics.rename(aside)
            metrics.mkdir()
        if step == 5:
            metrics.rmdir()
            aside.rename(metrics)

    lab.run(at_step=block)
    assert_same_run(lab, whole)
    assert sum("the lines wait until it can be written" in message for message in caplog.messages) == 1


def test_a_folder_removed_under_the_run_is_made_again_and_gets_the_result(lab, whole, caplog):
    def remove(step):
        if step == 5:
            lab.out.rename(lab.folder / "removed")

    lab.stop(7, at_step=remove)
    assert [line["step"] for line in lab.lines] == [6, 6, 7]  # one of them is the evaluation's
    assert sum("was removed; it is created again" in message for message in caplog.messages) == 1
    lab.run(resume="")
    assert lab.digest == whole.digest
    assert lab.summary["status"] == "complete"


def test_a_last_adapter_that_cannot_be_written_is_an_error_and_written_by_the_next_try(lab, whole, monkeypatch):
    save = saving.save_adapter

    def failing(model, folder, *rest):
        if folder.name == "adapter-last":
            raise OutputError(f"cannot write {folder}: the disk is full")
        return save(model, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_adapter", failing)
        with pytest.raises(OutputError, match=r"cannot write .*adapter-last"):
            lab.run()
    assert lab.checkpoints[0] == 8
    lab.run(resume="")
    assert_same_run(lab, whole)


def test_too_little_space_is_seen_before_the_first_step(lab, monkeypatch, caplog):
    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 0, size))

    free(10_000)
    with pytest.raises(OutputError, match=r"the disk of .*out has 9\.8 KiB free; this run needs .*set output\.dir"):
        lab.run()
    assert not lab.out.exists()
    free(3_000_000)
    lab.run()
    assert any("it may end without some of them" in message for message in caplog.messages)


def test_log_lines_that_cannot_be_written_are_no_trace_on_the_terminal(capsys):
    from qlora_lite.artifacts.run_folder import logging_to

    with logging_to(Path("/dev/full")):
        logging.getLogger("qlora_lite").info("lost")
    assert "Traceback" not in capsys.readouterr().err


def test_memory_that_ran_out_is_kept_in_mind_by_the_plan_and_the_checkpoint(lab, tmp_path, model_folder, monkeypatch):

    real = Workload.loss

    def limited(workload, model, inputs):
        if model.training and sum(inputs.row_lengths) > 60 and calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(workload, model, inputs)

    calls = []
    monkeypatch.setattr(Workload, "loss", limited)
    both = []
    for name, stop in (("a", None), ("b", 4)):
        other = Lab(tmp_path / name, model_folder)
        calls.clear()
        start = lambda step: calls.append(step)  # noqa: E731 - memory is short from the second step on
        if stop:
            with pytest.raises(Interrupted):
                other.run(stop_at=stop, at_step=start)
            other.run(resume="", at_step=start)
        else:
            other.run(at_step=start)
        both.append(other)
    assert both[0].summary["plan"]["most_tokens"] == both[1].summary["plan"]["most_tokens"] <= 64
    assert_same_run(both[1], both[0])
