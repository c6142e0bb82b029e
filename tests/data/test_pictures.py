"""Pictures as rows: found, named where they are broken, decoded as transformers' processors do, augmented by a seed."""

import base64
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_pictures import COLOURS, STILL, drawn, encoded, write_pictures
from transformers import AutoImageProcessor

from qlora_lite.data.captions import CAPTIONS, Fit, captions_in
from qlora_lite.data.labels import MASKS, ONE_LABEL
from qlora_lite.data.picture_files import BROKEN, decode, file_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.errors import DataError
from qlora_lite.ext.pictures.examples import NO_CLASS, LabelledPictureReader
from qlora_lite.ext.pictures.pixels import AUGMENTS, Processor, processor_of


def read(path, **source):
    return read_examples([Source(str(path), **source)], None, reader=LabelledPictureReader(ONE_LABEL))


def read_captions(path, caption=None, **source):
    fit = Fit(((16, 16),), caption=caption)
    return read_examples([Source(str(path), **source)], None, reader=LabelledPictureReader(CAPTIONS, fit))


def labels(data):
    return {os.path.basename(example.prompt): example.answer for example in data.examples}


def test_a_folder_s_folders_are_the_labels_in_order(tmp_path):
    data = read(write_pictures(tmp_path / "rows", 2))
    assert [example.answer for example in data.examples] == ["cool", "cool", "hot", "hot"]
    assert data.rows_read == data.rows_kept == 4 and not data.problems.count
    example = data.examples[3]
    assert example.prompt == str(tmp_path / "rows" / "hot" / "001.png") and example.where == f"{example.prompt}:1"


def test_folders_of_classes_may_be_links(tmp_path):
    stored, folder = write_pictures(tmp_path / "stored", 2), tmp_path / "folder"
    folder.mkdir()
    for kind in ("hot", "cool"):
        (folder / kind).symlink_to(Path(stored, kind))
    (folder / "cool" / "again").symlink_to(Path(stored, "cool"))
    assert [example.answer for example in read(folder).examples] == ["cool", "cool", "hot", "hot"]


def test_every_broken_picture_is_named_and_counted(tmp_path):
    folder = write_pictures(tmp_path / "rows", 3)
    whole = (folder / "cool" / "000.png").read_bytes()
    (folder / "cool" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cool" / "no.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "hot" / "text.png").write_text("no picture")
    (folder / "loose.png").write_bytes(whole)
    Image.new("1", (12_000, 12_000)).save(folder / "hot" / "huge.png")
    (folder / "hot" / "notes.txt").write_text("no picture, by its name")
    (folder / ".hidden").write_text("")
    data = read(folder)
    assert data.rows_kept == 6 and data.rows_read == 11
    assert data.dropped == {BROKEN: 4, NO_CLASS: 1}
    named = {os.path.basename(problem.where): problem.message for problem in data.problems.found}
    assert named.keys() == {"cut.png:1", "no.jpg:1", "text.png:1", "huge.png:1", "loose.png:1"}
    assert "truncated" in named["cut.png:1"] and "89,478,485" in named["huge.png:1"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes among files")
def test_a_pipe_and_a_folder_among_pictures_are_named_and_do_not_hang(tmp_path):
    folder = write_pictures(tmp_path / "rows", 1)
    os.mkfifo(folder / "hot" / "pipe.png")
    (tmp_path / "rows.csv").write_text(f"image,label\n{folder}/hot/000.png,hot\n{folder},hot\n")
    for path, good in ((folder, 2), (tmp_path / "rows.csv", 1)):
        data = read(path)
        assert data.rows_kept == good and data.dropped == {BROKEN: 1}
        assert "is not an ordinary file" in data.problems.found[0].message


def test_a_class_of_which_nothing_is_left_is_an_error_however_many_may_be_bad(tmp_path):
    folder = write_pictures(tmp_path / "rows", 2)
    for path in (folder / "hot").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 rows with the label 'hot' is kept"):
        read(folder).problems.raise_if_any(10)


def test_tables_name_pictures_from_where_they_lie(tmp_path):
    write_pictures(tmp_path / "rows", 2)
    lines = ["file_name,label,author", "cool/000.png,a,x", "hot/001.png,b,y", "hot/009.png,b,y"]
    (tmp_path / "rows" / "table.csv").write_text("\n".join(lines))
    data = read(tmp_path / "rows" / "table.csv")
    assert labels(data) == {"000.png": "a", "001.png": "b"}
    assert "there is no picture" in data.problems.found[0].message and data.problems.found[0].where.endswith(".csv:4")
    assert data.unused[0]["columns"] == {"author": 3}
    (tmp_path / "named.jsonl").write_text(json.dumps({"photo": "rows/hot/000.png", "kind": 7}) + "\n")
    assert labels(read(tmp_path / "named.jsonl", prompt="{photo}", completion="{kind}")) == {"000.png": "7"}
    assert labels(read(tmp_path / "named.jsonl", prompt="./{photo}", completion="{kind}")) == {"000.png": "7"}
    with pytest.raises(DataError, match=r"no picture is recognised among the columns 'photo', 'kind'"):
        read(tmp_path / "named.jsonl").problems.raise_if_any()
    with pytest.raises(DataError, match="no column 'foto' among"):
        read(tmp_path / "named.jsonl", prompt="{foto}", completion="{kind}").problems.raise_if_any()


def test_a_template_of_the_answer_is_filled_for_captions_labels_and_masks(tmp_path):
    write_pictures(tmp_path, 1)
    Image.new("L", (34, 34), 1).save(tmp_path / "mask-a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "hot/000.png", "name": "a", "colour": "red"}\n')
    named = {"prompt": "{image}", "completion": "a photo of {name}, {colour}"}
    (example,) = read_captions(tmp_path / "rows.jsonl", **named).examples
    assert example.answer == "a photo of a, red"
    assert labels(read(tmp_path / "rows.jsonl", **named | {"completion": "kind {name}"})) == {"000.png": "kind a"}
    given = Source(str(tmp_path / "rows.jsonl"), prompt="{image}", completion=f"{tmp_path}/mask-{{name}}.png")
    (example,) = read_examples([given], None, reader=LabelledPictureReader(MASKS)).examples
    assert json.loads(example.answer)["classes"] == ["1"]


def test_a_column_of_captions_or_labels_that_is_not_there_is_named(tmp_path):
    write_pictures(tmp_path, 1)
    (tmp_path / "rows.csv").write_text("image,note\nhot/000.png,red\n")
    with pytest.raises(DataError, match=r"no caption is recognised among the columns 'image', 'note'; .* data\.cap"):
        read_captions(tmp_path / "rows.csv").problems.raise_if_any()
    assert [each.answer for each in read_captions(tmp_path / "rows.csv", "sks").examples] == ["sks"]
    named = {"prompt": "{image}", "completion": "{notes}"}
    for data in (read(tmp_path / "rows.csv", **named), read_captions(tmp_path / "rows.csv", **named)):
        assert "names {notes}; the columns are image, note" in data.problems.found[0].message
    assert [each.answer for each in read_captions(tmp_path / "rows.csv", "sks", **named).examples] == ["sks"]


def test_captions_and_prompts_begin_with_their_first_letter_whichever_editor_wrote_them(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8-sig")
    assert [example.answer for example in read_captions(tmp_path).examples] == ["a dog"]
    assert captions_in(tmp_path / "a.txt") == ["a dog"]


def test_an_address_in_a_table_is_not_fetched(tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\nhttps://x.org/a.png,hot\n")
    assert "pictures are not fetched; download it" in read(tmp_path / "rows.csv").problems.found[0].message


def test_pictures_in_base64_are_read_behind_data_and_without_it_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    drawn("cool", 0).save(buffer, "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    rows = [{"image": f"data:image/png;base64,{text}", "label": "cool"}, {"image": text, "label": "cool"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read(tmp_path / "rows.jsonl")
    (problem,) = data.problems.found
    assert [Path(example.prompt).read_bytes() for example in data.examples] == [buffer.getvalue()]
    assert "rows.jsonl:2" in problem.where and "write it behind data:image/png;base64," in problem.message
    assert len(problem.message) < 200


def test_bytes_in_parquet_become_files_named_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    held = []
    for label in COLOURS:
        buffer = io.BytesIO()
        drawn(label, 0).save(buffer, "png")
        held.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    held.append({"image": {"bytes": b"none", "path": "x.png"}, "label": "hot"})
    held.append({"image": None, "label": "hot"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), tmp_path / "rows.parquet")
    data = read(tmp_path / "rows.parquet")
    assert [example.answer for example in data.examples] == ["cool", "hot"]
    assert all(example.prompt.startswith(str(tmp_path / "cache")) for example in data.examples)
    assert np.array_equal(decode(data.examples[0].prompt), drawn("cool", 0))
    assert [problem.where[-2:] for problem in data.problems.found] == [":4", ":3"]
    assert read(tmp_path / "rows.parquet").examples.digest() == data.examples.digest()


def test_content_and_not_the_path_identifies_a_picture(tmp_path):
    one, other = (read(write_pictures(tmp_path / name, 2)).examples for name in "ab")
    assert one.digest() == other.digest()
    drawn("hot", 7).save(tmp_path / "b" / "hot" / "000.png")
    assert read(tmp_path / "b").examples.digest() != one.digest()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda f: f.mkdir(), "neither a picture"),
        (lambda f: [write_pictures(f / name, 1) for name in ("train", "test")], r"its folders are splits \(test, tra"),
    ],
)
def test_folders_without_classes_say_what_is_wrong(tmp_path, make, fault):
    make(tmp_path / "rows")
    with pytest.raises(DataError, match=fault):
        read(tmp_path / "rows").problems.raise_if_any()


def test_formats_of_texts_and_templates_of_a_folder_are_refused(tmp_path):
    folder = write_pictures(tmp_path / "rows", 1)
    with pytest.raises(DataError, match="are for the columns of a table"):
        read(folder, prompt="{a}", completion="{b}").problems.raise_if_any()
    (tmp_path / "t.csv").write_text("path,label\nrows/hot/000.png,a\n")
    with pytest.raises(DataError, match="format alpaca is of rows for a language model"):
        read(tmp_path / "t.csv", format="alpaca").problems.raise_if_any()


def test_every_kind_of_picture_becomes_three_channels_of_8_bits(tmp_path):
    grey = np.linspace(0, 255, 64).reshape(8, 8)
    colour = np.stack([grey, 255 - grey, grey / 2], -1).astype(np.uint8)
    cases = {
        "grey": Image.fromarray(grey.astype(np.uint8)),
        "rgb": Image.fromarray(colour),
        "sixteen": Image.fromarray((grey * 257).astype(np.uint16)),
        "rgba": Image.fromarray(np.dstack([colour, np.full((8, 8), 9, np.uint8)])),
        "palette": Image.fromarray(grey.astype(np.uint8)).convert("P"),
        "bilevel": Image.new("1", (8, 8), 1),
    }
    for name, image in cases.items():
        image.save(tmp_path / f"{name}.png")
    found = {name: np.asarray(decode(tmp_path / f"{name}.png")) for name in cases}
    assert all(array.shape == (8, 8, 3) and array.dtype == np.uint8 for array in found.values())
    assert np.abs(found["sixteen"].astype(int) - found["grey"]).max() <= 1  # and not clipped at 255
    assert np.array_equal(found["rgba"], colour) and (found["bilevel"] == 255).all()
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tiff")
    assert np.abs(np.asarray(decode(tmp_path / "float.tiff")).astype(int) - found["grey"]).max() <= 1


def test_a_camera_s_turn_is_undone(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").size == (10, 20)


def test_a_camera_s_turn_is_undone_whatever_else_the_camera_wrote(tmp_path):
    exif = Image.Exif()
    exif[274], exif[305] = 6, ""
    text = b"\x01\x31\x00\x02"  # tag and type in the file
    for other in (b"\x01\x31\x00\x0b", b"\x01\x03\x00\x02"):  # a number in place of text, text in that of a number
        Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif.tobytes().replace(text, other))
        assert decode(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0junk", b"junk"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_picture_is_taken_whose_camera_wrote_what_cannot_be_read(tmp_path, exif, kind):
    Image.new("RGB", (20, 10)).save(tmp_path / "a", kind, exif=exif)
    assert decode(tmp_path / "a").size == (20, 10)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
FILES = {
    "dinov2": IMAGENET
    | {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "do_normalize": True,
        "crop_size": {"height": 28, "width": 28},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    },
    "vit": STILL,
    "plain": STILL | {"do_normalize": False, "resample": 3, "size": {"height": 20, "width": 24}},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [(50, 37), (31, 64), (28, 28), (9, 12)])
def test_pixels_are_those_of_transformers_processor(tmp_path, name, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FILES[name]))
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(noise)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    processor = processor_of(FILES[name], 28)
    assert np.abs(processor.pixels(image) - expected).max() < 1e-5
    processor.save_pretrained(tmp_path)
    again = processor_of(json.loads((tmp_path / "preprocessor_config.json").read_text()), 1)
    assert np.array_equal(again.pixels(image), processor.pixels(image))


def test_another_size_keeps_the_proportion_of_resize_and_cut():
    found = processor_of(FILES["dinov2"], 28, 14)
    assert (found.height, found.width, found.resize) == (14, 14, 16)
    found = processor_of(FILES["vit"], 28, 14)
    assert (found.height, found.width, found.resize) == (14, 14, (14, 14))
    assert processor_of({}, 28) == Processor(28, 28, 28)
    for broken in ({"image_mean": [0.5]}, {"size": "large", "do_resize": True}):
        with pytest.raises(DataError, match=r"preprocessor_config\.json"):
            processor_of(broken, 28)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentations_follow_from_what_they_are_drawn_with(augment):
    processor, image = processor_of(FILES["dinov2"], 28, None, augment), drawn("hot", 3, 60)
    plain = processor.pixels(image)
    found = [processor.pixels(image, random.Random(f"0/{step}")) for step in range(40)]
    assert all(each.shape == (3, 28, 28) for each in found)
    assert np.array_equal(found[5], processor.pixels(image, random.Random("0/5")))
    kinds = len({each.tobytes() for each in found})
    assert kinds == {"none": 1, "flip": 2}.get(augment, 40)
    if augment == "flip":
        assert {each.tobytes() for each in found} == {plain.tobytes(), plain[:, :, ::-1].tobytes()}
        assert 10 < sum(np.array_equal(each, plain) for each in found) < 30


def test_problems_allow_as_many_as_said(tmp_path):
    folder = write_pictures(tmp_path / "rows", 3)
    (folder / "hot" / "000.png").write_bytes(b"")
    problems = read(folder).problems
    assert isinstance(problems, Problems) and problems.count == 1
    problems.raise_if_any(1)
    with pytest.raises(DataError, match="not a whole picture"):
        problems.raise_if_any(0)


def test_a_picture_that_is_damaged_in_the_cache_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    content = encoded(drawn("hot", 0))["bytes"]
    stored = file_of(content, "rows.jsonl:1")
    stored.write_bytes(content[:-9] + b"x" + content[-8:])
    assert file_of(content, "rows.jsonl:1") == stored and stored.read_bytes() == content
