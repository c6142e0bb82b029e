"""Generate one answer at a time for a server, piece by piece, and stop early when nobody listens any more.

transformers generates in a thread; every token is handed to the event loop as it comes. Requests wait for their turn in
a line of bounded length, so a burst of them cannot fill the memory.
"""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_lite.data.chat.probe import TakesTooMuchError
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.errors import DataError, tokenizer_faults
from qlora_lite.inference.generate import Shown, answer, shown_prompt, text_of_prompt
from qlora_lite.inference.multi_adapter import BASE, Tasks
from qlora_lite.models.anatomy import text_config
from qlora_lite.prepare.task import find_task

from .requests import ApiError, ChatRequest

UNFINISHED = "\ufffd"  # what a cut character is decoded to


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: its text, and at its end why it ended and the tokens counted."""

    text: str
    finish: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Engine:
    """Answers requests one after the other.

    Args:
        tasks: what can be asked for by name.
        most_waiting: requests that wait while one is answered; another one is refused.
    """

    def __init__(self, tasks: Tasks, most_waiting: int):
        self.tasks, self.most_waiting = tasks, most_waiting
        self.names = tuple(dict.fromkeys((*tasks.names, *([BASE] if tasks.has_base else []))))
        self._inside, self._turn = 0, asyncio.Lock()
        self._is_closed, self._stop = False, threading.Event()  # of the answer that is made

    def close(self) -> None:
        """End the answer that is made with what there is of it, and refuse those that wait."""
        self._is_closed = True
        self._stop.set()

    async def pieces(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """Yield an answer as it is made.

        Raises:
            ApiError: there is no such model, the conversation does not fit, or too many wait.
        """
        with TemporaryDirectory() as folder:
            prompt, room = self._prompt(request, Path(folder))
            async with aclosing(self._pieces(request, prompt, min(request.max_new_tokens, room))) as pieces:
                async for piece in pieces:
                    yield piece

    async def _pieces(self, request: ChatRequest, prompt: str | Shown, new_tokens: int) -> AsyncGenerator[Piece, None]:
        await self._take_turn()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        stop = self._stop = threading.Event()

        def hand_over(item: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def done(work: asyncio.Future) -> None:
            """End the turn with the thread: a listener who leaves is gone before it."""
            work.exception()  # it may be that nobody asks for it any more
            self._turn.release()
            self._inside -= 1
            queue.put_nowait(None)

        work = loop.run_in_executor(None, self._generate, request, prompt, new_tokens, hand_over, stop)
        work.add_done_callback(done)
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            work.result()  # raises what the thread raised
        finally:
            stop.set()  # whoever listened may have left

    async def _take_turn(self) -> None:
        if self._inside > self.most_waiting:
            raise ApiError(429, f"{self.most_waiting} requests wait already; try again later", "too_many_requests")
        self._inside += 1
        try:
            await self._turn.acquire()
        except asyncio.CancelledError:
            self._inside -= 1
            raise
        if self._is_closed:
            self._turn.release()
            self._inside -= 1
            raise ApiError(503, "the server is stopping", "service_unavailable")

    def _prompt(self, request: ChatRequest, folder: Path) -> tuple[str | Shown, int]:
        """Return the rendered conversation, with its pictures as files in a folder, and the most tokens of an answer
        that the model's length leaves."""
        if request.model not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"there is no model {request.model!r}; there are {known}", "model_not_found", "model")
        task, files = self.tasks.task(self._name(request)), []
        for number, content in enumerate(request.pictures):
            files.append(str(folder / str(number)))
            Path(files[-1]).write_bytes(content)
        try:
            reader = find_task(task.run.recipe).picture_reader(task.run.recipe) if files else None
            if files and reader is None:
                raise DataError(f"{request.model} reads no pictures")
            prompt = shown_prompt(render_prompt(task.template, request.turns), files, task.template, reader)
        except (DataError, TakesTooMuchError) as error:
            raise ApiError(400, str(error).replace(f"{folder}{os.sep}", ""), param="messages") from error
        config = text_config(self.tasks.model)
        limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
        with tokenizer_faults():
            count = len(self.tasks.tokenizer(text_of_prompt(prompt), add_special_tokens=False).input_ids)
        count += self.tasks.virtual_tokens(self._name(request))
        if count >= limit:
            raise ApiError(
                400,
                f"the messages have {count} tokens, and the model takes {limit} with the answer",
                "context_length_exceeded",
                "messages",
            )
        return prompt, limit - count

    def _name(self, request: ChatRequest) -> str | None:
        return request.model if request.model in self.tasks.names else None

    def _generate(
        self, request: ChatRequest, prompt: str | Shown, new_tokens: int, hand_over: Callable, stop: threading.Event
    ) -> None:
        """Run in a thread."""
        tokenizer = self.tasks.tokenizer
        with self.tasks.using(self._name(request)) as task:
            if request.seed is not None:
                torch.manual_seed(request.seed)
            writer = _Writer(tokenizer, request.stops, task.stop, hand_over, stop)
            answer(
                self.tasks.model,
                tokenizer,
                [prompt],
                new_tokens,
                task.stop,
                sampling=request.sampling,
                streamer=writer,
                stopping=StoppingCriteriaList([_Flag(stop)]),
            )
        writer.finish()


class _Flag(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids, scores, **_unused):
        return torch.full((input_ids.shape[0],), self.stop.is_set(), device=input_ids.device)


class _Writer(BaseStreamer):
    """Turns tokens into text as they come; holds back cut characters and what may become a stop text."""

    def __init__(self, tokenizer, stops, end_tokens, hand_over, stop):
        self.tokenizer, self.stops, self.end_tokens = tokenizer, stops, set(end_tokens)
        self.hand_over, self.stop = hand_over, stop
        self.prompt_tokens, self.tokens, self.written, self.stopped = None, [], 0, False

    def put(self, value) -> None:
        """Take the prompt, then every new token."""
        ids = value.flatten().tolist()
        if self.prompt_tokens is None:
            self.prompt_tokens = len(ids)
            return
        if self.stopped:
            return
        self.tokens += ids
        text = self._text()
        if places := [place for mark in self.stops if (place := text.find(mark)) >= 0]:
            self.stopped = True
            self.stop.set()
            self._write(text[: min(places)])
            return
        self._write(text[: self._safe_length(text)])

    def end(self) -> None:
        """Do nothing: ``finish`` says why it ended."""

    def finish(self) -> None:
        """Write what was held back, and why the answer ended."""
        if not self.stopped:
            self._write(self._text())
        ended = self.stopped or (self.tokens and self.tokens[-1] in self.end_tokens)
        reason = "stop" if ended else "length"
        self.hand_over(Piece("", reason, self.prompt_tokens or 0, len(self.tokens)))

    @tokenizer_faults()
    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _safe_length(self, text: str) -> int:
        kept = len(text.rstrip(UNFINISHED))
        for mark in self.stops:
            for length in range(min(len(mark) - 1, len(text)), 0, -1):
                if text.endswith(mark[:length]):
                    kept = min(kept, len(text) - length)
                    break
        return kept

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.hand_over(Piece(text[self.written :]))
            self.written = len(text)
