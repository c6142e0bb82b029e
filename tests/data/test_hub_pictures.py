"""Pictures of hub data sets, which `datasets` stores as bytes or paths beside numbers of classes, become examples."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from tiny_pictures import CLASSES, COLOURS, drawn, encoded, hub_of, write_parquet, write_pictures

from qlora_lite.data.captions import CAPTIONS, NO_CAPTION, Fit
from qlora_lite.data.labels import MASKS, ONE_LABEL
from qlora_lite.data.picture_files import BROKEN, decode
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.errors import DataError
from qlora_lite.ext.pictures.examples import NO_CLASS, NO_MASK, LabelledPictureReader


@pytest.fixture
def hub_holds(monkeypatch, tmp_path):
    """Let a repository hold rows as Parquet; return the path of the data set."""
    return lambda rows, features: hub_of(
        monkeypatch, tmp_path, "parquet", data_files=write_parquet(tmp_path / "0.parquet", rows, features)
    )


def read(path, problem=ONE_LABEL, **settings):
    named = {name: settings.pop(name) for name in ("rows", "prompt", "completion") if name in settings}
    return read_examples([Source(str(path), **named)], None, reader=LabelledPictureReader(problem, **settings))


def test_classes_have_their_names_and_pictures_their_bytes(hub_holds):
    features = Features(CLASSES | {"others": {"label": CLASSES["label"]}})
    rows = [
        {"image": encoded(drawn(label, 0)), "label": CLASSES["label"].str2int(label), "others": {"label": 0}}
        for label in COLOURS
    ]
    data = read(path := hub_holds(rows, features))
    data.problems.raise_if_any()
    assert [row["label"] for _, row in read_rows(Source(path))] == [1, 0]  # as texts with labels have them
    assert [example.answer for example in data.examples] == list(COLOURS)
    assert [example.where.rpartition(":")[2] for example in data.examples] == ["1", "2"]
    for label, example in zip(COLOURS, data.examples, strict=True):
        assert np.array_equal(decode(example.prompt), drawn(label, 0))


def test_every_kind_of_picture_is_what_it_is_in_a_folder_and_faults_have_the_same_names(hub_holds, tmp_path):
    folder, colour = write_pictures(tmp_path / "folder", 1), drawn("hot", 3)
    odd = {"grey.png": colour.convert("L"), "palette.png": colour.convert("P"), "cmyk.jpg": colour.convert("CMYK")}
    for name, image in odd.items():
        image.save(folder / "hot" / name)
    (folder / "hot" / "broken.png").write_bytes((folder / "hot" / "000.png").read_bytes()[:900])
    colour.save(folder / "loose.png")
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "label": CLASSES["label"].names.index(path.parent.name) if path.parent != folder else None,
        }
        for path in inside
    ]
    one, other = read(folder), read(hub_holds(rows, CLASSES))
    assert one.dropped == other.dropped == {BROKEN: 1, NO_CLASS: 1}
    faults = [{problem.rule: problem.message for problem in data.problems.found} for data in (one, other)]
    assert faults[0][BROKEN] == faults[1][BROKEN]
    assert faults[1][NO_CLASS] == "the label is missing or null; every row needs it"
    assert one.rows_read == other.rows_read == 7 and one.rows_kept == other.rows_kept == 5
    assert one.examples.digest() == other.examples.digest()
    for example, again in zip(one.examples, other.examples, strict=True):
        assert np.array_equal(decode(example.prompt), decode(again.prompt))


def in_memory(rows, features):
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


@pytest.mark.parametrize("streams", [False, True])
def test_a_dataset_in_memory_is_what_its_file_is(hub_holds, streams, monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    rows = [{"image": encoded(drawn(label, 0)), "label": CLASSES["label"].str2int(label)} for label in COLOURS]
    rows += [
        {"image": {"bytes": b"none", "path": None}, "label": 0},
        {"image": encoded(drawn("hot", 3)), "label": None},
    ]
    kept = in_memory(rows, CLASSES)
    data = read("mine", rows=kept.to_iterable_dataset() if streams else kept.with_format("torch"))
    assert data.examples.digest() == read(hub_holds(rows, CLASSES)).examples.digest()
    assert [example.answer for example in data.examples] == list(COLOURS) and data.dropped == {BROKEN: 1, NO_CLASS: 1}
    assert [example.where for example in data.examples] == ["mine:1", "mine:2"]
    assert [row["label"] for _, row in read_rows(Source("mine", rows=kept))] == [1, 0, 0, None]  # as text has them
    chats = Features({"images": List(Image())})
    ((_, row),) = read_rows(Source("mine", rows=in_memory([{"images": [encoded(drawn("hot", 0))]}], chats)))
    assert row == {"images": [{"bytes": encoded(drawn("hot", 0))["bytes"]}]}
    part = read(
        "mine",
        rows=kept.select([1]).rename_columns({"image": "photo", "label": "kind"}),
        prompt="{photo}",
        completion="{kind}",
    )
    assert [example.answer for example in part.examples] == ["hot"]


def test_pictures_of_pillow_become_bytes_in_a_dataset_and_are_refused_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    rows = [{"image": drawn("hot", 0), "label": "hot"}, {"image": drawn("cool", 0), "label": "cool"}]
    (first, _) = read("mine", rows=Dataset.from_list(rows)).examples
    assert np.array_equal(decode(first.prompt), rows[0]["image"])
    fault = r"mine:1: the picture is of the type Image, .*datasets\.Dataset\.from_list\(rows\)"
    with pytest.raises(DataError, match=fault):
        read("mine", rows=rows).problems.raise_if_any()
    changed = Dataset.from_list(rows).with_transform(lambda batch: batch | {"label": ["warm"] * len(batch["label"])})
    assert [row["label"] for _, row in read_rows(Source("mine", rows=changed))] == ["warm", "warm"]


def test_a_row_of_a_test_set_without_labels_is_named(hub_holds):
    rows = [{"image": encoded(drawn("hot", 0)), "label": label} for label in (0, -1)]
    data = read(hub_holds(rows, CLASSES))
    assert data.rows_kept == 1 and "the label -1 marks a row without one" in data.problems.found[0].message


def test_a_folder_in_a_repository_names_files_that_were_downloaded(monkeypatch, tmp_path):
    folder = write_pictures(tmp_path / "repository", 2)
    data = read(hub_of(monkeypatch, tmp_path, "imagefolder", data_dir=str(folder)))
    assert data.examples.digest() == read(folder).examples.digest()
    assert {example.prompt for example in data.examples} == {str(path) for path in folder.glob("*/*.png")}


def test_masks_are_pictures_of_their_own(hub_holds):
    mask = np.zeros((34, 34), np.uint8)
    mask[:7] = 1
    rows = [
        {"image": encoded(drawn("hot", 0)), "annotation": encoded(Pillow.fromarray(mask))},
        {"image": encoded(drawn("hot", 5)), "annotation": None},
    ]
    data = read(hub_holds(rows, Features({"image": Image(), "annotation": Image()})), MASKS)
    assert [json.loads(example.answer)["classes"] for example in data.examples] == [["0", "1"]]
    assert data.dropped == {NO_MASK: 1}


@pytest.mark.parametrize(("column", "kind"), [("text", Value("string")), ("label", CLASSES["label"])])
def test_captions_are_texts_or_names_of_classes(hub_holds, column, kind):
    value = {"text": "hot", "label": 0}[column]
    rows = [{"image": encoded(drawn("hot", 0)), column: value}, {"image": encoded(drawn("hot", 1)), column: None}]
    data = read(hub_holds(rows, Features({"image": Image(), column: kind})), CAPTIONS, fit=Fit(((16, 16),)))
    assert [example.answer for example in data.examples] == ["hot"] and data.dropped == {NO_CAPTION: 1}
