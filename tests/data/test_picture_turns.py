"""Pictures in chats: rows in every form, the tokens that transformers' processor makes of them, and what is refused."""

import base64
import json
import shutil
from math import prod

import numpy as np
import pytest
import torch
from datasets import Features, Image, Json, List, Value
from tiny_pictures import drawn, hub_of, write_parquet
from tiny_vision_language import FAMILIES, given_to_transformers, save_vision_language
from transformers import AutoTokenizer, Idefics3Processor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlora_lite.data.picture_grids import grids_of
from qlora_lite.data.picture_turns import MARK, take_out
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.errors import DataError, ModelError
from qlora_lite.ext.vision_language.reader import build_reader
from qlora_lite.models import vision_language as families
from qlora_lite.models.pretrained import processor_of
from qlora_lite.recipe.schema import Data, Model, Recipe, Task


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_vision_language(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate((34, 70, 20)):
        drawn("hot", number, size).save(folder / f"{number}.png")
    return folder


def reader_of(folder, resolution=None):
    data = Data.model_construct(train=(), resolution=resolution)
    return build_reader(Recipe(model=Model(path=str(folder)), task=Task(kind="image-text-to-text"), data=data))


def read(folder, rows, where, **settings):
    path = where / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    resolution, prompt = settings.pop("resolution", None), settings.pop("source", {})
    reader = TextReader(settings.pop("preference", None), reader_of(folder, resolution))
    return read_examples([Source(str(path), **prompt)], tokenizer, ReadSettings(**settings), reader)


def chat(content, answer="it is hot"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def parts(*said):
    return [
        {"type": "image", "path": part} if part.endswith(".png") else {"type": "text", "text": part} for part in said
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_pixels_are_those_of_transformers_processor(folders, pictures, name):
    said = [parts("0.png", "what is it"), parts("look at", "1.png", "and", "2.png"), parts("no picture")]
    data = read(folders[name], [{"messages": chat(each)} for each in said], pictures)
    data.problems.raise_if_any()
    reader = reader_of(folders[name])
    for example, content in zip(data.examples, said, strict=True):
        shown = [
            {"type": "image", "image": str(pictures / part["path"])} if part["type"] == "image" else part
            for part in content
        ]
        turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": parts("it is hot")}]
        theirs = given_to_transformers(folders[name], name, turns)
        assert example.token_ids.tolist() == theirs["input_ids"][0].tolist()
        if example.pictures:
            found, grids = torch.from_numpy(reader.of_examples([example])), grids_of(example.pictures)
            if name == "mistral3":
                shown = families.FAMILIES[name].arguments(found, grids)
                assert all(torch.equal(shown[key], theirs[key]) for key in ("pixel_values", "image_sizes"))
            elif name == "gemma4":  # which pads all pictures to the most patches that one has
                shown = families.FAMILIES[name].arguments(found, grids)
                count = shown["pixel_values"].shape[1]
                for key, padding in (("pixel_values", 0), ("image_position_ids", -1)):
                    assert torch.equal(shown[key], theirs[key][:, :count]) and (theirs[key][:, count:] == padding).all()
            else:
                assert torch.equal(found, theirs["pixel_values"].reshape(-1, *reader.unit))
                grids = [[1, 2 * height, 2 * width] for height, width in grids]
                assert grids == theirs.get("image_grid_thw", torch.zeros(0)).tolist()
            assert int((example.token_ids == 3).sum()) == len(found) * reader.tokens
        else:
            assert reader.of_examples([example]) is None
        taught = AutoTokenizer.from_pretrained(folders[name]).decode(example.token_ids[example.is_target])
        assert taught == " it is hot<end_of_utterance>" or taught == "it is hot<end_of_utterance>"


def test_a_smaller_resolution_cuts_a_picture_into_fewer_parts(folders, pictures):
    rows = [{"messages": chat(parts("1.png", "what is it"))}]
    whole = read(folders["smolvlm"], rows, pictures)
    small = read(folders["smolvlm"], rows, pictures, resolution=32)
    assert [int((data.examples[0].token_ids == 3).sum()) for data in (whole, small)] == [4 * 5, 4]
    assert len(reader_of(folders["smolvlm"], 32).of_examples(small.examples)) == 1
    with pytest.raises(ModelError, match=r"resolution 40 is no multiple of 32 pixels, the edge of .*32 or 64"):
        reader_of(folders["smolvlm"], 40)
    with pytest.raises(
        ModelError, match=r"resolution 40 is no multiple of 16 pixels, the edge of what a token .*or 48"
    ):
        reader_of(folders["qwen3_vl"], 40)
    with pytest.raises(ModelError, match="resolution 64: a model of the type llava sees pictures of 32 x 32 pixels al"):
        reader_of(folders["llava"], 64)


@pytest.mark.parametrize(("resolution", "grid"), [(None, (3, 6)), (48, (2, 4)), (32, (1, 2)), (16, (1, 1))])
def test_a_picture_that_keeps_its_shape_has_no_more_pixels_than_the_square_of_a_resolution(
    folders, tmp_path, resolution, grid
):
    drawn("hot", 0, 100).crop((0, 0, 98, 50)).save(tmp_path / "wide.png")
    reader = reader_of(folders["qwen3_vl"], resolution)
    rows = [{"messages": chat(parts("wide.png"))}]
    (example,) = read(folders["qwen3_vl"], rows, tmp_path, resolution=resolution).examples
    assert [picture.grid for picture in example.pictures] == [grid]
    assert reader.of_examples([example]).shape == (grid[0] * grid[1], 4, 3 * 2 * 8 * 8)
    assert reader.digest != reader_of(folders["qwen3_vl"], 64).digest


@pytest.mark.parametrize(
    ("name", "said"),
    [("qwen3_vl", "pixels: absolute aspect ratio .*"), ("mistral3", "pixels is too narrow to be scaled to 64")],
)
def test_a_picture_that_is_too_narrow_for_the_model_is_named(folders, tmp_path, name, said):
    drawn("hot", 0, 410).crop((0, 0, 410, 2)).save(tmp_path / "line.png")
    data = read(folders[name], [{"messages": chat(parts("line.png"))}], tmp_path)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: a picture of 410 x 2 {said}; cut it"):
        data.problems.raise_if_any()


def test_a_resolution_is_the_longer_edge_of_a_picture_whose_rows_have_ends(folders, tmp_path):
    drawn("hot", 0, 100).crop((0, 0, 98, 50)).save(tmp_path / "wide.png")
    rows = [{"messages": chat(parts("wide.png"))}]
    for resolution, grid in ((None, (2, 4)), (32, (1, 2))):
        (example,) = read(folders["mistral3"], rows, tmp_path, resolution=resolution).examples
        assert [picture.grid for picture in example.pictures] == [grid]
        assert reader_of(folders["mistral3"], resolution).of_examples([example]).shape == (prod(grid), 4, 3 * 8 * 8)


@pytest.mark.parametrize(("resolution", "grid"), [(None, (5, 11)), (16, (5, 11)), (192, (8, 16)), (288, (11, 23))])
def test_a_picture_that_fills_a_number_of_tokens_has_the_most_that_a_resolution_has_room_for(
    folders, tmp_path, resolution, grid
):
    drawn("hot", 0, 100).crop((0, 0, 98, 50)).save(tmp_path / "wide.png")
    rows, reader = [{"messages": chat(parts("wide.png"))}], reader_of(folders["gemma4"], resolution)
    (example,) = read(folders["gemma4"], rows, tmp_path, resolution=resolution).examples
    assert [picture.grid for picture in example.pictures] == [grid]
    assert reader.of_examples([example]).shape == (prod(grid), 4, 3 * 8 * 8)
    assert prod(grid) <= reader.largest_of(5000) <= 280


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("qwen3_vl", "set data.resolution to show less of large pictures, or set data.over"),
        ("llava", "raise data.max_tokens, or set data.overflow to drop$"),
    ],
)
def test_rows_with_pictures_that_are_too_long_are_named_with_what_can_be_done(folders, pictures, name, cure):
    data = read(folders[name], [{"messages": chat(parts("1.png", "what"))}], pictures, max_tokens=12)
    with pytest.raises(DataError, match=rf"1 of 1 rows are longer than data.max_tokens 12; .*{cure}"):
        data.problems.raise_if_any()


def test_rows_of_every_form_give_one_chat(folders, pictures):
    encoded = base64.b64encode((pictures / "0.png").read_bytes()).decode()
    url = {"url": f"data:image/png;base64,{encoded}"}
    text = {"type": "text", "text": "what is it"}
    rows = [
        {"messages": chat(parts("0.png", "what is it"))},
        {"messages": chat([{"type": "image_url", "image_url": url}, text])},
        {"messages": chat([{"type": "image", "base64": encoded}, text])},
        {"messages": chat([{"type": "image"}, text]), "images": ["0.png"]},
        {"messages": chat("<image>what is it"), "images": ["0.png"]},
        {"messages": chat("what is it"), "images": ["0.png"]},
        {"messages": chat("what is it"), "image": "0.png"},
        {"messages": chat([text]), "images": [{"bytes": None, "path": "0.png"}]},
    ]
    alike = [
        read(folders["llava"], rows, pictures).examples,
        read(
            folders["llava"],
            [
                {
                    "conversations": [
                        {"from": "human", "value": "<image>what is it"},
                        {"from": "gpt", "value": "it is hot"},
                    ],
                    "images": ["0.png"],
                }
            ],
            pictures,
        ).examples,
        read(
            folders["llava"],
            [{"prompt": "<image>what is it", "completion": "it is hot", "images": ["0.png"]}],
            pictures,
        ).examples,
        read(
            folders["llava"], [{"instruction": "what is it", "output": "it is hot", "images": ["0.png"]}], pictures
        ).examples,
        read(
            folders["llava"],
            [{"q": "what is it", "a": "it is hot", "image": "0.png"}],
            pictures,
            source={"prompt": "<image>{q}", "completion": "{a}"},
        ).examples,
    ]
    found = [example for each in alike for example in each]
    assert len(found) == 12
    assert all(np.array_equal(one.token_ids, found[0].token_ids) for one in found)
    assert len({one.pictures[0].digest for one in found}) == 1
    held = read_examples(
        [
            Source(
                "mine",
                rows=[
                    {
                        "messages": chat("<image>what is it"),
                        "images": [{"bytes": (pictures / "0.png").read_bytes(), "path": None}],
                    }
                ],
            )
        ],
        AutoTokenizer.from_pretrained(folders["llava"]),
        reader=TextReader(pictures=reader_of(folders["llava"])),
    )
    assert np.array_equal(held.examples[0].token_ids, found[0].token_ids)
    assert held.examples.picture_digests == [found[0].pictures[0].digest]


def test_rows_are_told_apart_by_their_pictures(folders, pictures):
    rows = [{"messages": chat(parts(name, "what is it"))} for name in ("0.png", "2.png", "0.png")]
    examples = read(folders["llava"], rows, pictures).examples
    one, other, again = (examples[number : number + 1].digest() for number in range(3))
    first, second, third = examples
    assert np.array_equal(first.token_ids, second.token_ids) and first.pictures != second.pictures
    assert first.pictures == third.pictures
    assert one != other and one != again  # the order of the rows is part of it


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_what_stands_for_a_picture_is_never_learned(folders, pictures, train_on):
    rows = [{"messages": chat(parts("1.png", "what is it", "0.png"))}]
    (example,) = read(folders["smolvlm"], rows, pictures, train_on=train_on).examples
    tokenizer = AutoTokenizer.from_pretrained(folders["smolvlm"])
    taught = set(tokenizer.convert_ids_to_tokens(example.token_ids[example.is_target]))
    assert not taught & {"<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"}
    assert example.is_target.sum() > 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": chat("<image><image>what"), "images": ["0.png"]}, "2 placeholders <image> .*, and 1 pictures in"),
        ({"messages": chat("<image>what is it")}, "1 placeholders <image> .*, and 0 pictures in the column images"),
        ({"messages": chat(parts("gone.png", "what"))}, "there is no picture .*gone.png"),
        ({"messages": chat(parts("rows.jsonl.png", "what"))}, "there is no picture"),
        (
            {"messages": chat([{"type": "image", "url": "https://x/y.png"}])},
            "a picture is the address 'https://x/y.png'",
        ),
        ({"messages": chat("what", [{"type": "image", "path": "0.png"}])}, "turn 2 has a picture, and only"),
        ({"messages": chat([{"type": "video", "path": "0.mp4"}])}, "part of type 'video'"),
        ({"messages": chat("<image>what"), "images": ["broken.png"]}, "not a whole picture"),
        ({"messages": chat(f"{MARK}what"), "images": ["0.png"]}, "the character U\\+FFFC"),
        ({"messages": chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}])}, "no base64"),
        ({"messages": chat("a <fake_token_around_image>"), "images": ["0.png"]}, "reads as a control token"),
    ],
)
def test_bad_rows_are_named_with_their_cure(folders, pictures, row, message):
    (pictures / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    good = {"messages": chat(parts("0.png", "what is it"))}
    data = read(folders["smolvlm"], [good, row], pictures)
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        data.problems.raise_if_any()
    assert len(data.examples) == 1


def test_a_picture_that_changes_after_the_rows_were_read_ends_the_run(folders, tmp_path):
    drawn("hot", 0).save(tmp_path / "0.png")
    (example,) = read(folders["llava"], [{"messages": chat(parts("0.png", "what"))}], tmp_path).examples
    reader = reader_of(folders["llava"])
    assert reader.of_examples([example]).shape == (1, 3, 32, 32)
    drawn("cool", 1).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the picture .*0.png was changed since the rows were read"):
        reader.of_examples([example])


def test_a_template_of_plain_text_writes_pictures_too_and_another_is_refused(folders, pictures, tmp_path):
    rows = [{"messages": chat(parts("look", "0.png", "what is it"))}]
    (example,) = read(folders["llava"], rows, pictures, template="chatml").examples
    assert example.prompt == f"<|im_start|>user\nlook{'<image>' * 16}what is it<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "mute.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('<image>', '') }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = read(folders["llava"], rows, pictures, template=str(tmp_path / "mute.jinja"))
    with pytest.raises(DataError, match=r"mute.jinja\) writes no <image> for a picture; set data.template to another"):
        data.problems.raise_if_any()


def test_a_template_that_older_files_have_beside_the_tokenizer_s_is_read(folders, pictures, tmp_path):
    folder = shutil.copytree(folders["mistral3"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
    (folder / "chat_template.jinja").unlink()
    rows = [{"messages": chat(parts("look", "0.png", "what is it"))}]
    (own,), (older,) = (read(each, rows, pictures).examples for each in (folders["mistral3"], folder))
    assert AutoTokenizer.from_pretrained(folder).chat_template is None and older.prompt == own.prompt


def test_pictures_stand_where_the_row_has_them():
    row, said = take_out({"messages": chat("a <image> b <image>"), "images": [b"1", b"2"]})
    assert row == {"messages": chat(f"a {MARK} b {MARK}")} and said == [b"1", b"2"]
    mixed = chat([*parts("x.png"), {"type": "image"}])
    assert take_out({"messages": mixed, "image": [b"2"]})[1] == ["x.png", b"2"]
    untouched = {"messages": [{"role": "assistant", "content": "<image>"}]}
    assert take_out(untouched) == (untouched, [])


def test_a_placeholder_that_is_no_user_s_is_text():
    said = [{"type": "text", "text": "write <image>"}]
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}], "images": ["a"]}
    found, pictures = take_out(row)
    user, assistant = found["messages"]
    assert user["content"][0]["text"] == f"write {MARK}" and assistant["content"] == said and pictures == ["a"]


def test_processors_are_the_families_own(folders):
    assert isinstance(processor_of(folders["llava"], "llava", 16), LlavaProcessor)
    assert isinstance(processor_of(folders["llava"], "llava", 16).image_processor, CLIPImageProcessorPil)
    assert isinstance(processor_of(folders["smolvlm"], "smolvlm", 4), Idefics3Processor)


def test_a_hub_data_set_of_chats_holds_pictures_and_turns_of_mixed_kinds(folders, pictures, tmp_path, monkeypatch):
    turns = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    features = Features({"messages": List({"role": Value("string"), "content": Json()}), "images": List(Image())})
    held = [{"bytes": (pictures / "0.png").read_bytes(), "path": "0.png"}]
    path = write_parquet(tmp_path / "rows.parquet", [{"messages": chat(turns), "images": held}], features)
    source = Source(hub_of(monkeypatch, tmp_path, "parquet", data_files=path))
    data = read_examples(
        [source],
        AutoTokenizer.from_pretrained(folders["llava"]),
        reader=TextReader(pictures=reader_of(folders["llava"])),
    )
    data.problems.raise_if_any()
    by_path = read(folders["llava"], [{"messages": chat(parts("0.png", "what is it"))}], pictures)
    assert data.examples.digest() == by_path.examples.digest()
    assert data.examples[0].pictures[0].digest == by_path.examples[0].pictures[0].digest
