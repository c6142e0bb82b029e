"""Several processes with the same model share the answers that metrics are of, and all know all of them."""

import numpy as np
import pytest
from rank_processes import together
from tiny import build_tiny
from tiny_files import VOCABULARY, byte_tokenizer

from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DoesNotFitError, ModelError
from qlora_lite.inference import evaluate
from qlora_lite.models.load import adopt
from qlora_lite.train.process_group import ProcessGroup


def sharing(number, count, folder):
    """What each process does: it answers its share, and none where there are fewer prompts than processes."""
    group, made = ProcessGroup(number, count), []
    model, tokenizer = adopt(build_tiny("llama", vocab_size=VOCABULARY)), byte_tokenizer()
    examples = [Example(np.zeros(9, np.int32), np.ones(9, bool), f"{'a' * i}?", f"{i}", f"f:{i}") for i in range(5)]
    plain = evaluate.answers

    def counted(model, tokenizer, prompts, **settings):
        made.append(len(prompts))
        if len(prompts) == 1 and prompts[0].startswith("fails"):
            raise (ModelError, DoesNotFitError)[number]("no answer")
        return plain(model, tokenizer, prompts, **settings)

    evaluate.answers = counted
    for some in (examples, examples[:1]):
        alone = evaluate.measure(model, tokenizer, some, [2])
        progress = []
        watch = lambda what, done, total, progress=progress: progress.append((done, total))  # noqa: E731
        shared = evaluate.measure(model, tokenizer, some, [2], watch=watch, processes=group)
        assert shared == alone and progress[-1][1] == len(some)
        assert made[-1] == len(group.share(some))
        assert sum(group.gather(made[-1])) == len(some) == made[-2]
    failing = [Example(np.zeros(9, np.int32), np.ones(9, bool), f"fails{end}", "x", "f:1") for end in "?!"]
    error = (ModelError, DoesNotFitError)[number]
    for bad in ([*failing[:1], *examples[:1]], [*examples[:1], *failing[:1]]):  # on one rank alone
        with pytest.raises((ModelError, DoesNotFitError), match=r"no answer|another rank could not make its answers"):
            evaluate.measure(model, tokenizer, bad, [2], processes=group)
    with pytest.raises(error, match="no answer"):
        evaluate.measure(model, tokenizer, failing, [2], processes=group)


def test_answers_are_shared_and_an_error_of_one_rank_is_that_of_all(tmp_path):
    together(2, "inference.test_shared_answers", "sharing", tmp_path)
