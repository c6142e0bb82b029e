"""An adapter alone, in a folder as peft writes it, is used as the run that it came from is."""

import json
import shutil

import peft
import pytest
import torch
from tiny_files import MERGES, byte_tokenizer, save_tiny
from tiny_runs import END_OF_ANSWER, make_run
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.read import named_base
from qlora_lite.artifacts.trained_run import _task_of, open_trained
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import end_of_answers
from qlora_lite.data.chat.template import NAMED_TEMPLATES, choose_template
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.inference.compare import compare_runs
from qlora_lite.inference.multi_adapter import open_tasks

TALKS = [[Turn("user", "3?")], [Turn("system", "Be brief."), Turn("user", "what is the longest?")]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
OTHER = NAMED_TEMPLATES["chatml"].replace("<|im_start|>", "<|im_start|>the ")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model")
    return make_run(folder / "work", folder / "model", ["model.compute_dtype=auto"], lora={"rank": 8, "alpha": 64})


@pytest.fixture
def adapter(run, tmp_path):
    """The run's adapter in a folder of its own, without a tokenizer."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(run / "adapter" / name, folder / name)
    return folder


def change(adapter, **values):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


def test_it_answers_as_its_run_does_alone_and_beside_it(run, adapter):
    alone, both = open_tasks([adapter]), open_tasks([run, adapter])
    assert alone.task("adapter").stop == both.task("run").stop and END_OF_ANSWER in alone.task("adapter").stop
    expected = both.answer(["run"] * 2, TALKS, 12)
    assert alone.answer(["adapter"] * 2, TALKS, 12) == both.answer(["adapter"] * 2, TALKS, 12) == expected
    assert alone.answer([None] * 2, TALKS, 12) != expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_what_peft_wrote_is_used_whole_over_the_base_that_it_names(run, tmp_path, command):
    model = run.parent.parent / "model"
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    tasks = open_tasks([tmp_path / "theirs"])
    own = tasks.task(None).run
    assert own.files.folder == model and own.quantization == ("nf4", True)
    read = own.read_adapter(own.skeleton())
    for name, factors in read.layers.items():
        layer = theirs.base_model.model.get_submodule(name)
        assert torch.equal(factors.lora_B, layer.lora_B["default"].weight)
        assert factors.scale == layer.scaling["default"]
    code, out, _ = command("generate", tmp_path / "theirs", "--prompt", "3?", "--max-new-tokens", 12)
    assert (code, out) == (0, tasks.answer(["theirs"], TALKS[:1], 12)[0] + "\n")


@pytest.mark.parametrize("place", [TEMPLATE, TOKENIZER, "several"])
def test_the_template_beside_it_is_used_and_else_the_base_s(adapter, place):
    def written():
        trained = open_trained(adapter)
        tokenizer = trained.tokenizer()
        assert trained.template(byte_tokenizer()).source == tokenizer.chat_template
        return tokenizer.chat_template

    assert written() == NAMED_TEMPLATES["chatml"]
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OTHER}]
    text = {
        TEMPLATE: OTHER,
        TOKENIZER: json.dumps({"chat_template": OTHER}),
        "several": json.dumps({"chat_template": listed}),
    }[place]
    (adapter / (TOKENIZER if place == "several" else place)).write_text(text)
    assert written() == OTHER
    if place != TEMPLATE:
        (adapter / TOKENIZER).write_text(json.dumps({"chat_template": listed[:1]}))
        with pytest.raises(DataError, match=rf"cannot be read .*; write it as {adapter / TEMPLATE}$"):
            written()


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("plain", "</s>"), ("llama3", None)])
def test_what_ends_an_answer_is_the_special_token_that_the_template_writes_there(name, end):
    assert end_of_answers(choose_template(byte_tokenizer(), name)) == end  # <|eot_id|> is none of this tokenizer's


def test_without_any_template_it_can_be_exported_and_says_what_to_do_to_be_asked(adapter, tmp_path, command):
    save_tiny(tmp_path / "bare", template=None)
    change(adapter, base_model_name_or_path=str(tmp_path / "bare"))
    code, out, err = command("generate", adapter, "--prompt", "3?")
    assert (code, out) == (2, "") and f"neither the adapter {adapter} nor its base model has a chat template" in err
    assert command("export", adapter, "--to", "peft", "--out", tmp_path / "out")[0] == 0
    (adapter / TEMPLATE).write_text(NAMED_TEMPLATES["plain"])
    assert command("generate", adapter, "--prompt", "3?", "--max-new-tokens", 2)[0] == 0


def test_a_template_beside_it_that_cannot_be_used_is_named(adapter):
    (adapter / TEMPLATE).write_text("{% for")
    with pytest.raises(DataError, match=r"the chat template of the adapter .*adapter"):
        open_trained(adapter)
    (adapter / TEMPLATE).unlink()
    config = json.loads((adapter / TOKENIZER).read_text()) if (adapter / TOKENIZER).is_file() else {}
    (adapter / TOKENIZER).write_text(json.dumps(config | {"chat_template": [{"name": "default", "template": 3}]}))
    with pytest.raises(DataError, match="cannot be read"):
        open_trained(adapter)


def test_a_base_that_is_elsewhere_or_not_named_is_asked_for(run, adapter, command):
    for base, said in (("/nowhere", "is not found: no folder '/nowhere'"), (None, "does not name its base model")):
        change(adapter, base_model_name_or_path=base)
        code, out, err = command("generate", adapter, "--prompt", "3?")
        assert (code, out) == (2, "") and said in err and err.rstrip().endswith("--model PATH")
        model = run.parent.parent / "model"
        assert command("generate", adapter, "--prompt", "3?", "--max-new-tokens", 2, "--model", model)[0] == 0


def test_the_revision_that_it_names_goes_with_the_base_that_it_names(run, adapter, monkeypatch):
    change(adapter, base_model_name_or_path="some/model", revision="v2")
    assert named_base(adapter) == ("some/model", "v2")
    with pytest.raises(ModelError, match="no folder 'some/model' here"):
        open_trained(adapter)
    assert open_trained(adapter, str(run.parent.parent / "model")).recipe.model.revision is None


def test_an_adapter_in_a_run_is_the_run_s_but_not_one_beside_a_recipe(run, adapter):
    with pytest.raises(RecipeError, match=rf"name the run, {run}$"):
        open_trained(run / "adapter")
    (adapter.parent / "recipe.yaml").write_text("model: {}")
    assert open_trained(adapter).name == "adapter"


def test_it_is_merged_with_no_rows_and_compared_on_those_of_a_run(run, adapter, tmp_path, command):
    code, _, err = command("merge", adapter, "--out", tmp_path / "merged")
    assert code == 2 and "comes without a run, and so without data to measure on; --rows 0" in err
    code, out, _ = command("merge", adapter, "--out", tmp_path / "merged", "--rows", 0)
    assert code == 0 and "14 layers merged into the nf4 weights" in out and "if that was a 16-bit model" in out
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, END_OF_ANSWER]
    code, out, _ = command("merge", adapter, "--out", tmp_path / "plain", "--rows", 0, "--base", "original")
    assert code == 0 and "into the original weights" in out and "what it was trained on" not in out
    first, second = compare_runs([run, adapter], answers=0)["models"]
    assert first["eval_loss"] == second["eval_loss"] and second["name"] == "adapter"
    with pytest.raises(RecipeError, match="put a run with evaluation data first"):
        compare_runs([adapter, run])


def test_it_is_evaluated_on_rows_that_are_named_with_the_template_beside_it(run, adapter, tmp_path, command):
    def measured(folder, *arguments):
        code, out, err = command("evaluate", folder, "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    rows, cut = f"data.eval={run.parent / 'eval.jsonl'}", ("data.max_tokens=27", "data.overflow=drop")
    own, alone = (measured(folder, "--rows", 2, rows) for folder in (run, adapter))
    loss = pytest.approx(own["eval_loss"], rel=1e-5)
    assert alone["eval_loss"] == loss and alone["adapter"] == str(adapter) and alone["exact_match_rows"] == 2
    assert all(own[name] == alone[name] for name in ("rows", "target_tokens", "exact_match"))
    base = measured(adapter, "--base", rows)
    assert base["adapter"] is None and base["eval_loss"] != loss
    assert measured(adapter, rows, *cut)["rows"] == own["rows"] - 1
    assert measured(adapter, rows, "data.train_on=all")["target_tokens"] > own["target_tokens"]
    (adapter / TEMPLATE).write_text(OTHER)
    assert measured(adapter, rows)["eval_loss"] != loss
    assert measured(adapter, rows, "data.template=chatml")["eval_loss"] == loss
    model = run.parent.parent / "model"
    change(adapter, base_model_name_or_path="/nowhere")
    assert measured(adapter, rows, "data.template=chatml", "--model", model)["eval_loss"] == loss


def test_what_it_cannot_be_evaluated_with_is_named(adapter, command):
    names = "data.eval, data.max_tokens, data.overflow, data.template, data.train_on, train.metrics..., "
    names += "train.exact_match_..."
    for arguments, said in (
        ((), "as in data.eval=rows.jsonl, or compare it with a run, on that run's data: qlora-lite compare RUN"),
        (("data.max_tokens=64",), "name some, as in data.eval=rows.jsonl"),
        (("data.eval=null",), "there is no evaluation data; name some"),
        (("data.eval=none.jsonl",), "none.jsonl: no such file"),
        (("data.eval=x.jsonl", "data.max_tokens=no"), "override 2: data.max_tokens = no: must be a whole number"),
        (("data.eval=x.jsonl", "train.seed=1"), f"alone, only {names} can be set; train.seed=1 is for a recipe"),
    ):
        code, out, err = command("evaluate", adapter, *arguments)
        assert (code, out) == (2, "") and said in err, err


@pytest.mark.parametrize("form", ["peft", "vllm", "gguf", "gguf-adapter", "ollama"])
def test_it_is_exported_as_a_run_is(adapter, form, tmp_path, command):
    save_tiny(tmp_path / "base", merges=MERGES)  # a GGUF file needs a tokenizer with some
    change(adapter, base_model_name_or_path=str(tmp_path / "base"))
    code, out, err = command("export", adapter, "--to", form, "--out", tmp_path / "out")
    assert code == 0, err
    assert ("no SYSTEM line" in out) == (form == "ollama")
    assert ("if that was a 16-bit model" in out) == (form in ("gguf", "ollama"))


def test_an_adapter_in_pickled_weights_is_told_so(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    trained = open_trained(adapter)
    with pytest.raises(ModelError, match="is missing; pickled weights are not read"):
        trained.read_adapter(trained.skeleton())


def test_labels_are_those_of_the_numbers_in_whatever_order_a_file_has_them(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS"}))

    def labels(named):
        said = {"problem_type": "single_label_classification", "id2label": named}
        (tmp_path / "config.json").write_text(json.dumps(said, sort_keys=True))
        return _task_of(tmp_path).labels

    names = [f"of {number}" for number in range(12)]
    assert labels({str(number): name for number, name in enumerate(names)}) == tuple(names)
    for named in ({"0": "", "1": "x"}, {"a": "x", "b": "y"}):
        with pytest.raises(ModelError, match="id2label must name each output by its number"):
            labels(named)
