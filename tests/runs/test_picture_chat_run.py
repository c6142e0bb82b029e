"""Runs of vision-language models as a user has them: trained, resumed, used by commands and by peft, and refused."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from tiny_pictures import drawn, save_encoder
from tiny_runs import replace_adapter, stop_at, summary_of, tiny_run
from tiny_vision_language import FAMILIES, WITH_GRIDS, chat_recipe, given_to_transformers, save_vision_language
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.cli.main import cli
from qlora_lite.data.picture_grids import grids_of
from qlora_lite.errors import CheckpointError, DataError, Interrupted, ModelError, RecipeError
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.hub.push import PushSettings, prepare_push
from qlora_lite.ext.serve.app import BODY_BYTES_WITH_PICTURES, Limits, build_app
from qlora_lite.ext.vision_language.reader import load_processor
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.multi_adapter import open_tasks
from qlora_lite.inference.predict import PredictSettings, predict_file
from qlora_lite.models.locate import locate
from qlora_lite.models.merge import PROCESSOR_FILES
from qlora_lite.models.skeleton import meta_model
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.models.vision_language import arguments_of
from qlora_lite.models.weights import open_weights
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.job import build_workload
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_vision_language(folder / name, name) for name in FAMILIES}


LORA = {"targets": ["all-linear", "*vis*.q*"], "rank": 4, "alpha": 8, "dtype": "float32"}
OF_QWEN = ("visual", "language_model", "merger")
PARTS = {"smolvlm": ("vision_model", "text_model", "connector"), "qwen3_vl": OF_QWEN, "qwen3_5": OF_QWEN}


@pytest.fixture(scope="module", params=PARTS)
def run(bases, tmp_path_factory, request):
    """A finished run whose tower is adapted too, its recipe, and its family."""
    train = {"max_steps": 8, "eval_every_steps": 4, "save_every_steps": 2, "lr_scheduler": "constant"}
    folder, model = tmp_path_factory.mktemp("run"), {"quant": "none"}
    recipe = chat_recipe(folder, bases[request.param], train=train, lora=LORA, model=model)
    return run_recipe(load_recipe(recipe)), recipe, request.param


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def of_transformers(model, recipe):
    """The mean loss of a recipe's evaluation rows, each by itself, by transformers' own forward."""
    data, work = build_data(recipe, load_tokenizer(recipe.model.path), "eval"), build_workload(recipe)
    total, count = 0.0, 0
    for example in data.examples:
        ids = torch.from_numpy(example.token_ids.copy()).long()[None]
        labels = torch.where(torch.from_numpy(example.is_target.copy()), ids[0], -100)[1:]
        pixels = torch.from_numpy(work.batches.reader.of_examples([example]))
        with torch.no_grad():
            shown = arguments_of(model, pixels, ids, grids_of(example.pictures))
            logits = model(input_ids=ids, **shown).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def test_another_run_begins_with_its_adapter(run, bases, tmp_path):
    folder, _, name = run
    begun = {"lora": LORA | {"init_from": str(folder)}, "train": {"max_steps": 1}, "model": {"quant": "none"}}
    second = summary_of(run_recipe(load_recipe(chat_recipe(tmp_path, bases[name], **begun))))
    assert second["eval_loss_before"] == pytest.approx(summary_of(folder)["eval_loss_after"], rel=1e-5)


def test_it_learns_and_the_plan_holds(run):
    folder, _, name = run
    summary = summary_of(folder)
    assert summary["eval_loss_after"] < 0.75 * summary["eval_loss_before"]
    measured, predicted = (summary["plan"][name] for name in ("measured_peak_bytes", "predicted_peak_bytes"))
    assert measured == pytest.approx(predicted, rel=0.3)  # of a process of 300 MiB; the ledger is compared elsewhere
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(any(part in path for path in adapter) for part in PARTS[name][:2])


def test_a_stopped_run_is_resumed_to_the_bit(run, tmp_path):
    folder, recipe, _ = run

    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'out'}"])
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(5))
    assert run_recipe(settings, resume=tmp_path / "out") == tmp_path / "out"
    one, other = (load_file(path / "adapter-last" / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert losses(folder) == losses(tmp_path / "out")


def test_another_picture_is_another_run(bases, tmp_path):
    recipe = chat_recipe(tmp_path, bases["llava"], train={"save_every_steps": 2})

    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), stop_at(3))
    changed = tmp_path / "rows" / "pictures" / "000.png"
    before = changed.read_bytes()
    drawn("hot", 77).save(changed)
    with pytest.raises(CheckpointError, match="other training rows than before"):
        run_recipe(load_recipe(recipe), resume=tmp_path / "out")
    changed.write_bytes(before)
    said = bases["llava"] / "processor_config.json"
    text = said.read_text()
    said.write_text(text.replace("0.48145466", "0.4"))
    with pytest.raises(CheckpointError, match="picture processor"):
        resumed_in_another_process(recipe, tmp_path)
    said.write_text(text)


def resumed_in_another_process(recipe, folder):
    load_processor.cache_clear()
    try:
        run_recipe(load_recipe(recipe), resume=folder / "out")
    finally:
        load_processor.cache_clear()


def test_evaluate_measures_it_again(run):
    folder, _, _ = run
    trained, summary = open_trained(folder), summary_of(folder)
    found = evaluate_recipe(trained.recipe, trained.adapter, 0)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_real_peft_and_transformers_have_the_loss_that_the_run_has(run, bases):
    folder, recipe, name = run
    base = AutoModelForImageTextToText.from_pretrained(bases[name], dtype=torch.float32)
    before = of_transformers(base.eval(), load_recipe(recipe))
    after = of_transformers(peft.PeftModel.from_pretrained(base, folder / "adapter").eval(), load_recipe(recipe))
    summary = summary_of(folder)
    assert before == pytest.approx(summary["eval_loss_before"], rel=1e-5)
    assert after == pytest.approx(summary["eval_loss_after"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("smolvlm", "qwen3_vl") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
        if name != "qwen3_5_moe"
    ],
)
def test_answers_are_those_of_transformers_and_depend_on_the_picture(bases, tmp_path, name):
    train = {"max_steps": 30, "lr_scheduler": "constant", "metrics_examples": 4}
    lora = {"targets": ["all-linear", "*vis*.0.*"], "rank": 8, "alpha": 16, "dtype": "float32"}
    also = {} if name in ("gemma3", *WITH_GRIDS) else {"train_also": ["projector"], "train_also_lr_ratio": 1.0}
    recipe = chat_recipe(tmp_path, bases[name], train=train, lora=lora, adapter=also, model={"quant": "none"})
    folder = run_recipe(load_recipe(recipe))
    pictures, said = [tmp_path / "rows" / "pictures" / f"{number}.png" for number in (100, 101)], []
    base = AutoModelForImageTextToText.from_pretrained(bases[name], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(bases[name])
    for picture in pictures:
        asked = ["generate", folder, "--prompt", "what is it", "--image", picture, "--max-new-tokens", "8"]
        result = CliRunner().invoke(cli, [*map(str, asked)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        said.append(result.output.strip())
        turn = {
            "role": "user",
            "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what is it"}],
        }
        given = given_to_transformers(bases[name], name, [turn], add_generation_prompt=True)
        ends = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
        with torch.no_grad():
            theirs = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=ends)
        text = tokenizer.decode(theirs[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said[-1] == text.strip()
    assert_served_and_chatted(folder, pictures, said)
    asked = [{"prompt": "<image>what is it", "images": [str(picture)]} for picture in pictures]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    done = predict_file(folder, tmp_path / "asked.jsonl", tmp_path / "said.jsonl", PredictSettings(max_new_tokens=8))
    found = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert done.prompts == 2 and [row["answer"] for row in found] == said
    assert [{key: row[key] for key in ("prompt", "images")} for row in found] == asked
    summary = summary_of(folder)
    assert summary["metrics"]["after"]["exact_match"]["examples"] == 4
    found = evaluate_recipe(open_trained(folder).recipe, folder / "adapter", 4)
    assert found["metrics"]["exact_match"]["value"] == summary["exact_match_after"]


def assert_served_and_chatted(folder, pictures, said):
    """Clients of the API and a chat get the answers about pictures that generate gives."""
    client = TestClient(build_app(open_tasks([folder]), Limits(BODY_BYTES_WITH_PICTURES), ()))
    lines = []
    for picture in pictures:
        url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it"}]
        body = {"model": folder.name, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"].strip() == said[len(lines) // 3]
        lines += ["/new", f"/image {picture}", "what is it"]
    asked = ["chat", str(folder), "--max-new-tokens", "8"]
    chatted = CliRunner().invoke(cli, asked, input="\n".join([*lines, "/quit\n"]))
    assert [line.strip() for line in chatted.stdout.splitlines()] == said
    for wrong in ("https://x.org/a.png", "data:image/png;base64,AAAA"):
        parts[0]["image_url"]["url"] = wrong
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("messages")


def test_pictures_are_refused_where_nothing_reads_them(bases, tmp_path):
    session = open_session(tiny_run(tmp_path / "text"))
    with pytest.raises(DataError, match=r"pictures are for a run, or a recipe, of task\.kind image-text-to"):
        session.attach("a.png")
    recipe = chat_recipe(tmp_path, bases["llava"])
    result = CliRunner().invoke(cli, ["damage", str(recipe)])
    assert result.exit_code and "the row has pictures, which are not read here" in str(result.exception)
    asked = ["generate", recipe, "--prompt", "what is it", "--image", tmp_path / "rows" / "pictures" / "100.png"]
    result = CliRunner().invoke(cli, [*map(str, asked), "--max-new-tokens", "2"], catch_exceptions=False)
    assert result.exit_code == 0, "a model without a run, by its recipe, as the message says"
    asked[1] = bases["llava"]
    by_name = CliRunner().invoke(cli, [*map(str, asked), "--max-new-tokens", "2"], catch_exceptions=False)
    assert by_name.exit_code == 0, "or by its folder, as a merged one"


def test_a_merged_model_is_whole_and_has_the_loss_that_the_run_has(run, bases, tmp_path):
    folder, recipe, family = run
    report = merge_run(str(folder), tmp_path / "merged", MergeSettings(base="original", dtype="f32", rows=4))
    assert report["models"]["merged"]["loss"] == pytest.approx(summary_of(folder)["eval_loss_after"], abs=0.05)
    stored, new = (load_file(path / "model.safetensors") for path in (bases[family], tmp_path / "merged"))
    assert stored.keys() == new.keys()
    changed = {name for name in stored if not torch.equal(stored[name], new[name])}
    tower, language, projector = PARTS[family]
    assert any(tower in name for name in changed) and any(language in name for name in changed)
    assert not any(projector in name for name in changed)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert report["models"]["merged"]["loss"] == pytest.approx(of_transformers(merged, load_recipe(recipe)), rel=1e-4)
    file = "preprocessor_config.json" if family in WITH_GRIDS else "processor_config.json"
    assert (tmp_path / "merged" / file).is_file()


def test_a_system_message_that_all_chats_share_is_told_where_one_is_asked_without_it(bases, tmp_path):
    recipe = load_recipe(chat_recipe(tmp_path, bases["smolvlm"], train={"max_steps": 1, "metrics_examples": 0}))
    rows = Path(recipe.data.train[0].path)
    chats = [json.loads(line) for line in rows.read_text().splitlines()]
    for chat in chats:
        chat["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    folder = run_recipe(recipe)
    assert open_trained(folder).shared_system() == "Be brief."
    asked = ["generate", folder, "--prompt", "what is it", "--image", rows.parent / "pictures" / "100.png"]
    for more, is_told in (([], True), (["--system", "Be brief."], False)):
        done = CliRunner().invoke(cli, [*map(str, asked), "--max-new-tokens", "2", *more], catch_exceptions=False)
        assert done.exit_code == 0 and ("share a system message" in done.output) == is_told


def test_what_is_pushed_reads_pictures(run, bases, tmp_path):
    folder, _, family = run
    merge_run(str(folder), tmp_path / "merged", MergeSettings(base="original", rows=0))
    there = SimpleNamespace(private=True, siblings=[], card_data=SimpleNamespace(license=None))
    hub = SimpleNamespace(model_info=lambda _: there)

    def pushed(name, merged):
        (tmp_path / name).mkdir()
        return prepare_push(
            str(folder), PushSettings("me/mine", merged, "them/base"), tmp_path / name, hub, dry_run=True
        )

    whole, adapter = pushed("whole", tmp_path / "merged"), pushed("adapter", None)
    for push, named in ((whole, "me/mine"), (adapter, "them/base")):
        assert "pipeline_tag: image-text-to-text" in push.card and "AutoModelForCausalLM" not in push.card
        assert f'AutoModelForImageTextToText.from_pretrained("{named}"' in push.card
        assert f'AutoProcessor.from_pretrained("{named}")' in push.card
    assert 'PeftModel.from_pretrained(model, "me/mine")' in adapter.card and "peft" not in whole.card
    assert {name for name in PROCESSOR_FILES if (bases[family] / name).is_file()} <= whole.files.keys()
    if family != "smolvlm":  # whose processors of videos want torchvision
        return
    sent = tmp_path / "sent"
    sent.mkdir()
    for name, file in whole.files.items():
        (sent / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    processor, model = AutoProcessor.from_pretrained(sent), AutoModelForImageTextToText.from_pretrained(sent)
    content = [{"type": "image", "image": drawn("hot", 0)}, {"type": "text", "text": "What is it?"}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert isinstance(processor.decode(model.generate(**given, max_new_tokens=2)[0], skip_special_tokens=True), str)


def test_a_4_bit_merge_has_the_processor_of_its_base(bases, tmp_path):
    recipe = chat_recipe(tmp_path, bases["smolvlm"], train={"max_steps": 1}, lora=LORA)
    folder = run_recipe(load_recipe(recipe))
    path = folder / "adapter" / "adapter_model.safetensors"
    grown = {name: tensor + ("lora_B" in name) * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    replace_adapter(folder, grown)
    merge_run(str(folder), tmp_path / "merged", MergeSettings(base="original", quantize="nf4", rows=4))
    own, its = (type(AutoProcessor.from_pretrained(path)) for path in (tmp_path / "merged", bases["smolvlm"]))
    assert own is its


def test_bounds_of_a_tower_s_layers_are_merged_as_they_are_though_they_be_infinite(bases, tmp_path):
    base = shutil.copytree(bases["gemma4"], tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    bound = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    assert stored[bound].ndim == 0
    stored[bound] = torch.tensor(float("inf"))
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    folder = run_recipe(load_recipe(chat_recipe(tmp_path, base, model={"quant": "none"}, train={"max_steps": 1})))
    merge_run(str(folder), tmp_path / "merged", MergeSettings(dtype="f32", rows=0))
    new = load_file(tmp_path / "merged" / "model.safetensors")
    assert new.keys() == stored.keys()
    assert all(torch.equal(new[name], stored[name]) for name in stored if "vision_tower" in name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("are_turned", [False, True])
@pytest.mark.slow
def test_adapted_experts_are_merged_whichever_way_the_files_have_them(bases, tmp_path, are_turned):
    base = shutil.copytree(bases["qwen3_vl_moe"], tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    if are_turned:  # as they are published
        stored = {name: x.transpose(1, 2).contiguous() if ".experts." in name else x for name, x in stored.items()}
        save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    lora = {"targets": ["all-linear", "experts"], "rank": 4, "alpha": 8, "dtype": "float32"}
    recipe = chat_recipe(tmp_path, base, lora=lora, train={"max_steps": 3, "learning_rate": 0.1})
    folder = run_recipe(load_recipe(recipe))
    merge_run(str(folder), tmp_path / "merged", MergeSettings(base="original", dtype="f32", rows=0))
    new = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: x.shape for name, x in new.items()} == {name: x.shape for name, x in stored.items()}
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    adapted = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(adapted, folder / "adapter").eval()
    settings = load_recipe(recipe)
    assert of_transformers(merged, settings) == pytest.approx(of_transformers(adapted, settings), rel=1e-5)
    read = open_weights(
        locate(str(base)), meta_model(merged.config, "none", False, torch.float32), torch.float32
    ).reader()
    path = "model.language_model.layers.0.mlp.experts.down_proj"
    assert torch.equal(read(path), stored[path].transpose(1, 2) if are_turned else stored[path])


@pytest.mark.slow
def test_other_ways_to_train_it(bases, tmp_path):
    for number, (name, sections) in enumerate(
        {
            "llava": {"model": {"quant": "none"}, "adapter": {"method": "dora"}},
            "idefics3": {"model": {"keep_16bit": ["*vision*"]}, "data": {"resolution": 32}},
            "smolvlm": {"memory": {"budget": "2GiB", "resident_layers": 0, "checkpointing": "block"}},
            "qwen3_vl": {
                "memory": {"budget": "2GiB", "resident_layers": 0, "checkpointing": "block"},
                "data": {"resolution": 32},
                "model": {"keep_16bit": ["*visual*"]},
            },
        }.items()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        summary = summary_of(run_recipe(load_recipe(chat_recipe(folder, bases[name], **sections))))
        assert summary["eval_loss_after"] < summary["eval_loss_before"], name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"method": "bottleneck"}}, r"adapter.method = bottleneck: not possible with task.kind image-text"),
        ({"model": {"quant": "keep"}}, "model.quant = keep: not possible"),
        ({"data": {"overflow": "truncate"}}, "data.overflow = truncate: .* an example has pictures; write error or"),
        ({"data": {"augment": "flip"}}, "data.augment: only with task.kind image-classification, image-embedding or"),
        ({"train": {"objective": "dpo"}}, "train.objective = dpo: not possible with task.kind image-text-to-text"),
        ({"lora": {"start": "pissa"}}, "lora.start = pissa: not possible with task.kind image-text-to-text"),
        ({"train": {"merge_aware": "nf4"}}, "train.merge_aware = nf4: not possible with task.kind image-text-to-text"),
    ],
)
def test_settings_that_do_not_go_with_pictures_are_refused(bases, tmp_path, sections, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(chat_recipe(tmp_path, bases["llava"], **sections))


def test_models_that_are_of_no_family_are_refused_before_anything_is_loaded(tmp_path):
    encoder = save_encoder(tmp_path / "encoder", "vit")
    with pytest.raises(
        ModelError, match="of the type vit cannot be trained on pictures in chats; choose a model of the"
    ):
        run_recipe(load_recipe(chat_recipe(tmp_path, encoder)))


@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl"])
def test_the_plan_counts_pictures_and_data_shows_them(bases, tmp_path, name):
    recipe = chat_recipe(tmp_path, bases[name])
    planned = CliRunner().invoke(cli, ["plan", str(recipe), "--json"], catch_exceptions=False)
    assert planned.exit_code == 0, planned.output
    shown = CliRunner().invoke(cli, ["data", str(recipe)], catch_exceptions=False)
    assert shown.exit_code == 0 and "12" in shown.output
