"""Reward models: the loss of pairs equals its definition and trl's, and runs are used as those of other heads."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from methods import Case, ledger_of, plan
from test_preference import pairs, row_of
from tiny_files import byte_tokenizer
from tiny_heads import head_recipe, save_headless, write_jsonl
from tiny_runs import summary_of
from transformers import AutoModelForSequenceClassification

from qlora_lite.adapters.files import Lora
from qlora_lite.cli.main import cli
from qlora_lite.data.labels import NUMBER
from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.ext.heads.reward import reward_model
from qlora_lite.ext.heads.text import TextHeadSpec
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.load import load_model
from qlora_lite.models.skeleton import read_part
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.step import accumulate_gradients

pytestmark = pytest.mark.usefixtures("simulations")
CPU, HEAD = torch.device("cpu"), Head(NUMBER, ("reward",), 0)
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32, head=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_headless(tmp_path_factory.mktemp("headless") / "llama", "llama")
    byte_tokenizer("chatml").save_pretrained(folder)
    return folder


def loaded(folder):
    return load_model(folder, "none", compute_dtype=torch.float32, use_cache=False, head=HEAD)


def workload(folder):
    spec = TextHeadSpec(with_head(read_part(str(folder)), HEAD).config, "none", compute_dtype=torch.float32, longest=32)
    return reward_model(METHOD, "reward", spec)


def test_loss_and_gradients_equal_the_definition_packed_or_not(llama):
    work, rows = workload(llama), pairs()
    model = loaded(llama)
    METHOD.apply(model)
    scores = [
        [
            model(input_ids=torch.from_numpy(each.token_ids).long()[None]).logits[0, 0].double()
            for each in sequences_of(row)
        ]
        for row in rows
    ]
    expected = sum(-torch.log(1 / (1 + torch.exp(-(chosen - rejected)))) for chosen, rejected in scores) / len(rows)
    expected.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.cat([p.grad.flatten() for p in trained])
    for parts in (1, 3):
        model.zero_grad()
        batches = [work.batches.inputs(work.batches.collate(rows[n::parts]), CPU) for n in range(parts)]
        means = accumulate_gradients(work, model, batches)
        assert means.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.cat([p.grad.flatten() for p in trained])
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
        margins = sum(float((chosen - rejected).detach()) for chosen, rejected in scores) / len(rows)
        assert means.metrics["rewards/margins"].item() == pytest.approx(margins, rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of trl, about what transformers renames
def test_loss_and_gradients_equal_trls(llama, tmp_path):
    pytest.importorskip("trl")
    from trl import RewardConfig, RewardTrainer

    ours, theirs = loaded(llama), AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    state = ours.state_dict()
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict()})
    theirs.config.pad_token_id = 0
    rows = [{"chosen": f"{n} yes", "rejected": f"{n} no, not at all"[: 5 + n]} for n in range(4)]
    settings = {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": 64, "gradient_checkpointing": False}
    config = RewardConfig(str(tmp_path), per_device_train_batch_size=4, disable_dropout=True, **settings)
    tokenizer, data = byte_tokenizer(None), Dataset.from_list(rows)
    trainer = RewardTrainer(theirs, config, train_dataset=data, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    sides = [row_of(ids, mask, mask)[0] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found = [
        Example(np.concatenate([a, b]), np.ones(len(a) + len(b), np.bool_), "", "", f"row {n}", len(a))
        for n, (a, b) in enumerate(zip(sides[:4], sides[4:], strict=True))
    ]
    ours.requires_grad_(True)
    work = workload(llama)

    means = accumulate_gradients(work, ours, [work.batches.inputs(work.batches.collate(found), CPU)])

    assert means.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if name in grads and grads[name] is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)
            compared += 1
    assert compared > 10


def test_a_plan_knows_the_peak_to_one_per_cent(llama):
    case = Case(workload(llama), lambda: loaded(llama), pairs(12), {"max_tokens": 48})
    chosen, _ = plan(case, 2**40)
    ledger = ledger_of(case.trainer(chosen.options))
    assert chosen.prediction.simulation.peak().total == pytest.approx(ledger.peak.total, rel=0.01)


def chats(count, mark=""):
    """Pairs of an answer in capitals and one without."""
    return [
        {"prompt": f"{mark}{n}?", "chosen": "GOOD" * (1 + n % 3), "rejected": "bad " * (1 + n % 4)}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    train = {"max_steps": 30, "learning_rate": 0.003, "lr_scheduler": "constant", "micro_batch_size": 2}
    path = head_recipe(
        folder,
        llama,
        "reward",
        chats(24),
        chats(8, "e"),
        train=train,
        model={"quant": "none"},
        data={"max_tokens": 192},
    )
    return run_recipe(load_recipe(path)), path


def test_a_run_learns_what_is_chosen_and_predict_scores_chats(run, tmp_path):
    folder, recipe = run
    summary = summary_of(folder)
    assert summary["eval_metrics"]["after"]["rewards/accuracies"] == 1.0
    assert summary["eval_loss_after"] < 0.2 < summary["eval_loss_before"]
    asked = [{"prompt": "e1?", "completion": answer} for answer in ("GOODGOOD", "bad bad ")]
    out = tmp_path / "scores.jsonl"
    command = ["predict", str(folder), "--rows", str(write_jsonl(tmp_path / "rows.jsonl", asked)), "--out", str(out)]
    assert CliRunner().invoke(cli, command).exit_code == 0
    good, bad = (json.loads(line)["reward"] for line in out.read_text().splitlines())
    assert good > bad
    (tmp_path / "rows.jsonl").write_text("\n\n" + (tmp_path / "rows.jsonl").read_text())
    assert CliRunner().invoke(cli, command).exit_code == 0
    places = [json.loads(line)["where"] for line in out.read_text().splitlines()]
    assert places == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in (3, 4)], "blank lines count as lines"
    alone = shutil.copytree(folder / "adapter", tmp_path / "alone")
    pair = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "e1?", "chosen": "GOODGOOD", "rejected": "bad bad "}])
    judged = write_jsonl(tmp_path / "judged.jsonl", [row | {"label": False} for row in asked])
    for rows, expected in ((pair, [{"chosen": good, "rejected": bad}]), (judged, [{"reward": good}, {"reward": bad}])):
        for opened in (folder, alone):
            command = ["predict", str(opened), "--rows", str(rows), "--out", str(out)]
            assert (result := CliRunner().invoke(cli, command)).exit_code == 0, result.output
            found = [json.loads(line) for line in out.read_text().splitlines()]
            for line, wanted in zip(found, expected, strict=True):
                close = 1e-4 if opened == folder else 0.3  # alone it does not know that its base was in 16 bit
                assert {name: line[name] for name in wanted} == pytest.approx(wanted, abs=close)
    measured = evaluate_recipe(load_recipe(recipe), folder / "adapter", 0)
    assert measured["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-4)
    assert measured["eval_metrics"]["rewards/accuracies"] == 1.0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_real_peft_loads_it_and_gives_the_same_scores(run, llama, tmp_path):
    folder, _ = run
    asked = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "e1?", "completion": "GOODGOOD"}])
    command = ["predict", str(folder), "--rows", str(asked), "--out", str(tmp_path / "scores.jsonl")]
    assert CliRunner().invoke(cli, command).exit_code == 0
    (line,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = byte_tokenizer("chatml")
    turns = [{"role": "user", "content": "e1?"}, {"role": "assistant", "content": "GOODGOOD"}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        score = model(input_ids=ids.input_ids).logits[0, 0].item()
    assert json.loads(line)["reward"] == pytest.approx(score, abs=1e-3)


def test_encoders_are_refused(tmp_path):
    bert = save_headless(tmp_path / "bert", "bert")
    byte_tokenizer("chatml").save_pretrained(bert)
    with pytest.raises(ModelError, match="rewards are for decoders"):
        run_recipe(load_recipe(head_recipe(tmp_path / "run", bert, "reward", chats(4), chats(2, "e"))))


def test_settings_of_a_language_model_are_refused(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.objective = dpo"):
        load_recipe(head_recipe(tmp_path, llama, "reward", chats(4), chats(2, "e"), train={"objective": "dpo"}))
