"""Score a language model's answers at moments of its run."""

import logging

from qlora_lite.data.tokens.preferences import answered
from qlora_lite.errors import DoesNotFitError, ModelError
from qlora_lite.models.anatomy import device_of
from qlora_lite.prepare.datasets import measures_of
from qlora_lite.prepare.moment import Measured, Moment
from qlora_lite.prepare.task import find_preference, find_task
from qlora_lite.train.out_of_memory import free_cached_memory
from qlora_lite.train.processes import ALONE

from .evaluate import measure, new_tokens_of

log = logging.getLogger("qlora_lite")


def text_metrics(moment: Moment) -> Measured | None:
    """Return the scores of the model's answers to evaluation rows; None where none are asked for.

    What keeps them from it ends the run before training, and is a warning later.

    Raises:
        DoesNotFitError, ModelError: they cannot be measured, and training has not begun.
    """
    recipe, trainer, data = moment.recipe, moment.trainer, moment.eval_data
    if data is None or not (rows := answered(data.examples, find_preference(recipe), recipe.train.metrics_examples)):
        return None
    try:
        with moment.at_once():
            result = measure(
                trainer.model,
                moment.reader,
                rows,
                data.end_token_ids,
                trainer.answer_losses,
                moment.prompts_at_once,
                measures_of(recipe),
                new_tokens_of(recipe),
                moment.watch,
                ALONE if trainer.is_sharded else trainer.processes,  # else all run each block together
                find_task(recipe).picture_reader(recipe),
            )
    except (DoesNotFitError, ModelError) as error:
        if trainer.step:
            log.warning("train.metrics %s are not measured: %s", str(moment), error)  # the step of now
            return None
        if isinstance(error, ModelError):
            raise
        reason, _, _ = str(error).partition(":")
        raise DoesNotFitError(
            f"train.metrics_examples: {reason}; set it to 0, and measure with "
            "`qlora-lite evaluate` when the run has ended"
        ) from None
    finally:
        free_cached_memory(device_of(trainer.model))  # no other tensor gets what a recorded token took until then
    of = f" of {len(data.examples):,} (train.metrics_examples)" if len(rows) < len(data.examples) else ""
    moment.log_scores(result, result.compared + of)
    return result
