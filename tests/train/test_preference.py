"""Preference objectives equal their definitions, packed or one by one, and trl's trainers."""

import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods import Case, ledger_of, of_text, plan
from rank_processes import together
from tiny import build_tiny, quantized_pair
from tiny_files import VOCABULARY, byte_tokenizer
from tiny_trainer import SETTINGS, examples
from torch.nn.functional import log_softmax

from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.ext.preferences.objective import Preference, preference_lm
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.process_group import ProcessGroup
from qlora_lite.train.processes import ALONE
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import accumulate_gradients, evaluate_loss

CPU = torch.device("cpu")
BETA, GAMMA, SMOOTHING, GOOD, BAD = 0.7, 0.3, 0.1, 1.5, 0.5
OBJECTIVES = {
    "dpo": Preference("dpo", BETA),
    "dpo, smoothed": Preference("dpo", BETA, SMOOTHING),
    "dpo with sft": Preference("dpo", BETA, sft_weight=0.4),
    "ipo": Preference("ipo", BETA),
    "hinge": Preference("hinge", 0.05),
    "orpo": Preference("orpo", BETA, sft_weight=1.0),
    "simpo": Preference("simpo", BETA, gamma=GAMMA),
    "cpo": Preference("cpo", BETA, sft_weight=1.0),
    "kto": Preference("kto", BETA, desirable_weight=GOOD, undesirable_weight=BAD),
}


def pairs(count=7, with_references=True):
    """Examples of two sequences with one prompt, and random references near to what a random model gives."""
    chance, found = np.random.default_rng(3), []
    for number in range(count):
        prompt = chance.integers(3, 160, int(chance.integers(2, 5)))
        answers = [chance.integers(3, 160, int(chance.integers(1, 9))) for _ in range(2)]
        token_ids = np.concatenate([np.concatenate([prompt, answer]) for answer in answers]).astype(np.int32)
        is_target = np.concatenate([np.arange(len(prompt) + len(answer)) >= len(prompt) for answer in answers])
        references = tuple(float(-5.0 * len(answer) + chance.normal()) for answer in answers) if with_references else ()
        first = len(prompt) + len(answers[0])
        found.append(Example(token_ids, is_target, "", "", f"rows.jsonl:{number}", first, number % 3 != 1, references))
    return found


def log_probability(model, sequence):
    """The sum over a sequence's targets, by the model's own forward pass over it alone."""
    ids = torch.from_numpy(sequence.token_ids).long()[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    values = log_softmax(logits[:-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return values[torch.from_numpy(sequence.is_target[1:])].sum()


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def loss_by_definition(objective, model, rows):
    """The mean loss of examples, each sequence by itself, in float64, as the papers write it."""
    o, losses = objective, []
    sums = [[log_probability(model, sequence) for sequence in sequences_of(row)] for row in rows]
    moved = [float(two.detach()) - row.references[1] for (_, two), row in zip(sums, rows, strict=True)]
    z = max(0.0, sum(moved) / len(moved))
    for (one, two), row in zip(sums, rows, strict=True):
        counts = [int(sequence.is_target.sum()) for sequence in sequences_of(row)]
        c, r = one - row.references[0], two - row.references[1]
        p, q = one / counts[0], two / counts[1]
        if o.kind == "dpo":
            right, wrong = -torch.log(sigmoid(o.beta * (c - r))), -torch.log(sigmoid(-o.beta * (c - r)))
            loss = (1 - o.label_smoothing) * right + o.label_smoothing * wrong
        elif o.kind == "ipo":
            loss = (c / counts[0] - r / counts[1] - 1 / (2 * o.beta)) ** 2
        elif o.kind == "hinge":
            loss = (1 - o.beta * (c - r)).clamp(min=0)
        elif o.kind == "orpo":
            ratio = torch.log(p.exp() / (1 - p.exp())) - torch.log(q.exp() / (1 - q.exp()))
            loss = -o.beta * torch.log(sigmoid(ratio))
        elif o.kind == "simpo":
            loss = -torch.log(sigmoid(o.beta * (p - q) - o.gamma))
        elif o.kind == "cpo":
            loss = -torch.log(sigmoid(o.beta * (one - two)))
        elif row.desirable:
            loss = o.desirable_weight * (1 - sigmoid(o.beta * (c - z)))
        else:
            loss = o.undesirable_weight * (1 - sigmoid(o.beta * (z - c)))
        losses.append(loss - o.sft_weight * p)
    return sum(losses) / len(losses)


def adapted(objective):
    """A tiny 4-bit model with LoRA weights that do something, and its workload."""
    work = of_text().workload
    work = preference_lm(work.method, objective, work.spec)
    model, _ = quantized_pair("llama")
    torch.manual_seed(0)
    work.method.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return work, model


def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_loss_and_gradients_equal_the_definition_however_the_examples_are_packed(name, parts):
    objective, rows = OBJECTIVES[name], pairs()
    work, model = adapted(objective)
    expected = loss_by_definition(objective, model, rows)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()

    batches = [work.batches.collate(rows[n::parts]) for n in range(parts)]
    means = accumulate_gradients(
        work,
        model,
        [work.batches.inputs(each, CPU) for each in work.prepare_step(model, batches)],
    )

    assert means.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradients(model) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "kto"])
def test_with_the_references_of_the_model_itself_no_answer_is_preferred(kind):
    objective = Preference(kind, 0.1)
    work, model = adapted(objective)
    rows = pairs()
    references = work.objective.references(
        model, work.spec, work.batches.inputs(work.batches.collate(rows), CPU)
    ).tolist()
    rows = [replace(row, references=tuple(own)) for row, own in zip(rows, references, strict=True)]

    found = evaluate_loss(work, model, [work.batches.collate(rows[:3]), work.batches.collate(rows[3:])])

    at_start = {"dpo": math.log(2), "ipo": (1 / 0.2) ** 2, "hinge": 1.0, "kto": 0.5}[kind]
    assert found.loss == pytest.approx(at_start, abs=1e-6 * at_start / math.log(2))
    if kind != "kto":
        margins = [found.metrics[f"rewards/{each}"] for each in ("chosen", "rejected", "margins")]
        assert margins == pytest.approx([0, 0, 0], abs=1e-6)


def test_an_evaluation_of_judged_answers_does_not_depend_on_how_they_are_packed():
    work, model = adapted(OBJECTIVES["kto"])
    rows = [replace(row, references=(row.references[0], row.references[1] - 20)) for row in pairs()]
    whole = evaluate_loss(work, model, [work.batches.collate(rows)])
    parts = evaluate_loss(work, model, [work.batches.collate(rows[n : n + 2]) for n in range(0, len(rows), 2)])
    assert whole.metrics["kl"] > 0
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_an_evaluation_tells_how_many_examples_are_done(name):
    rows, told = pairs(12), []
    Case(adapted(OBJECTIVES[name])[0], of_text().build, rows, {"max_tokens": 40}).trainer().evaluate(rows, told.append)
    assert told == sorted(told) and told[-1] == 12 and len({*told}) == len(told) > 2


def test_metrics_are_means_over_pairs():
    work, model = adapted(OBJECTIVES["dpo"])
    rows = pairs()

    found = evaluate_loss(work, model, [work.batches.collate(rows[:2]), work.batches.collate(rows[2:])]).metrics

    sums = [[log_probability(model, each).item() for each in sequences_of(row)] for row in rows]
    rewards = [
        [BETA * (a - b) for a, b in zip(own, row.references, strict=True)] for own, row in zip(sums, rows, strict=True)
    ]
    mean = lambda values: sum(values) / len(rows)  # noqa: E731
    assert found["rewards/chosen"] == pytest.approx(mean(c for c, _ in rewards), rel=1e-4)
    assert found["rewards/margins"] == pytest.approx(mean(c - r for c, r in rewards), rel=1e-4)
    assert found["rewards/accuracies"] == pytest.approx(mean(c > r for c, r in rewards))
    assert found["logps/rejected"] == pytest.approx(mean(r for _, r in sums), rel=1e-5)
    assert found["tokens/chosen"] == pytest.approx(mean(int(sequences_of(row)[0].is_target.sum()) for row in rows))


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_a_plan_knows_the_peak_to_one_per_cent(name):
    case = Case(adapted(OBJECTIVES[name])[0], of_text().build, pairs(12), {"max_tokens": 48})
    chosen, _ = plan(case, 2**40)
    trainer = case.trainer(chosen.options)

    ledger = ledger_of(trainer)

    predicted = chosen.prediction.simulation.peak().total
    assert predicted == pytest.approx(ledger.peak.total, rel=0.01)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_pairs_take_the_memory_of_fine_tuning_on_their_tokens(name):
    rows, alone = pairs(12), [each for row in pairs(12) for each in sequences_of(row)]
    changes = {"max_tokens": 64}
    peaks = [
        ledger_of(Case(work, of_text().build, each, changes).trainer()).peak.total
        for work, each in ((adapted(OBJECTIVES[name])[0], rows), (of_text().workload, alone))
    ]
    assert peaks[0] <= 1.05 * peaks[1]


def test_no_tensor_of_all_logits_is_ever_there():
    case = Case(adapted(OBJECTIVES["dpo"])[0], of_text().build, pairs(12), {"max_tokens": 256})
    trainer = case.trainer(MemoryOptions(loss_chunk_tokens=4))
    ledger = ledger_of(trainer, timeline=True)
    largest, _ = largest_batches(trainer.workload, case.examples, (), trainer.epochs)
    logits_bytes = 4 * trainer.workload.batches.shape(largest).targets * 160
    assert 0 < max(moment.breakdown.get("logits", 0) for moment in ledger.timeline) < logits_bytes


def test_the_largest_micro_batch_is_one_of_pairs_that_no_real_one_exceeds():
    work, rows = adapted(OBJECTIVES["dpo"])[0], pairs(12)
    trainer = Case(work, of_text().build, rows, {"max_tokens": 40}).trainer()
    largest, _ = largest_batches(work, rows, (), trainer.epochs)
    shape = work.batches.shape(largest)
    steps = [
        work.batches.shape(work.batches.collate([rows[n] for n in batch]))
        for step in trainer.epochs.steps(0)
        for batch in step
    ]
    assert len(shape.lengths) % 2 == 0
    assert shape.tokens >= max(each.tokens for each in steps)
    assert shape.targets >= max(each.targets for each in steps)
    assert len(shape.lengths) >= max(len(each.lengths) for each in steps)


def test_a_model_learns_to_prefer_what_is_chosen():
    rows = pairs(16, with_references=False)
    case = Case(adapted(OBJECTIVES["dpo"])[0], of_text().build, rows, {"max_steps": 20, "max_tokens": 64})
    trainer = case.trainer()
    found = trainer.reference_log_probabilities(rows)
    trainer.examples = [replace(row, references=tuple(own)) for row, own in zip(rows, found.tolist(), strict=True)]

    metrics = list(trainer)

    assert metrics[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1].metrics["rewards/accuracies"] == 1
    assert metrics[-1].loss < 0.2


def test_examples_of_one_sequence_are_a_language_models():
    work, model = adapted(OBJECTIVES["dpo"])
    rows = examples(4)
    trainer = Trainer(model, pairs(), TrainSettings(**SETTINGS | {"max_tokens": 64}), workload=work)
    plain = causal_lm(method=work.method, spec=work.spec)
    expected = evaluate_loss(plain, model, [plain.batches.collate(rows)])
    found = [loss for each in trainer.answer_losses(rows) for loss in each]
    assert sum(found) == pytest.approx(expected.loss * expected.target_tokens, rel=1e-5)
    assert len(found) == expected.target_tokens


def course(name, processes=ALONE, options=None):
    """References, an evaluation, some steps and another evaluation, and what was learned."""
    rows, changes = pairs(11), {"max_tokens": 40, "gradient_accumulation_steps": 3, "max_steps": 3}
    case = Case(adapted(OBJECTIVES[name])[0], of_text().build, rows, changes)
    trainer = case.trainer(options)
    trainer.processes = processes
    found = trainer.reference_log_probabilities(rows)
    trainer.examples = [replace(row, references=tuple(own)) for row, own in zip(rows, found.tolist(), strict=True)]
    losses = [trainer.evaluate(trainer.examples).loss, *([m.loss, m.metrics] for m in trainer)]
    return found, [*losses, trainer.evaluate(trainer.examples).loss], [p.detach().clone() for p in trainer.parameters]


def shared_course(number, count, folder, name):
    """What each process does; memory runs out over the first references of the second."""
    whole, failures = Preference.references, [MemoryError("no room")] if number == 1 else []

    def references(*arguments):
        if failures:
            raise failures.pop()
        return whole(*arguments)

    with patch.object(Preference, "references", references):
        found, losses, is_target = course(name, ProcessGroup(number, count), MemoryOptions())
    torch.save({"found": torch.from_numpy(found), "losses": losses, "is_target": is_target}, f"{folder}/{number}.pt")


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_ranks_learn_what_one_process_learns(name, tmp_path):
    together(2, "train.test_preference", "shared_course", tmp_path, name)
    found, losses, is_target = course(name, options=MemoryOptions())
    one, other = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    assert torch.equal(one["found"], other["found"]) and all(map(torch.equal, one["is_target"], other["is_target"]))
    torch.testing.assert_close(one["found"], torch.from_numpy(found), rtol=1e-5, atol=1e-5)
    assert one["losses"][0] == pytest.approx(losses[0], rel=1e-5)
    assert [loss for loss, _ in one["losses"][1:-1]] == pytest.approx([loss for loss, _ in losses[1:-1]], rel=1e-4)
    for ours, theirs in zip(one["is_target"], is_target, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=3e-4)


# trl's trainers, on a plain model all of whose weights are trained. Theirs weigh tokens where ours weigh pairs, so that
# of objectives with a mean over tokens each pair is a batch.

TRL = {
    "dpo": Preference("dpo", 0.3),
    "ipo": Preference("ipo", 0.3),
    "hinge": Preference("hinge", 0.3),
    "kto": Preference("kto", 0.3, desirable_weight=GOOD, undesirable_weight=BAD),
    "orpo": Preference("orpo", 0.3, sft_weight=1.0),
    "cpo": Preference("cpo", 0.3, sft_weight=1.0),
    "simpo": Preference("simpo", 0.3, 0.1, GAMMA),
}
ROWS = [("q", "yes", "no, not at all"), ("w", "a longer answer", "b"), ("e", "one", "two"), ("r", "x", "yz")]


def trl_trainer(kind, model, folder):
    """Return trl's trainer of an objective; the reference model is the model as it is now."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    usual = {
        "output_dir": str(folder),
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "max_length": 64,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": len(ROWS),
        "beta": 0.3,
    }
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    if kind in ("dpo", "ipo", "hinge"):
        config, trainer = DPOConfig(**usual, loss_type="sigmoid" if kind == "dpo" else kind), DPOTrainer
    elif kind == "kto":
        rows = [{"prompt": row[0], "completion": row[n], "label": n == 1} for row in ROWS for n in (1, 2)]
        usual["per_device_train_batch_size"] = len(rows)
        config, trainer = KTOConfig(**usual, desirable_weight=GOOD, undesirable_weight=BAD), KTOTrainer
    elif kind == "orpo":
        config, trainer = ORPOConfig(**usual | {"per_device_train_batch_size": 1}), ORPOTrainer
    elif kind == "cpo":
        config, trainer = CPOConfig(**usual | {"per_device_train_batch_size": 1}), CPOTrainer
    else:
        config = CPOConfig(**usual, loss_type="simpo", simpo_gamma=GAMMA, label_smoothing=0.1, cpo_alpha=0.0)
        trainer = CPOTrainer
    tokenizer = byte_tokenizer(None)
    if kind == "orpo":  # it adds the loss of the prompt's tokens too, of which the first one has none
        tokenizer.bos_token = None
    return trainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def row_of(ids, mask, answered):
    """One sequence of trl's batch, without its padding."""
    there = mask.bool()
    return ids[there].numpy().astype(np.int32), answered[there].bool().numpy()


def examples_of(kind, batch):
    """Return trl's batch as examples."""
    if kind in ("orpo", "cpo", "simpo"):
        names = "input_ids", "attention_mask", "labels"
        chosen, rejected = (zip(*(batch[f"{side}_{n}"] for n in names), strict=True) for side in ("chosen", "rejected"))
        sides = [
            [row_of(ids, mask, labels != -100) for ids, mask, labels in both]
            for both in zip(chosen, rejected, strict=True)
        ]
        good = [True] * len(sides)
    elif kind == "kto":
        names = "input_ids", "attention_mask", "completion_mask"
        own, other = (
            [row_of(*each) for each in zip(*(batch[p + name] for name in names), strict=True)] for p in ("", "KL_")
        )
        sides, good = list(zip(own, other, strict=True)), batch["label"]
    else:
        rows = [
            row_of(*each)
            for each in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
        ]
        half = len(rows) // 2
        sides, good = list(zip(rows[:half], rows[half:], strict=True)), [True] * half
    return [
        Example(
            np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), "", "", f"row {n}", len(a[0]), bool(good[n])
        )
        for n, (a, b) in enumerate(sides)
    ]


@pytest.mark.filterwarnings("ignore")  # of trl, about what transformers renames
@pytest.mark.parametrize("kind", TRL)
def test_loss_and_gradients_equal_trls(kind, tmp_path):
    pytest.importorskip("trl")
    reference = build_tiny("llama", vocab_size=VOCABULARY)
    reference.save_pretrained(tmp_path / "model")
    trainer = trl_trainer(kind, type(reference).from_pretrained(tmp_path / "model"), tmp_path)
    theirs, ours, reference = trainer.model, build_tiny("llama", vocab_size=VOCABULARY), adopt(reference)
    torch.manual_seed(1)
    with torch.no_grad():  # so that the model is not its reference any more
        for parameter in theirs.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape))
    ours.load_state_dict(theirs.state_dict())
    ours = adopt(ours).requires_grad_(True)
    losses, found = [], []
    for batch in trainer.get_train_dataloader():
        rows = examples_of(kind, batch)
        loss = trainer.compute_loss(theirs, batch)
        loss.backward()
        losses.append(loss.item())
        found += rows
    work = preference_lm(of_text().workload.method, TRL[kind])
    known = work.objective.references(
        reference, work.spec, work.batches.inputs(work.batches.collate(found), CPU)
    ).tolist()
    found = [replace(row, references=tuple(own)) for row, own in zip(found, known, strict=True)]

    inputs = [work.batches.inputs(each, CPU) for each in work.prepare_step(ours, [work.batches.collate(found)])]
    means = accumulate_gradients(work, ours, inputs)

    assert means.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert means.loss.item() != pytest.approx({"dpo": math.log(2), "kto": 0.5}.get(kind, 0.0), abs=1e-3)  # it has moved
    for (name, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, their.grad / len(losses), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("answers", [(0.0, -0.5), (-0.5, 0.0), (0.0, 0.0), (1e-6, -0.5)])
def test_an_answer_that_is_learned_completely_has_the_loss_and_gradient_of_nearly_so(answers):
    """Where p is 1 in float32, the odds are infinite; above it lies what rounding makes of it."""
    objective, nearly = Preference("orpo", BETA), 1 - 2.0**-23
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in answers)

    loss = objective._losses(chosen, rejected)
    loss.sum().backward()

    p, q = (math.log(nearly) if value >= 0 else value for value in answers)
    ratio = p - math.log(-math.expm1(p)) - q + math.log(-math.expm1(q))
    slope = BETA / (1 + math.exp(ratio))
    assert loss.item() == pytest.approx(BETA * math.log1p(math.exp(-ratio)), rel=1e-4)
    assert chosen.grad.item() == pytest.approx(slope / math.expm1(p), rel=1e-4)
    assert rejected.grad.item() == pytest.approx(-slope / math.expm1(q), rel=1e-4)
    if answers == (0.0, -0.5):  # the limits
        assert loss.item() < 1e-6
        assert chosen.grad.item() == pytest.approx(-BETA / math.expm1(0.5), rel=1e-4)


def test_the_odds_of_orpo_equal_their_definition_from_unlikely_to_nearly_certain():
    objective, other = Preference("orpo", BETA), -0.7
    values = torch.tensor([-80.0, -20.0, -3.0, -math.log(2), -0.1, -1e-3, -1e-5, -(2.0**-22)], requires_grad=True)
    for sign in (1, -1):
        pair = (values, torch.full_like(values, other))[::sign]
        values.grad = None
        loss = objective._losses(*pair)
        loss.sum().backward()

        wide = values.detach().double().requires_grad_()
        odds = [torch.log(p.exp() / -torch.expm1(p)) for p in (wide, torch.full_like(wide, other))[::sign]]
        wanted = BETA * torch.log1p(torch.exp(odds[1] - odds[0]))
        wanted.sum().backward()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(values.grad.double(), wide.grad, rtol=1e-5, atol=1e-9)
