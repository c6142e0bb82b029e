"""Read a chat request of the OpenAI API, and write its errors in the API's own form.

What would change the answer and is not done here (tools, several choices, penalties, a response format) is refused by
name, what other servers of this API have added to it included. What does not (`user`, `metadata`, ...) is ignored, as
clients send it unasked.
Source: the API reference of /v1/chat/completions; the additions of vLLM, llama.cpp, Ollama and other servers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.picture_files import picture_bytes
from qlora_lite.data.picture_turns import MARK
from qlora_lite.errors import DataError, QloraLiteError
from qlora_lite.inference.generate import Sampling

MAX_MESSAGES, MAX_STOPS = 1000, 4
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL = {  # settings that are not done here -> the values beside null that ask for nothing
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    # of the older /v1/completions
    "prompt": ("",),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    # which tokens are drawn
    "top_k": (0, -1),
    "min_p": (0,),
    "top_a": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (0, -1),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "mirostat": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "do_sample": (),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "samplers": (),
    "options": ({},),
    # where the answer ends, and what is left of it
    "max_new_tokens": (),
    "max_length": (),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    # what form it has
    "format": ("",),
    "grammar": ("",),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "structural_tag": (),
    # how the prompt is written
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "truncate_prompt_tokens": (),
    "documents": ([],),
    "think": (),
    "thinking": (),
    "enable_thinking": (),
    "thinking_budget": (),
    "reasoning": (),
}


class ApiError(QloraLiteError):
    """Report a request that cannot be answered, with its HTTP status and the API's code for it.

    Args:
        param: the field that is wrong, if one is.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        """Return the error in the API's form."""
        kinds = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request whose every value is checked.

    Args:
        model: name of the adapter, or of the bare base.
        max_new_tokens: at most this many tokens are made.
        stops: texts that end the answer; they are not part of it.
        wants_usage: send the token counts at the end of a stream.
        pictures: files' bytes, for the marks (``data.picture_turns``) in the turns in order.
    """

    model: str
    turns: tuple[Turn, ...]
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    seed: int | None
    stream: bool
    wants_usage: bool
    pictures: tuple[bytes, ...]


def read_request(body: object, most_new_tokens: int) -> ChatRequest:
    """Check a decoded request.

    Args:
        most_new_tokens: of an answer; a request for more gets this many (its end is then called "length").

    Raises:
        ApiError: a value is missing, wrong, or asks for what is not done here.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "the request must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        if (value := body.get(name)) is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported here; leave it out", "unsupported_parameter", name)
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    asked = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
    most = _number(body[asked], asked, 1, None, int) if asked else most_new_tokens
    temperature = _number(body.get("temperature", 0), "temperature", 0, 2)
    top_p = _number(body.get("top_p", 1), "top_p", 0, 1)
    seed = body.get("seed")
    pictures: list[bytes] = []
    return ChatRequest(
        _text(body.get("model"), "model"),
        _turns(body.get("messages"), pictures),
        min(most, most_new_tokens),
        Sampling(temperature, top_p or 1e-6),
        _stops(body.get("stop")),
        None if seed is None else _number(seed, "seed", -(2**63), 2**63 - 1, int),
        _flag(body.get("stream"), "stream"),
        _flag(options.get("include_usage"), "stream_options.include_usage"),
        tuple(pictures),
    )


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} must be a non-empty string", param=name)
    return value


def _flag(value: object, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _number(value: object, name: str, least: float, most: float | None, kind: type = float):
    allowed = (int,) if kind is int else (int, float)
    is_number = isinstance(value, allowed) and not isinstance(value, bool)
    if value is None and kind is float:
        value, is_number = (1 if name == "top_p" else 0), True
    if not is_number or not least <= value or (most is not None and not value <= most):
        limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
        word = "a whole number" if kind is int else "a number"
        raise ApiError(400, f"{name} must be {word} {limits}", param=name)
    return kind(value)


def _stops(value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or len(listed) > MAX_STOPS or not all(isinstance(s, str) and s for s in listed):
        raise ApiError(400, f"stop must be a string or a list of up to {MAX_STOPS} strings", param="stop")
    return tuple(listed)


def _turns(messages: object, pictures: list[bytes]) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    turns = tuple(_turn(message, f"messages[{number}]", pictures) for number, message in enumerate(messages))
    if pictures and sum(turn.content.count(MARK) for turn in turns) != len(pictures):
        raise ApiError(400, "a text holds the character U+FFFC, which stands for a picture here", param="messages")
    if turns[-1].role != "user":
        raise ApiError(400, "the last message must be a user message", param="messages")
    return turns


def _turn(message: object, place: str, pictures: list[bytes]) -> Turn:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"{place}.role must be one of {', '.join(_ROLES)}", param=f"{place}.role")
    if message.get("tool_calls"):
        raise ApiError(400, f"{place}.tool_calls: tools are not supported here", "unsupported_parameter", place)
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, f"{place}.content", pictures if role == "user" else None)
    return Turn(_ROLES[role], _text(content, f"{place}.content"))


def _joined(parts: list, place: str, pictures: list[bytes] | None) -> str:
    """Return the text of parts, a line for each, and marks for pictures, which are added to those so far."""
    found = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image_url" and pictures is not None:
            pictures.append(_picture(part.get("image_url"), place))
            found += MARK
        elif kind == "text" and isinstance(part.get("text"), str):
            found += ("\n" if found and not found.endswith(MARK) else "") + part["text"]
        else:
            raise ApiError(400, f"{place} may have parts of type text, and a user's image_url", param=place)
    return found


def _picture(said: object, place: str) -> bytes:
    url = said.get("url") if isinstance(said, Mapping) else said
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ApiError(400, f"{place}: a picture must be a data: URL with base64; nothing is fetched", param=place)
    try:
        return picture_bytes(url)
    except DataError as error:
        raise ApiError(400, f"{place}: {error}", param=place) from None
