"""The server, asked by the real OpenAI client, and by clients that mean no good."""

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import openai
import pytest
import torch
from tiny_files import save_tiny
from tiny_runs import make_run, prompt_tuned

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.probe import TakesTooMuchError
from qlora_lite.ext.serve.app import MAX_CONNECTIONS, Limits, build_app, http_server
from qlora_lite.ext.serve.engine import Engine
from qlora_lite.ext.serve.requests import ApiError, read_request
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.multi_adapter import open_tasks

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3?"}]
TURNS = [Turn("system", "Be brief."), Turn("user", "3?")]
LIMITS = Limits(body_bytes=20_000, waiting=1, new_tokens=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model")
    lora = {"rank": 8, "alpha": 64}
    return [
        make_run(folder / name, folder / "model", seed=seed, lora=lora).rename(folder / f"{name}-run")
        for seed, name in enumerate(("french", "german"))
    ]


@contextmanager
def serving(runs):
    """A server in a thread; gives its port, the tasks it serves, and itself."""
    tasks = open_tasks(runs)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    running = http_server(build_app(tasks, LIMITS))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield listener.getsockname()[1], tasks, running
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def server(runs):
    """The port of a server, and the tasks it serves."""
    with serving(runs) as (port, tasks, _):
        yield port, tasks


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(runs, name, tokens=12):
    session = open_session(next(run for run in runs if run.name == name), max_new_tokens=tokens)
    session.turns = list(TURNS)
    return session.reply()


def test_the_models_are_the_runs_and_the_bare_base(client):
    assert [model.id for model in client.models.list()] == ["french-run", "german-run", "base"]
    assert client.models.retrieve("german-run").owned_by == "qlora-lite"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("greek")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["french-run", "german-run"])
def test_the_model_s_name_selects_the_adapter(client, runs, name):
    reply = client.chat.completions.create(model=name, messages=ASKED)
    text = expected(runs, name)
    assert reply.choices[0].message.content == text and reply.model == name
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.completion_tokens, reply.usage.total_tokens - reply.usage.prompt_tokens) == (12, 12)
    base = client.chat.completions.create(model="base", messages=ASKED)
    assert base.choices[0].message.content != text


def test_a_stream_gives_the_same_text_in_pieces(client, runs):
    stream = client.chat.completions.create(
        model="french-run", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected(runs, "french-run") and len(pieces) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_and_stop_texts_end_an_answer(client, runs):
    text = expected(runs, "german-run")
    short = client.chat.completions.create(model="german-run", messages=ASKED, max_tokens=5)
    assert short.usage.completion_tokens == 5 and text.startswith(short.choices[0].message.content.rstrip("\ufffd"))
    mark = text[3:5]
    for stream in (False, True):
        reply = client.chat.completions.create(model="german-run", messages=ASKED, stop=[mark, "qqqqqq"], stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in reply]
            said, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
        else:
            said, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert (said, reason) == (text[: text.find(mark)], "stop")


def test_sampling_follows_the_seed(client):
    def draw(seed):
        reply = client.chat.completions.create(model="base", messages=ASKED, temperature=2, top_p=0.9, seed=seed)
        return reply.choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_temperature_next_to_zero_is_zero(client):
    def answer(temperature):
        reply = client.chat.completions.create(model="base", messages=ASKED, temperature=temperature)
        return reply.choices[0].message.content

    assert answer(1e-300) == answer(0)


def test_text_parts_are_joined_and_developer_messages_are_system_messages(client, runs):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "3?"}]},
    ]
    reply = client.chat.completions.create(model="french-run", messages=parts)
    assert reply.choices[0].message.content == expected(runs, "french-run")


def test_what_asks_for_nothing_or_changes_no_answer_is_taken_as_clients_send_it_unasked(client, runs):
    nothing = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "top_logprobs": 0,
        "logit_bias": {},
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "guided_json": None,
        "response_format": {"type": "text"},
        "chat_template_kwargs": {},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "stop": None,
        "seed": None,
        "reasoning_effort": None,
    }
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "priority": 1,
        "parallel_tool_calls": True,
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "keep_alive": "5m",
        "cache_prompt": True,
        "stream_options": None,
    }
    reply = client.chat.completions.create(model="french-run", messages=ASKED, extra_body=nothing | harmless)
    assert reply.choices[0].message.content == expected(runs, "french-run")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_p": -1}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_k": 40}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"top_a": 0.2}, "top_a"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"stop_token_ids": [2]}, "stop_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_a_bad_request_is_an_error_of_the_api_s_form_that_names_the_field(client, changes, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "base", "messages": ASKED} | {"extra_body": changes}))
    assert caught.value.param == param and caught.value.body["message"] and caught.value.type == "invalid_request_error"


def test_messages_for_which_the_template_takes_too_much_are_a_bad_request(client, monkeypatch):
    def take_too_much(*_):
        raise TakesTooMuchError("the chat template (model) takes more than 1 second of processor time")

    monkeypatch.setattr("qlora_lite.ext.serve.engine.render_prompt", take_too_much)
    with pytest.raises(openai.BadRequestError, match="1 second of processor time") as caught:
        client.chat.completions.create(model="base", messages=ASKED)
    assert caught.value.param == "messages"


def test_an_unknown_model_is_not_found_and_says_what_there_is(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="there are french-run, german-run, base") as caught:
            client.chat.completions.create(model="gpt-4o", messages=ASKED, stream=stream)
        assert caught.value.code == "model_not_found"


def raw(port, path="/v1/chat/completions", body=b"{}", host=None, kind="application/json", method="POST"):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body if method == "POST" else None, method=method
    )
    request.add_header("content-type", kind)
    if host:
        request.add_header("host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"body": b"{"}, 400),
        ({"body": b"[" * 10_000}, 400),
        ({"body": b"null"}, 400),
        ({"body": b"\xff"}, 400),
        ({"body": b"x" * 20_001}, 413),
        ({"kind": "text/plain"}, 415),
        ({"host": "evil.example"}, 403),
        ({"path": "/v1/models", "host": "evil.example:80", "method": "GET"}, 403),
        ({"path": "/v1/nothing"}, 404),
        ({"method": "GET"}, 405),
        ({"body": b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800x"}]}'}, 400),
        ({"path": "/v1/models/../../etc/passwd", "method": "GET"}, 404),
    ],
)
def test_whatever_is_sent_the_error_has_the_api_s_form(server, options, status):
    found, body = raw(server[0], **options)
    assert found == status and body["error"].keys() == {"message", "type", "param", "code"}


def status_of(connection):
    """Return the status of the next answer on a connection, and close it."""
    with connection, connection.makefile("rb") as file:
        return int(file.readline().split()[1])


@pytest.mark.parametrize(
    "host",
    [
        "a{b}.evil.example",
        'a"b.evil',
        "a`b.evil",
        "evil.example:",
        "[::1",
        "127.0.0.1@evil.example",
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost:80:80",
        "127.0.0.1:123456",
        "[::1]evil",
        "localhost.",
        "127.0.0.1, evil.example",
    ],
)
def test_a_host_that_is_not_one_of_its_own_is_refused(server, host):
    assert status_of(send(server[0], "GET /v1/models HTTP/1.1", headers=(f"host: {host}",))) == 403
    assert status_of(send(server[0], "POST /v1/nothing HTTP/1.1", headers=(f"host: {host}",))) == 403


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        ("1.1", (), 400),
        ("1.0", (), 403),
        ("1.1", ("host: 127.0.0.1", "host: evil.example"), 400),
        ("1.1", ("host: LOCALHOST:1",), 200),
        ("1.1", ("host: [::1]:8000",), 200),
        ("1.0", ("host: 127.0.0.1",), 200),
    ],
)
def test_there_is_one_host_and_any_port(server, version, headers, status):
    assert status_of(send(server[0], f"GET /v1/models HTTP/{version}", headers=headers)) == status


@pytest.mark.parametrize(
    ("origins", "status"),
    [
        (("http://localhost:8000",), 200),
        (("https://LOCALHOST:8000",), 200),
        ((), 200),
        (("http://localhost",), 403),
        (("http://127.0.0.1:8000",), 403),
        (("https://evil.example",), 403),
        (("null",), 403),
        (("",), 403),
        (("http://localhost:8000", "https://evil.example"), 403),
    ],
)
def test_pages_of_another_origin_are_refused(server, origins, status):
    headers = ("host: localhost:8000", *(f"origin: {origin}" for origin in origins))
    assert status_of(send(server[0], "GET /v1/models HTTP/1.1", headers=headers)) == status


def test_a_media_type_has_no_case_and_may_have_parameters(server):
    assert raw(server[0], kind="APPLICATION/JSON; Charset=UTF-8")[1]["error"]["param"] == "model"


@contextmanager
def held_forward(model):
    """Hold the model's first forward; yields its calls, the event that says it has begun, and the one to let it go."""
    calls, held, go = [], threading.Event(), threading.Event()
    whole = model.forward

    def slow(*args, **kwargs):
        calls.append(0)
        held.set()
        go.wait(20)
        return whole(*args, **kwargs)

    model.forward = slow
    try:
        yield calls, held, go
    finally:
        del model.forward
        go.set()


def send(port, head, body=b"", headers=("host: 127.0.0.1",)):
    """Send what may be half a request; return the open connection."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall("\r\n".join((head, *headers, "", "")).encode("latin-1") + body)
    return connection


def post_chat(port, **options):
    body = json.dumps({"model": "base", "messages": ASKED} | options).encode()
    headers = ("host: 127.0.0.1", "content-type: application/json", f"content-length: {len(body)}")
    return send(port, "POST /v1/chat/completions HTTP/1.1", body, headers)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_left_stops_at_the_next_token(server, client, stream):
    port, tasks = server
    with held_forward(tasks.model) as (calls, held, go):
        with post_chat(port, stream=stream):
            assert held.wait(20)
        client.models.list()  # the server has seen that the other client left
        go.set()
        reply = client.chat.completions.create(model="base", messages=ASKED, max_tokens=1)
    assert reply.usage.completion_tokens == 1 and len(calls) <= 3, "one or two of 12 tokens, and the other answer's"


def test_a_client_that_leaves_the_line_frees_its_place(server, client):
    port, tasks = server
    with held_forward(tasks.model) as (_, held, go), post_chat(port), ThreadPoolExecutor() as pool:
        assert held.wait(20)
        post_chat(port).close()
        client.models.list()
        waiting = pool.submit(client.chat.completions.create, model="base", messages=ASKED, max_tokens=1)
        client.models.list()
        go.set()
        assert waiting.result(20).usage.completion_tokens == 1


def test_a_server_that_is_stopped_ends_its_answer_and_refuses_those_that_wait(runs):
    with serving(runs) as (port, tasks, running), held_forward(tasks.model) as (_, held, go):
        engine = running.config.app.state.engine
        with post_chat(port) as answered, post_chat(port) as waiting:
            assert held.wait(20)
            while engine._inside < 2:
                time.sleep(0.01)
            running.should_exit = True
            while not engine._is_closed:
                time.sleep(0.01)
            go.set()
            assert answered.makefile("rb").read().count(b'"completion_tokens":1,') == 1
            assert b"503" in waiting.makefile("rb").readline()


def test_without_its_extra_the_command_says_how_to_install_it(command, monkeypatch):
    monkeypatch.delitem(sys.modules, "qlora_lite.ext.serve.app")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, out, err = command("serve", "nowhere")
    assert (code != 0, out) == (True, "") and err.count("\n") == 1
    assert re.match(r"error: serve needs uvicorn: pip install 'starlette\S+ 'uvicorn\S+$", err)


def test_a_client_that_leaves_amid_its_request_leaves_no_trace_in_the_log(server, client, caplog, monkeypatch):
    for name in ("uvicorn", "qlora_lite"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    send(
        server[0],
        "POST /v1/chat/completions HTTP/1.1",
        b"{",
        (
            "host: 127.0.0.1",
            "content-type: application/json",
            "content-length: 100",
        ),
    ).close()
    post_chat(server[0]).close()
    client.chat.completions.create(model="base", messages=ASKED, max_tokens=1)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"],
        [
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n",
            b"content-length: 9\r\n\r\n{",
        ],
        [b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n", b"G"],
    ],
    ids=["nothing", "half a header", "half a body", "half a second request"],
)
def test_connections_that_bring_no_request_lock_nobody_out(server, monkeypatch, parts):
    port = server[0]
    monkeypatch.setattr("qlora_lite.ext.serve.app.REQUEST_SECONDS", 0.8)
    with ExitStack() as idle:
        for _ in range(MAX_CONNECTIONS):
            connection = idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for part in parts:
                connection.sendall(part)
                time.sleep(0.005)  # of many requests at once, those that are over the limit are refused and closed
        deadline, status = time.monotonic() + 8, None
        while status != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
            status = status_of(send(port, "GET /v1/models HTTP/1.1"))
        assert status == 200


def test_a_slow_answer_is_not_cut_off_as_a_connection_without_request(server, monkeypatch):
    monkeypatch.setattr("qlora_lite.ext.serve.app.REQUEST_SECONDS", 0.2)
    with held_forward(server[1].model) as (_, held, go):
        connection = post_chat(server[0], max_tokens=1)
        assert held.wait(20)
        time.sleep(0.5)
        go.set()
        assert status_of(connection) == 200


def test_requests_beyond_the_line_are_refused_and_the_line_empties(server, client):
    long = {"model": "base", "messages": ASKED}
    outcomes = []

    def ask():
        try:
            outcomes.append(client.chat.completions.create(**long).choices[0].finish_reason)
        except openai.RateLimitError as error:
            outcomes.append(error.code)

    with held_forward(server[1].model) as (_, held, go):
        threads = [threading.Thread(target=ask) for _ in range(5)]
        threads[0].start()
        assert held.wait(20)
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 20
        while len(outcomes) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert outcomes == ["too_many_requests"] * 3, "one is answered, one waits"
        go.set()
        for thread in threads:
            thread.join(20)
    assert sorted(outcomes) == ["length", "length"] + ["too_many_requests"] * 3
    assert client.chat.completions.create(**long).choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_too_long_for_the_memory_is_an_error_of_its_own_and_the_next_is_answered(
    server, client, runs, monkeypatch, stream
):
    def generate(**_options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched, pytest.raises(openai.BadRequestError, match="--context-tokens") as caught:
        patched.setattr(server[1].model, "generate", generate)
        client.chat.completions.create(model="base", messages=ASKED, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    reply = client.chat.completions.create(model="french-run", messages=ASKED)
    assert reply.choices[0].message.content == expected(runs, "french-run")


def test_memory_that_runs_out_amid_a_stream_is_the_same_error(server, client, monkeypatch):
    whole, calls = server[1].model.forward, []

    def run_out(*args, **kwargs):
        calls.append(0)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*args, **kwargs)

    monkeypatch.setattr(server[1].model, "forward", run_out)
    stream = client.chat.completions.create(model="base", messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match="--context-tokens") as caught:
        list(stream)
    assert caught.value.code == "context_length_exceeded" and len(calls) == 4


def test_an_answer_takes_what_the_prompt_and_virtual_tokens_leave_of_the_model_s_length(tmp_path):
    engine = Engine(open_tasks(prompt_tuned(tmp_path, n_positions=128, virtual_tokens=20)), 1)

    async def answered(content):
        body = {"model": "out", "messages": [{"role": "user", "content": content}]}
        return [piece async for piece in engine.pieces(read_request(body, 512))][-1]

    last = asyncio.run(answered("3?"))
    assert last.finish == "length" and last.prompt_tokens + last.answer_tokens == 128
    with pytest.raises(ApiError, match=r"^the messages have 128 tokens, and the model takes 128 with the answer$"):
        asyncio.run(answered("3?" + "." * last.answer_tokens))


def test_a_client_that_leaves_a_stream_frees_its_place(client, runs):
    for _ in range(3):
        stream = client.chat.completions.create(model="base", messages=ASKED, stream=True)
        next(iter(stream))
        stream.close()
    reply = client.chat.completions.create(model="french-run", messages=ASKED)
    assert reply.choices[0].message.content == expected(runs, "french-run")


def test_the_command_listens_on_this_machine_only_and_says_what_it_is_for(runs, command):
    serve = "serve", *map(str, runs), "--port"
    process = subprocess.Popen([sys.executable, "-m", "qlora_lite", *serve, "0"], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert "serving french-run, german-run, base on http://127.0.0.1:" in line
        assert "use vLLM or Ollama in production" in process.stderr.readline()
        port = int(line.rsplit(":", 1)[1].split("/")[0])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                status, body = raw(port, "/v1/models", method="GET")
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        assert status == 200 and len(body["data"]) == 3
        code, _, err = command(*serve, port)
        assert code == 2 and f"error: cannot listen on 127.0.0.1:{port}" in err and "choose another --port" in err
        code, _, err = command(*serve, 0, "--host", "999.1.1.1")
        assert code == 2 and "choose another --host" in err
    finally:
        process.terminate()
        process.communicate(timeout=20)
