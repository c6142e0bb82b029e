"""Label the rows of a file with a run that has a head."""

from pathlib import Path

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.files import require_another, require_writable
from qlora_lite.prepare.moment import LabelledRows
from qlora_lite.prepare.task import find_task


def label_rows(
    run: str | Path, rows: str | Path, out: str | Path, model_path: str | None = None, unfinished: bool = False
) -> LabelledRows:
    """Label every row of a file with a run's model, in order, one JSON object a line with the row's place.

    Of a reward model, rows are chats, and each gets a "reward", of pairs scores of "chosen" and "rejected". Others get
    a label (of several "labels", of a number a "value"), "probabilities" by label, and the row's own label as
    "reference" where it has one; pictures of task.kind image-embedding an "embedding" of length 1 in their place.

    Args:
        run: a run folder, or an adapter folder as peft writes it, with the labels in its ``config.json``.
        rows: a data file with the columns of the run's own rows, the label not needed.
        out: JSONL file.
        model_path, unfinished: see ``artifacts.trained_run.open_trained``.

    Raises:
        DataError: rows are malformed, all of them named.
        RecipeError: the run is one of a language model.
        OutputError: the file cannot be written.
    """
    require_writable(out := Path(out))
    require_another(out, Path(rows))
    trained = open_trained(run, model_path, unfinished, has_head=True)
    return find_task(trained.recipe).label(trained.recipe, trained.adapter, trained.tokenizer(), rows, out)
