"""Embeddings of pictures: loss and gradients are those of transformers' and peft's modules put together; planned."""

import peft
import pytest
import torch
from methods import Case, assert_as_planned, assert_gradients_of_peft, gradients, plan, with_factors
from tiny_pictures import ENCODERS, STILL, picture_rows, save_encoder, write_pictures
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

from qlora_lite.adapters.files import Lora, save_adapter
from qlora_lite.data.labels import ONE_LABEL
from qlora_lite.data.picture_processor import processor_of
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.load import load_model
from qlora_lite.models.skeleton import read_part
from qlora_lite.train.causal_lm import ModelSpec
from qlora_lite.train.picture_embedding import PictureEmbedding
from qlora_lite.train.sequence_head import HeadLoss
from qlora_lite.train.step import accumulate_gradients

CPU = torch.device("cpu")
NAMES = ("cool", "hot")
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32, head=True)
HEAD = Head(ONE_LABEL, NAMES, 0, of_pictures=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(folder / name, name) for name in ENCODERS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return picture_rows(write_pictures(tmp_path_factory.mktemp("pictures"), 5))


def loaded(folder):
    return load_model(folder, "none", compute_dtype=torch.float32, use_cache=False, head=HEAD)


def workload(folder):
    spec = ModelSpec(with_head(read_part(str(folder)), HEAD).config, "none", compute_dtype=torch.float32)
    processor = processor_of(STILL, 28, 28, "none")
    return PictureEmbedding(HeadLoss(ONE_LABEL), METHOD, spec, labels=NAMES, processor=processor)


def read_by_the_head(name, model, pixels):
    """What transformers' class for image classification gives its classifier, written out for each family."""
    if name == "dinov2":
        hidden = model.dinov2(pixels).last_hidden_state
        return torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)
    if name == "vit":
        return model.vit(pixels).last_hidden_state[:, 0]
    hidden = model.vision_model(pixels).last_hidden_state
    return (hidden if name == "siglip" else hidden[:, 1:]).mean(1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(folders, rows, name, tmp_path):
    work, model = workload(folders[name]), loaded(folders[name])
    torch.manual_seed(0)
    METHOD.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", folders[name], method=METHOD)
    batches = [work.inputs(work.collate(part), CPU) for part in (rows[:3], rows[3:])]
    ours = accumulate_gradients(work, model, batches).loss.item()

    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(folders[name], config=config, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    inner, whole = theirs.base_model.model, work.collate(rows)
    read = read_by_the_head(name, inner, whole.pixels)
    head = inner.classifier.modules_to_save["default"]
    cosines = functional.cosine_similarity(read[:, None], head.weight[None], dim=2)
    loss = functional.cross_entropy(cosines / 0.05 + head.bias, whole.targets)
    loss.backward()
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_of_peft(gradients(METHOD, model), theirs)
    found = work.embeddings(model.eval(), whole)
    torch.testing.assert_close(found, functional.normalize(read, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_the_plan_is_the_ledger_s_peak_whatever_the_memory_options(folders, rows, name):
    one = Case(workload(folders[name]), lambda: loaded(folders[name]), rows,
               {"max_tokens": 4, "packing": False, "micro_batch_size": 4})  # fmt: skip
    assert_as_planned(one, plan(one, 2**40))
