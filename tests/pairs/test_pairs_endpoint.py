"""Endpoint engine: requests, replies, and faults of servers and networks."""

import base64
import gzip
import io
import json
import re
import sys
import time
from email.utils import formatdate

import numpy as np
import pytest
from fake_endpoint import KEY, Endpoint, chat_of, completion, engine_at, good, random_image
from PIL import Image

from realign.pairs.engines import ENGINES, Chat, Reply, deadline, make_engine
from realign.pairs.engines.endpoint import data_url, parse_answer


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Removes keys of this machine from the environment, and shortens waits between tries."""
    for name in ("REALIGN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("realign.pairs.engines.endpoint._FIRST_WAIT", 0.01)


def test_the_request_is_that_of_the_chat_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("REALIGN_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    # The client reads these variables, which would send images or names to other hosts.
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "a-name")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer a-name\nX-Team: a-name")
    image = random_image()
    with Endpoint(good(" a dog \n", "length")) as server:
        greedy = engine_at(server).chat([chat_of("what?", image)])
        sampled = engine_at(server).chat([chat_of("hm", temperature=0.5, seed=3)])
    assert greedy == sampled == [Reply("a dog", cut=True)]
    (path, headers, seen), (_, _, text) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert "a-name" not in str(headers)
    kind, data = seen["messages"][0]["content"].pop(0)["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), image)
    assert seen == {
        "model": "some/model:x",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]}],
        "max_tokens": 256,
        "temperature": 0.0,
    }
    assert text["messages"][0]["content"] == "hm"
    assert text["temperature"] == 0.5 and text["seed"] == 3


def test_large_images_are_sent_as_jpeg_of_at_most_2048_pixels():
    head, data = data_url(random_image((2100, 700))).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG"
    assert image.size == (2048, 683)


def test_replies_keep_the_order_equal_requests_are_sent_once_and_a_bad_one_spares_the_others():
    def echo(request):
        text = request[2]["messages"][0]["content"]
        time.sleep(0.05 if text == "0" else 0)
        return "{}" if text == "3" else completion(f"<{text}>")

    with Endpoint((200, {}, echo)) as server:
        asked = [chat_of(str(i % 5)) for i in range(12)] + [Chat([]), chat_of("\ud800 c")]
        replies = engine_at(server).chat(asked)
    assert [r.text for r in replies[:12]] == ["" if i % 5 == 3 else f"<{i % 5}>" for i in range(12)]
    assert [bool(r.error) for r in replies[:5]] == [False, False, False, True, False]
    assert replies[12].error and replies[13].error == "the answer contains half of a surrogate pair"
    assert len(server.requests) == 6


def test_a_server_that_wants_the_new_name_of_max_tokens_gets_it():
    refusal = {"error": {"message": "'max_tokens' is no more. Use 'max_completion_tokens'."}}
    with Endpoint((400, {}, refusal), good()) as server:
        engine = engine_at(server, tries=1, concurrency=1)
        assert [r.text for r in engine.chat([chat_of("a"), chat_of("b")])] == ["a dog", "a dog"]
    sent = [(r[2].get("max_tokens"), r[2].get("max_completion_tokens")) for r in server.requests]
    assert sent == [(256, None), (None, 256), (None, 256)]


def test_after_429_the_request_is_sent_again_when_the_server_says():
    with Endpoint((429, {"Retry-After": "0.3"}, "slow down"), good()) as server:
        assert engine_at(server).chat([chat_of("a")]) == [Reply("a dog")]
    assert len(server.times) == 2 and 0.29 < server.times[1] - server.times[0] < 2


def test_a_failure_for_ever_is_an_error_of_the_reply():
    with Endpoint((500, {}, "out of order")) as server:
        (reply,) = engine_at(server, tries=3).chat([chat_of("a")])
        expected = "no answer in up to 3 tries (the last: HTTP status 500: out of order)"
        assert reply == Reply("", expected) and len(server.requests) == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "86400"}, "86400"),
        ({"Retry-After": "1", "Retry-After-Ms": "121000"}, "121"),
        ({"Retry-After": "in a day"}, r"86[34]\d\d(\.\d)?"),
    ],
)
def test_a_wait_longer_than_two_minutes_is_named_and_not_waited_for(headers, seconds):
    if headers["Retry-After"] == "in a day":  # a date, computed when the test runs
        headers = {"Retry-After": formatdate(time.time() + 86400, usegmt=True)}
    with Endpoint((429, headers, "quota")) as server:
        (reply,) = engine_at(server).chat([chat_of("a")])
    expected = (
        f"the server asks to wait {seconds} s, more than the limit of 120 s; HTTP status 429: quota"
    )
    assert re.fullmatch(expected, reply.error) and len(server.requests) == 1


def test_silence_and_an_endless_answer_end_at_the_time_limit():
    def endless(_):
        for _ in range(100):
            time.sleep(0.03)
            yield b" "

    for script in ((200, {}, 30.0), (200, {}, endless)):
        with Endpoint(script) as server:
            start = time.monotonic()
            (reply,) = engine_at(server, tries=2, timeout=0.15).chat([chat_of("a")])
            assert time.monotonic() - start < 2
            assert reply.error.endswith("no answer within 0.15 s)")
            assert len(server.requests) == 2


def test_an_answer_without_bounds_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(deadline, "MOST_BYTES", 10_000)
    with Endpoint((200, {}, lambda _: iter([b" " * 9000] * 100))) as server:
        (reply,) = engine_at(server).chat([chat_of("a")])
        assert reply.error == "the answer is longer than 10000 bytes"
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [200, 403])
def test_a_compressed_answer_is_not_expanded(status):
    body = gzip.compress(b" " * 20 * 2**20)  # 20 kB, or 20 MiB when decompressed
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(body))}
    with Endpoint((status, headers, lambda _: iter([body]))) as server:
        (reply,) = engine_at(server).chat([chat_of("a")])
    words = {200: "the answer has the unsupported Content-Encoding 'gzip'"}
    assert reply == Reply("", words.get(status, f"HTTP status {status}"))
    assert len(server.requests) == 1 and server.requests[0][1]["Accept-Encoding"] == "identity"


def test_an_answer_cut_off_on_its_way_is_asked_again():
    cut = (200, {"Content-Length": "5000"}, json.dumps(completion("a dog")))
    with Endpoint(cut, good("a cat")) as server:
        assert engine_at(server, timeout=1.0).chat([chat_of("a")]) == [Reply("a cat")]


@pytest.mark.parametrize(
    "body",
    [
        "<html>Welcome</html>",
        '{"choices": [{"message": {"content": "a d',
        "",
        "[]",
        "null",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 7}}]}',
        '{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        '{"choices": [{"message": {"content": "  "}}]}',
        '{"error": {"message": "no such model"}}',
        '{"choices": [{"message": {"content": "a \\ud83d b"}}]}',
        "[" * 100_000,
        "\xff\x00",
    ],
)
def test_nonsense_is_an_error_of_the_reply(body):
    reply = parse_answer(body.encode("latin-1"))
    assert reply.error.startswith("the answer ") and reply.text == ""


def test_what_a_server_writes_instead_of_text_is_read():
    message = {"content": None, "refusal": "I will not."}
    body = json.dumps({"choices": [{"message": message}]}).encode()
    assert parse_answer(body).error == "the model refuses: I will not."
    for reason in ("content_filter", "length"):  # not whole
        half = json.dumps(completion("A half sent", reason)).encode()
        assert parse_answer(half) == Reply("A half sent", cut=True)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "\U0001f600"}]
    assert parse_answer(json.dumps(completion(parts)).encode()) == Reply("a \U0001f600")


def test_a_refused_request_is_not_repeated_and_not_kept(tmp_path):
    statuses = (400, 403, 413, 422)
    with Endpoint(*((status, {}, "no") for status in statuses), (200, {}, "<html>")) as server:
        engine = engine_at(server, folder=tmp_path)
        for status in statuses:
            assert f"HTTP status {status}: no" in engine.chat([chat_of("a")])[0].error
        assert "not a chat completion: '<html>'" in engine.chat([chat_of("a")])[0].error
        assert len(server.requests) == 5 and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, "who?"), "rejects the key"),
        ((404, {}, ""), "no such path or model"),
        ((302, {"Location": "https://elsewhere.example/"}, ""), "redirects to .*not followed"),
    ],
)
def test_what_every_request_would_get_ends_the_run(answer, words):
    with Endpoint(answer) as server, pytest.raises(ValueError, match=words):
        engine_at(server).chat([chat_of(str(i)) for i in range(30)])


def test_a_redirect_takes_no_request_and_no_key_elsewhere(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint(good()) as other, Endpoint((308, {"Location": other.url}, "")) as server:
        with pytest.raises(ValueError, match="redirects"):
            engine_at(server).chat([chat_of("a")])
        assert other.requests == []


def test_an_endpoint_that_is_gone_ends_the_run_and_answers_are_kept(tmp_path):
    with Endpoint(good()) as server:
        engine = engine_at(server, folder=tmp_path, tries=2)
        assert engine.chat([chat_of("a")]) == [Reply("a dog")]
    with pytest.raises(ConnectionError, match="not answered 8 consecutive requests.*Connect"):
        engine.chat([chat_of("a"), *(chat_of(str(i)) for i in range(9))])
    assert engine.chat([chat_of("a")]) == [Reply("a dog")]


def test_the_rate_limit_spaces_requests_out_repeated_ones_included():
    with Endpoint((500, {}, ""), good()) as server:
        engine = engine_at(server, requests_per_minute=600)
        engine.chat([chat_of(str(i)) for i in range(3)])
        engine.chat([chat_of("later")])
        gaps = np.diff(server.times)
    assert len(gaps) == 4 and gaps.min() > 0.08  # 0.1 s, minus the latency


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(ValueError, match=f"port of the endpoint's URL is {port};"):
        make_engine(f"https://host.example:{port}/v1#m")
    make_engine("https://host.example:65535/v1#m")


def test_a_missing_client_and_vllm_in_this_process_name_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="`vllm serve MODEL.*http://127.0.0.1:8000/v1#MODEL"):
        make_engine("vllm:m")
    assert set(ENGINES) == {"transformers", "http", "https"}
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "realign.pairs.engines.endpoint")
    with pytest.raises(ValueError, match=r"pip install 'realign\[endpoint\]'"):
        make_engine("https://host.example/v1#m")
