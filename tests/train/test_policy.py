"""GRPO equals its definition and trl's trainer, takes the memory that is planned, and learns from its own answers."""

import math
from dataclasses import replace
from itertools import islice
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods import Case, ledger_of, of_text, plan
from rank_processes import together
from tiny import build_tiny, quantized_pair
from tiny_files import VOCABULARY, byte_tokenizer
from torch.nn.functional import log_softmax

from qlora_lite.data.tokens.storage import Example, prompt_tokens
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.ext.grpo.policy import Answered, GroupPolicy, policy_lm
from qlora_lite.ext.grpo.rewards import with_answers
from qlora_lite.memory.ledger import Ledger
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.loop import largest_batches
from qlora_lite.train.process_group import ProcessGroup
from qlora_lite.train.processes import ALONE
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import accumulate_gradients, evaluate_loss

CPU = torch.device("cpu")
GROUP, NEW = 3, 6


def rows(count=5):
    """Examples with a prompt of a few tokens and a reference."""
    chance, found = np.random.default_rng(5), []
    for number in range(count):
        prompt, answer = int(chance.integers(2, 6)), int(chance.integers(1, 5))
        ids = chance.integers(3, 160, prompt + answer).astype(np.int32)
        found.append(Example(ids, np.arange(prompt + answer) >= prompt, "p", f"r{number}", f"rows.jsonl:{number}"))
    return found


def said(model, prompts, temperature, seed, numbers, most, at_once=0):
    """Answers that follow from a prompt's number alone, of various lengths."""
    found = []
    for number in numbers:
        chance = np.random.default_rng(number)
        ids = chance.integers(3, 160, int(chance.integers(1, most + 1))).tolist()
        found.append(Answered(ids, " ".join(map(str, ids)), len(ids) == most))
    return found


def judged(examples, texts):
    """Two rewards: how many tokens are even, and whether the first one is."""
    numbers = [list(map(int, text.split())) for text in texts]
    even = torch.tensor([float(sum(n % 2 == 0 for n in each)) for each in numbers])
    return {"even": even, "first": torch.tensor([float(each[0] % 2 == 0) for each in numbers])}


def rewards_of(texts):
    return sum(judged(None, texts).values())


def different_letters(examples, texts):
    return {"letters": torch.tensor([float(len({*text})) for text in texts])}


def workload(**objective):
    work = of_text().workload
    return policy_lm(work.method, GroupPolicy(GROUP, NEW, **{"answer": said, "judge": judged} | objective), work.spec)


def adapted(work):
    """A tiny 4-bit model with LoRA weights that do something."""
    model, _ = quantized_pair("llama")
    torch.manual_seed(0)
    work.method.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return model.train()


def loss_by_definition(work, model, examples):
    """The loss of a step, each answer by itself, in float64, as the papers write it."""
    o, per_answer = work.objective, []
    for example in examples:
        prompt = example.token_ids[: prompt_tokens(example)].tolist()
        numbers = [work_number(example, place) for place in range(GROUP)]
        answers = said(model, [prompt] * GROUP, 1.0, 0, numbers, NEW)
        rewards = rewards_of([answer.text for answer in answers]).double()
        worth = rewards - rewards.mean()
        if o.scale_rewards:
            worth = worth / (rewards.std() + 1e-4)
        for answer, advantage in zip(answers, worth.tolist(), strict=True):
            ids = torch.tensor([prompt + list(answer.token_ids)])
            logits = model(input_ids=ids, use_cache=False).logits[0].double() / o.temperature
            values = log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            ratio = torch.exp(values - values.detach())
            per_answer.append((-(ratio * advantage).sum(), len(answer.token_ids)))
    if o.policy_loss == "dapo":
        return sum(loss for loss, _ in per_answer) / sum(count for _, count in per_answer)
    if o.policy_loss == "grpo":
        return sum(loss / count for loss, count in per_answer) / len(per_answer)
    return sum(loss for loss, _ in per_answer) / (len(per_answer) * NEW)


def work_number(example, place):
    return crc32(example.token_ids.tobytes()) * (1 << 20) + place


def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def prepared(work, model, batches):
    return [work.batches.inputs(each, CPU) for each in work.prepare_step(model, batches)]


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize(
    "objective", [{}, {"policy_loss": "grpo", "scale_rewards": False}, {"policy_loss": "dr_grpo", "temperature": 0.7}]
)
def test_loss_and_gradients_equal_the_definition_however_groups_are_packed(objective, parts):
    work, examples = workload(**objective), rows()
    model = adapted(work)
    expected = loss_by_definition(work, model, examples)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()

    batches = [work.batches.collate(examples[n::parts]) for n in range(parts)]
    means = accumulate_gradients(work, model, prepared(work, model, batches))

    assert means.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert wanted.norm() > 0
    assert (gradients(model) - wanted).norm() <= 1e-5 * wanted.norm()


def trl_trainer(model, folder, **changes):
    from trl import GRPOConfig, GRPOTrainer

    usual = dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=6,
        num_generations=GROUP,
        max_completion_length=NEW,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        temperature=1.0,
        beta=0.0,
    )
    prompts = [{"prompt": text} for text in ("ab", "cde", "f", "ghij")]
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len({*text})) for text in completions],
        args=GRPOConfig(**usual | changes),
        train_dataset=Dataset.from_list(prompts),
        processing_class=byte_tokenizer(None),
    )


@pytest.mark.filterwarnings("ignore")  # of trl, about what transformers renames
@pytest.mark.parametrize(
    "changes", [{}, {"loss_type": "grpo", "scale_rewards": "none"}, {"loss_type": "dr_grpo", "temperature": 0.8}]
)
def test_loss_and_gradients_equal_trls(changes, tmp_path):
    pytest.importorskip("trl")
    torch.manual_seed(2)
    model = build_tiny("llama", vocab_size=VOCABULARY)
    with torch.no_grad():  # so that answers end, at various lengths
        model.get_output_embeddings().weight[byte_tokenizer(None).eos_token_id] *= 30
    model.save_pretrained(tmp_path / "model")
    trainer = trl_trainer(type(model).from_pretrained(tmp_path / "model"), tmp_path, **changes)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    sampled = trainer._prepare_inputs(batch)
    loss = trainer.compute_loss(trainer.model, sampled)
    loss.backward()

    ours = adopt(model)
    ours.load_state_dict(trainer.model.state_dict())
    ours = ours.requires_grad_(True).train()
    answers = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(sampled["completion_ids"], sampled["completion_mask"], strict=True)
    ]
    prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(sampled["prompt_ids"], sampled["prompt_mask"], strict=True)
    ]
    texts = byte_tokenizer(None).batch_decode(answers, skip_special_tokens=True)
    examples = [
        Example(np.array([*prompt, 5], np.int32), np.arange(len(prompt) + 1) == len(prompt), "", "", f"row {number}")
        for number, prompt in enumerate(prompts[::GROUP])
    ]
    left = iter([Answered(ids, text, False) for ids, text in zip(answers, texts, strict=True)])
    o = {"loss_type": "dapo", "scale_rewards": "group", "temperature": 1.0} | changes
    policy = GroupPolicy(
        GROUP,
        NEW,
        o["temperature"],
        o["loss_type"],
        o["scale_rewards"] != "none",
        answer=lambda model, prompts, *_: [next(left) for _ in prompts],
        judge=different_letters,
    )
    work = policy_lm(of_text().workload.method, policy)
    means = accumulate_gradients(work, ours, prepared(work, ours, [work.batches.collate(examples)]))

    assert len({*map(len, answers)}) > 1
    assert means.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    norms = []
    for (name, own), their in zip(ours.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, their.grad, rtol=1e-4, atol=1e-5 * float(their.grad.norm()) + 1e-8, msg=name
        )
        norms.append(float(their.grad.norm()))
    assert max(norms) > 1e-3


def test_an_evaluation_is_minus_the_mean_reward_of_one_likeliest_answer():
    asked = []

    def answer(model, prompts, temperature, seed, numbers, most, at_once):
        asked.append((len(prompts), temperature, at_once))
        return said(model, prompts, temperature, seed, numbers, most)

    work, examples = workload(answer=answer), rows()
    model = adapted(work)
    found = evaluate_loss(work, model, [work.batches.collate(examples[:2]), work.batches.collate(examples[2:])])
    numbers = [work_number(each, place) for part in (examples[:2], examples[2:]) for place, each in enumerate(part)]
    rewards = rewards_of([each.text for each in said(None, None, 0, 0, numbers, NEW)])
    assert asked == [(5, 0.0, 3 * GROUP)]
    assert found.loss == pytest.approx(-rewards.mean().item()) and found.metrics["reward"] == pytest.approx(-found.loss)


def test_a_plan_knows_the_peak_of_answers_and_step_to_one_per_cent():
    work = workload()
    case = Case(work, of_text().build, rows(12), {"max_tokens": 120})
    chosen, _ = plan(case, 2**40)
    ledger = ledger_of(case.trainer(chosen.options))
    predicted = chosen.prediction.simulation.peak().total
    assert predicted == pytest.approx(ledger.peak.total, rel=0.01)


def test_keys_and_values_of_long_answers_are_in_the_plan():
    long = policy_lm(of_text().workload.method, GroupPolicy(16, 512, answer=said, judge=judged), workload().spec)
    one = Case(long, of_text().build, rows(2), {"max_tokens": 16 * 600})
    trainer = one.trainer()
    largest, _ = largest_batches(long, one.examples, (), trainer.epochs)
    inputs, config = long.batches.inputs(largest, CPU), trainer.model.config
    head = config.hidden_size // config.num_attention_heads
    tokens = sum(inputs.sequences.tokens.row_lengths)
    kept = 2 * 4 * tokens * config.num_key_value_heads * head * config.num_hidden_layers
    with Ledger() as ledger, torch.no_grad():
        before = ledger.now().total
        long.objective.probe_preparation(trainer.model, inputs)
    assert kept < ledger.peak.total - before < 2 * kept


def test_a_memory_probe_keeps_a_group_s_keys_and_values_before_its_step(monkeypatch):
    seen, probe = [], GroupPolicy.probe_preparation

    def noted(work, model, inputs):
        seen.append(len(inputs.factors))
        probe(work, model, inputs)

    monkeypatch.setattr(GroupPolicy, "probe_preparation", noted)
    case = Case(workload(), of_text().build, rows(4), {"max_tokens": 120})
    case.trainer().probe_memory()
    measured = len(seen)
    plan(case, 2**40)
    assert measured == 1 < len(seen) and all(count % GROUP == 0 for count in seen)


@pytest.mark.parametrize("name", ["qwen3_next", "mistral", "gpt2", "recurrent_gemma", "mamba"])
def test_a_group_s_memory_is_probed_of_models_that_keep_other_things_than_keys(name):
    model = quantized_pair(name)[0]
    work = workload()
    inputs = work.batches.inputs(work.batches.collate(rows(2)), CPU)
    with torch.no_grad():
        work.objective.probe_preparation(model, inputs)


def test_the_largest_micro_batch_is_one_that_no_real_one_exceeds():
    work, examples = workload(), rows(12)
    trainer = Case(work, of_text().build, examples, {"max_tokens": 70}).trainer()
    largest, _ = largest_batches(work, examples, (), trainer.epochs)
    shape = work.batches.shape(largest)
    steps = [
        work.batches.shape(work.batches.collate([examples[n] for n in b]))
        for step in trainer.epochs.steps(0)
        for b in step
    ]
    assert shape.tokens >= max(each.tokens for each in steps)
    assert shape.targets >= max(each.targets for each in steps)
    assert len(shape.lengths) >= max(len(each.lengths) for each in steps)
    assert all(each.tokens <= 70 for each in steps)


def course(processes=ALONE):
    """Some steps over answers of the model itself, and what was learned."""
    work = with_answers(workload(), (), byte_tokenizer(None), ())
    work = replace(work, objective=replace(work.objective, judge=different_letters))
    changes = {"max_tokens": 60, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = Case(work, of_text().build, rows(8), changes).trainer(MemoryOptions())
    trainer.processes = processes
    return [[m.loss, m.metrics] for m in trainer], [p.detach().clone() for p in trainer.parameters]


def shared_course(number, count, folder):
    """What each process does."""
    losses, is_target = course(ProcessGroup(number, count))
    torch.save({"losses": losses, "is_target": is_target}, f"{folder}/{number}.pt")


def test_ranks_share_the_answers_of_a_step_and_learn_the_same(tmp_path):
    together(2, "train.test_policy", "shared_course", tmp_path)
    one, other = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    alone, _ = course()
    assert all(map(torch.equal, one["is_target"], other["is_target"])) and one["losses"] == other["losses"]
    assert len(one["losses"]) == len(alone) == 3
    assert all(math.isfinite(loss) and metrics["completions/mean_length"] > 0 for loss, metrics in one["losses"])


def test_a_step_without_any_difference_of_rewards_is_no_fault():
    work = workload(judge=lambda examples, texts: {"same": torch.ones(len(texts))})
    trainer = Case(work, of_text().build, rows(8), {"max_tokens": 60, "max_steps": 2}).trainer()
    found = list(trainer)
    assert [each.grad_norm for each in found] == [0.0, 0.0] and not trainer.took_part
    assert found[0].metrics["frac_reward_zero_std"] == 1.0
    _, numbers = capture(trainer)  # a checkpoint of it, which is as it began
    assert numbers["step"] == 2


def constant(value, cut=False, **changes):
    """A trainer whose answers all get one reward, and are all cut, or none is."""

    def ended(*given):
        return [each._replace(is_cut=cut) for each in said(*given)]

    work = workload(answer=ended, judge=lambda examples, texts: {"same": torch.full((len(texts),), value)})
    return Case(work, of_text().build, rows(8), {"max_tokens": 60} | changes).trainer()


@pytest.mark.parametrize(
    ("value", "cut", "cause"),
    [
        (0.0, True, "(mean 0); 100% of them were cut at objective.max_completion_tokens 6: raise it"),
        (0.9, False, "(mean 0.9); if these answers are wrong, fine-tune the model first or reward parts of an answer"),
    ],
)
def test_steps_that_learn_nothing_name_the_cause_once_and_end_a_run_that_has_learned_nothing(value, cut, cause, caplog):
    trainer = constant(value, cut, max_steps=12)
    with pytest.raises(TrainingError, match="none of 10 steps learned anything: all 3 answers to a prompt got one"):
        list(trainer)
    (warned,) = [message for message in caplog.messages if "learned nothing" in message]
    assert warned.startswith("step 1 learned nothing: all 3 answers to a prompt got one reward") and cause in warned
    assert trainer.step == 10


def test_a_resumed_run_goes_on_counting_the_steps_that_learned_nothing(caplog):
    first, second = (constant(1.0, max_steps=12) for _ in range(2))
    for _ in islice(first, 6):
        pass
    tensors, numbers = capture(first)
    restore(second, Checkpoint(first.step, tensors, {STATE: numbers}))
    with pytest.raises(TrainingError, match="none of 10 steps learned anything"):
        list(second)
    assert second.step == 10 and sum("learned nothing" in message for message in caplog.messages) == 1


def test_a_run_that_has_learned_something_may_end_in_steps_that_learn_nothing():
    trainer = constant(1.0, max_steps=12)
    trainer.took_part = True  # as after a step that learned
    assert len(list(trainer)) == 12


def test_an_evaluation_draws_no_numbers_so_that_one_that_is_cut_off_is_done_again():
    work = workload(judge=lambda examples, texts: {"same": torch.ones(len(texts))})
    model, before = adapted(work).eval(), torch.get_rng_state()
    work.prepare_step(model, [work.batches.collate(rows())])
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_only_the_answers_took_is_free_before_the_step_learns(monkeypatch):
    done = []
    monkeypatch.setattr("qlora_lite.ext.grpo.policy.free_cached_memory", lambda device: done.append(f"free {device}"))
    work = workload(
        answer=lambda *given: done.append("answer") or said(*given),
        judge=lambda *given: done.append("judge") or judged(*given),
    )
    work.prepare_step(adapted(work), [work.batches.collate(rows())])
    assert done == ["answer", "free cpu", "judge"]


def test_a_policy_without_answers_or_of_a_capped_head_is_refused():
    work = workload(answer=None)
    with pytest.raises(TrainingError, match="what answers"):
        work.prepare_step(adapted(work), [work.batches.collate(rows())])
    capped = workload(temperature=0.5)
    model = quantized_pair("gemma2")[0]
    with pytest.raises(ModelError, match=r"objective\.sampling_temperature"):
        capped.check_model(model, Case(work, of_text().build, rows(), {}).trainer().settings)
