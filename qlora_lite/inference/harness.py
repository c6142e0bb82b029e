"""Score tasks of lm-evaluation-harness with the forward pass and the generation of this package.

The harness makes the prompts, extracts the answers and scores them. ``HarnessLM`` computes what it asks for: log
likelihoods over packed sequences, as evaluation does, and answers in batches, as ``generate`` does. Weights in 4 bit,
weights in host memory and several adapters are used as there. The harness's own ``HFLM`` would pad a batch and hold the
logits of all its tokens and words at once.

Choices of one token behind the same prompt, as of MMLU, are scored by one forward pass.

Source: lm-evaluation-harness 0.4, ``lm_eval.api.model.TemplateLM``; equal to its ``HFLM``
(tests/inference/test_harness.py).
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList
from yaml import YAMLError

from qlora_lite.adapters.prompt import count_virtual
from qlora_lite.adapters.switch import Switch
from qlora_lite.artifacts.trained_run import TrainedRun
from qlora_lite.data.readers.hub import hub_errors
from qlora_lite.data.tokens.batch import IGNORED_LABEL, Batch, plan_epoch
from qlora_lite.data.tokens.storage import virtual_ids
from qlora_lite.errors import DataError, ModelError, RecipeError, how_to_install
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, likeliest_tokens, token_losses
from qlora_lite.models.anatomy import device_of, head
from qlora_lite.models.nested import of_blocks
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.task import find_task
from qlora_lite.train.causal_lm import TextBatches
from qlora_lite.train.forward import hidden_states
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import evaluating
from qlora_lite.train.text_guards import check_forward

from .evaluate import Watch, answered_at_once, watching
from .generate import Sampling, answers, stop_ids
from .multi_adapter import BASE, load_switched, open_runs

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise RecipeError(f"--tasks needs lm-evaluation-harness ({error}): {how_to_install('eval')}") from None

log = logging.getLogger("qlora_lite")
MAX_NEW_TOKENS = 256  # of an answer, where a task does not say; HFLM's
SHOTS_SEED, NUMPY_SEED = 1234, 1234  # of the harness's command line
RESAMPLES = 1000  # for the standard error of scores that are no means
_SAMPLED_BY = {"temperature", "top_p", "top_k"}
_KNOWN = {*_SAMPLED_BY, "do_sample", "until", "max_gen_toks"}


class HarnessLM(TemplateLM):
    """A run or its bare base, asked by the harness; before a forward pass it is given a model (``use``).

    Args:
        run: its tokenizer, chat template and end tokens are used.
        adapter: its name in the model's switch; None is the bare base.
        watch: told how far it is.
    """

    def __init__(self, run: TrainedRun, adapter: str | None = None, watch: Watch | None = None):
        super().__init__()
        self.run, self.adapter, self.watch = run, adapter, watch
        self.tokenizer = run.tokenizer()
        self.max_length = resolve_max_length(
            of_blocks(find_task(run.recipe).describe_model(run.recipe).config), self.tokenizer
        )
        self.virtual = 0  # tokens before every row, by the adapter; known with the model
        self._encode = lru_cache(maxsize=4096)(self._encoded)  # choices share their prompt

    def use(self, model: nn.Module, switch: Switch, settings: TrainSettings) -> None:
        """Take the model to compute with; sequences are packed up to ``settings.max_tokens``, and virtual tokens."""
        with switch.using(self.adapter):
            self.virtual = count_virtual(model)
        self.max_length -= self.virtual
        self.model, self.switch = model, switch
        self.settings = replace(settings, max_tokens=settings.max_tokens + self.virtual)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What the tokenizer was loaded from."""
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation in the run's chat template, with the opening of the answer or of its continuation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Return the tokens of a text: with begin-of-text where the tokenizer puts it and the text has none."""
        return list(self._encode(string, add_special_tokens))

    def _encoded(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self.tokenizer.decode(self.prefix_token_id))
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Return the log likelihood of each continuation, and whether each of its tokens is the likeliest.

        Args:
            requests: with the tokens of the context and of the continuation behind any first element. What is too long
                for the model loses tokens on the left.
        """
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a task asks for the likelihood of {len(continuation)} tokens; "
                    f"it must be of 1 to {self.max_length}, the model's length"
                )
            ids = (context + continuation)[-self.max_length - 1 :]
            asked.setdefault(tuple(ids[:-1]), []).append((number, ids[-len(continuation) :]))
        rows_of, found = TextBatches(), [(0.0, True)] * len(requests)
        done, waiting = watching(self.watch, "likelihoods", len(asked)), list(asked.values())
        with self.switch.using(self.adapter), evaluating(self.model):
            sequences = [[*virtual_ids(self.virtual), *ids] for ids in asked]
            for rows in plan_epoch([*map(len, sequences)], self.settings.max_tokens, True, 1, "as-is", 0, 0):
                inputs = rows_of.inputs(_packed([sequences[row] for row in rows]), device_of(self.model))
                ends = accumulate(inputs.row_lengths)
                wanted = [(end, *each) for end, row in zip(ends, rows, strict=True) for each in waiting[row]]
                places = [place for end, _, ids in wanted for place in range(end - len(ids), end)]
                targets = inputs.target_positions.new_tensor([token for _, _, ids in wanted for token in ids])
                hidden = hidden_states(self.model, inputs)[inputs.target_positions.new_tensor(places)]
                chunk, its_head = self.settings.options.loss_chunk_tokens or AUTO_CHUNK_TOKENS, head(self.model)
                losses = token_losses(hidden, targets, its_head, chunk)
                is_likeliest = likeliest_tokens(hidden, its_head, chunk) == targets
                sizes = [len(ids) for *_, ids in wanted]
                for (_, number, _), *pair in zip(wanted, losses.split(sizes), is_likeliest.split(sizes), strict=True):
                    found[number] = -float(pair[0].sum()), bool(pair[1].all())
                if done:
                    done(rows[-1] + 1)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of each text, in windows of the model's length where it is longer."""
        windows = [[make_disjoint_window(window) for window in self._windows(*request.args)] for request in requests]
        scored = iter(self._loglikelihood_tokens([(None, *each) for text in windows for each in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        return get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answer each prompt up to one of its stop strings, the end of an answer or the most tokens."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        stop = stop_ids(self.model, self.tokenizer, self.run.end_token_ids)
        show, before = watching(self.watch, "answers", len(requests)), 0
        for numbers in groups.values():
            until, most, sampling = self._settings(requests[numbers[0]].args[1])
            prompts = [self._prompt(requests[number].args[0], most) for number in numbers]
            longest = self.virtual + max(map(len, prompts)) + most
            at_once = answered_at_once(self.run.recipe, self.model, self.run.recipe.memory.budget_bytes, longest)
            stopping = _StopStrings(self.tokenizer, until)
            with self.switch.using(self.adapter):
                said = answers(
                    self.model,
                    self.tokenizer,
                    prompts,
                    most,
                    stop,
                    at_once,
                    sampling,
                    first=before,
                    before_batch=stopping.begin,
                    stopping=StoppingCriteriaList([stopping]),
                    done=show and (lambda count, before=before: show(before + count)),
                )
            for number, answer in zip(numbers, said, strict=True):
                found[number] = postprocess_generated_text(answer.text, until, None)
            before += len(numbers)
        return found

    def _settings(self, stated: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """Return stop strings, most tokens and sampling of what a task asks for.

        Raises:
            DataError: it asks for what this package's generation cannot do.
        """
        said = normalize_gen_kwargs(dict(stated), MAX_NEW_TOKENS)
        if unknown := said.keys() - _KNOWN:
            raise DataError(
                f"a task generates with {', '.join(sorted(unknown))}, which is not supported; its answers "
                f"may set {', '.join(sorted(_KNOWN))}"
            )
        until = handle_stop_sequences(said.get("until"), self.tokenizer.decode(self.eot_token_id))
        drawn = {name: said[name] for name in _SAMPLED_BY & said.keys()} if said["do_sample"] else {}
        if not 0 < said["max_gen_toks"] < self.max_length:
            raise DataError(
                f"a task asks for {said['max_gen_toks']} new tokens, and the model's length is {self.max_length} tokens"
            )
        return until, said["max_gen_toks"], Sampling(**drawn, seed=0)

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """Return the tokens of a prompt, the last ones where the model is too short for it and its answer."""
        return self.tok_encode(text)[-(self.max_length - new_tokens) :]

    def tokens_of(self, request) -> int:
        """Return the tokens that a request of the harness takes, answer included.

        Raises:
            DataError: it asks for what this package cannot do.
        """
        if request.request_type == "generate_until":
            _, most, _ = self._settings(request.args[1])
            return len(self._prompt(request.args[0], most)) + most
        joined = "".join(request.args[:2]) if request.request_type == "loglikelihood" else request.args[0]
        return min(len(self.tok_encode(joined)) + 1, self.max_length)


def _packed(sequences: Sequence[list[int]]) -> Batch:
    """Return sequences as one, without targets: what is asked of a place may be several tokens."""
    lengths = tuple(map(len, sequences))
    ids = torch.tensor([token for each in sequences for token in each])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(ids[None], positions[None], torch.full_like(ids, IGNORED_LABEL), lengths, ())


class _StopStrings(StoppingCriteria):
    """Stop an answer once it holds one of some strings; text behind the string is cut off later."""

    def __init__(self, tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, [each for each in strings if each]
        self.tail = 2 + max(len(each.encode()) for each in self.strings)  # tokens that can hold it, and the last one
        self.width: int | None = None

    def begin(self, _rows: Sequence[int]) -> None:
        """Take the next call's tokens, but the last, for the prompts of another batch."""
        self.width = None

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        """Return which answers [prompts] have ended, bool."""
        self.width = input_ids.shape[1] - 1 if self.width is None else self.width
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.tail :])
        return torch.tensor([any(s in text for s in self.strings) for text in texts], device=input_ids.device)


def evaluate_tasks(
    runs: str | Path | TrainedRun | Sequence[str | Path | TrainedRun],
    tasks: Sequence[str],
    fewshot: int | None = None,
    with_base: bool = False,
    rows: int | None = None,
    chat: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Score runs over one base model on tasks of lm-evaluation-harness.

    A task folder's Python code, if its tasks name any, is run.

    Args:
        runs: see ``multi_adapter.open_runs``.
        tasks: names or patterns of the harness's tasks, groups and tags, folders with tasks of one's own, or files.
        fewshot: examples in each prompt; None is what each task says. A task that says 0 keeps it.
        with_base: score the bare base model too.
        rows: most examples of a task; None is all.
        chat: write prompts in the runs' chat templates.
        watch: told how far it is.

    Returns:
        rows, chat_template, versions and fewshot (by task), and models: name, adapter and scores, by task and by metric
        (with its filter, as in "exact_match,strict-match"): value, standard_error, examples.

    Raises:
        RecipeError: there is no such task, or a run cannot be used.
        DataError: a task's data cannot be read, or a task asks for what is not supported.
        ModelError: the runs do not share a base.
    """
    runs = [runs] if isinstance(runs, str | Path | TrainedRun) else runs
    opened = open_runs(runs)
    if BASE in opened and with_base:
        raise ModelError(f"a run folder is called {BASE!r}, which names the base model here; rename it")
    for run in opened.values() if with_base else ():
        run.require_base()
    random.seed(0)
    np.random.seed(NUMPY_SEED)  # which tasks may draw from
    found = _load(tasks, fewshot)
    first = next(iter(opened.values()))
    named = ([(BASE, first, None)] if with_base else []) + [
        (name, run, name if run.adapter else None) for name, run in opened.items()
    ]
    asked = {name: HarnessLM(run, adapter, _named(watch, name)) for name, run, adapter in named}
    longest = max(_longest(lm, found, rows, chat) for lm in asked.values())
    model, switch = load_switched(opened, longest)[:2]
    check_forward(model, longest)
    models = []
    for name, lm in asked.items():
        own = train_settings(lm.run.recipe)
        lm.use(model, switch, replace(own, max_tokens=max(own.max_tokens, longest)))
        for task in found["tasks"].values():
            task.set_fewshot_seed(SHOTS_SEED)
        result = evaluate(
            lm,
            found,
            limit=rows,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        scores = {task: _scores(values) for task, values in (result["results"] | result.get("groups", {})).items()}
        models.append({"name": name, "adapter": str(lm.run.adapter) if lm.adapter else None, "scores": scores})
    about = {"versions": dict(result["versions"]), "fewshot": dict(result["n-shot"])}
    return {"base_model": first.files.name, "rows": rows, "chat_template": chat, **about, "models": models}


def _named(watch: Watch | None, name: str) -> Watch | None:
    return watch and (lambda what, *counts: watch(f"{name}: {what}", *counts))


def _load(names: Sequence[str], fewshot: int | None) -> dict[str, dict]:
    """Return the harness's tasks and groups, with so many examples in each prompt."""
    folders = [name for name in names if Path(name).is_dir()]
    files = [name for name in names if Path(name).is_file()]
    if gone := next((name for name in names if _is_path(name) and not Path(name).exists()), None):
        raise RecipeError(f"--tasks {gone}: no such folder or file")
    with _task_faults("--tasks"):
        own = TaskManager(include_path=folders, include_defaults=False)
        # the harness's own take seconds to index
        manager = own if len(folders + files) == len(names) else TaskManager(include_path=folders)
    wanted = dict.fromkeys(files)
    for name in names:
        matched = _of_folder(name) if name in folders else manager.match_tasks([name])
        if not matched and name not in files:
            raise RecipeError(f"--tasks {name}: {_unknown(name, folders, manager.all_tasks)}")
        wanted |= dict.fromkeys(matched)
    found: dict[str, dict] = {"tasks": {}, "groups": {}}
    for name in wanted:
        with _task_faults(f"the task {name}"):
            loaded = manager.load([name])
        for part, members in found.items():
            members |= loaded[part]
    for name, task in found["tasks"].items():
        for flag, reason in (("UNSAFE_CODE", "runs code that models write"), ("MULTIMODAL", "needs pictures or sound")):
            if getattr(task, flag, False):
                raise RecipeError(f"the task {name} {reason}, which is not supported; leave it out")
        own_shots = task.get_config("num_fewshot")
        if fewshot and own_shots == 0:
            log.warning("the task %s is made for no examples in its prompts, and has none", name)
        elif fewshot is not None or own_shots is None:
            task.set_config("num_fewshot", fewshot or 0)
    return found


def _is_path(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") or Path(name).name != name


def _of_folder(folder: str) -> list[str]:
    """Return the tasks of a folder, and its groups behind them."""
    own = TaskManager(include_path=folder, include_defaults=False)
    return own.all_subtasks + own.all_groups


def _unknown(name: str, folders: Sequence[str], known: Sequence[str]) -> str:
    if name in folders:
        return "the folder has no task, which is a .yaml file with a key task"
    close = get_close_matches(name, known, 3)
    return "the harness has no such task" + (f"; did you mean {' or '.join(close)}?" if close else "")


@contextmanager
def _task_faults(what: str) -> Iterator[None]:
    """Raise what can be wrong with a task, which the harness raises in many ways, as a DataError."""
    try:
        with hub_errors("connect to the network once, or take a folder of tasks with local data"):
            yield
    except DataError as error:
        raise DataError(f"{what}: its data: {error}") from error
    except ImportError as error:
        raise DataError(f"{what} needs a package that is not installed ({error})") from error
    except (YAMLError, TemplateError, KeyError, TypeError, AttributeError, StopIteration) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())
        raise DataError(f"{what} cannot be used: {said}") from error


def _longest(lm: HarnessLM, found: Mapping[str, dict], rows: int | None, chat: bool) -> int:
    """Return the tokens of the longest request, answer included."""
    if chat:
        lm.run.template(lm.tokenizer)  # where there is none, an error says so
    lengths = []
    for name, task in found["tasks"].items():
        task.set_fewshot_seed(SHOTS_SEED)
        with _task_faults(f"the task {name}"):
            task.build_all_requests(
                limit=rows,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=lm.apply_chat_template if chat else None,
            )
            for request in task.instances[:1]:
                task.doc_to_target(request.doc)  # which is asked for again once all is answered
        lengths += map(lm.tokens_of, task.instances)
    return max(lengths)


def _scores(values: Mapping[str, Any]) -> dict[str, dict]:
    """Return value, standard error and examples by metric, from what the harness names "metric,filter"."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else key] = {
            "value": float(value),
            "standard_error": error if isinstance(error, float) else None,
            "examples": values.get("sample_len"),
        }
    return found
