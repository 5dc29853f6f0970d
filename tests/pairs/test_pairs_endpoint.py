"""The endpoint engine: what it sends and reads, and what comes of faults."""

import base64
import io
import json
import time

import numpy as np
import pytest
from fake_endpoint import KEY, Endpoint, completion, engine_at, good, picture, say
from PIL import Image

from realign.pairs.engines import Chat, Reply, endpoint, wire
from realign.pairs.engines.wire import data_url


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key of the machine that runs the tests."""
    for name in ("REALIGN_API_KEY", "OPENAI_API_KEY", "REALIGN_VLLM_PYTHON"):
        monkeypatch.delenv(name, raising=False)


def test_what_an_endpoint_gets(monkeypatch):
    monkeypatch.setenv("REALIGN_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    image = picture()
    with Endpoint(good(" a dog \n", "length")) as server:
        engine = engine_at(server)
        greedy, sampled = engine.chat([say("what?", image), say("hm", temperature=0.5, seed=3)])
        assert greedy == sampled == Reply("a dog", cut=True)
        bodies = {len(r[2]["messages"][0]["content"]): r for r in server.requests}
    path, headers, body = bodies[2]  # two characters, or an image and a text
    both = [r[2] for r in server.requests]
    seen = next(b for b in both if isinstance(b["messages"][0]["content"], list))
    text = next(b for b in both if isinstance(b["messages"][0]["content"], str))
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    kind, data = seen["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), image)
    seen["messages"][0]["content"].pop(0)
    assert seen == {
        "model": "some/model:x",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]}],
        "max_tokens": 256,
        "temperature": 0.0,
    }
    assert text["messages"][0]["content"] == "hm"
    assert text["temperature"] == 0.5 and text["seed"] == 3


def test_large_images_are_sent_as_jpeg_of_at_most_2048_pixels():
    head, data = data_url(picture((2100, 700))).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG"
    assert image.size == (2048, 683)


def test_replies_keep_the_order_of_the_requests_and_equal_ones_are_sent_once():
    def echo(request):
        text = request[2]["messages"][0]["content"]
        time.sleep(0.05 if text == "0" else 0)
        return completion(f"<{text}>")

    with Endpoint((200, {}, echo)) as server:
        asked = [say(str(i % 5)) for i in range(12)]
        replies = engine_at(server).chat(asked)
        assert [r.text for r in replies] == [f"<{i % 5}>" for i in range(12)]
        assert len(server.requests) == 5


def test_answers_in_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]
    with Endpoint(good(parts)) as server:
        assert engine_at(server).chat([say("?")]) == [Reply("a dog")]


def test_a_server_that_wants_the_new_name_of_max_tokens_gets_it():
    refusal = {"error": {"message": "'max_tokens' is no more. Use 'max_completion_tokens'."}}
    with Endpoint((400, {}, refusal), good()) as server:
        engine = engine_at(server, tries=1, concurrency=1)
        assert [r.text for r in engine.chat([say("a"), say("b")])] == ["a dog", "a dog"]
        sent = [r[2] for r in server.requests]
    assert [("max_tokens" in s, s.get("max_completion_tokens")) for s in sent] == [
        (True, None),
        (False, 256),
        (False, 256),
    ]


def test_after_429_the_request_is_sent_again_when_the_server_says():
    with Endpoint((429, {"Retry-After": "0.3"}, "slow down"), good()) as server:
        assert engine_at(server).chat([say("a")]) == [Reply("a dog")]
        assert len(server.requests) == 2
        assert 0.29 < server.times[1] - server.times[0] < 2


def test_a_pause_holds_for_all_requests():
    with Endpoint((429, {"Retry-After": "0.4"}, ""), good()) as server:
        engine = engine_at(server, concurrency=1)
        engine.chat([say("a"), say("b"), say("c")])
        gaps = np.diff(server.times)
    assert gaps[0] > 0.39 and len(gaps) == 3


def test_waits_grow(monkeypatch):
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: 1.0)
    with Endpoint((503, {}, "")) as server:
        (reply,) = engine_at(server, tries=4, first_wait=0.05).chat([say("a")])
        gaps = np.diff(server.times)
    assert "no answer in 4 tries" in reply.error and "503" in reply.error
    for gap, wait in zip(gaps, (0.05, 0.1, 0.2), strict=True):
        assert wait - 0.01 < gap < wait + 0.15


def test_500_for_ever_is_an_error_of_the_reply():
    with Endpoint((500, {}, "out of order")) as server:
        (reply,) = engine_at(server, tries=3).chat([say("a")])
        assert reply == Reply("", "no answer in 3 tries; the last: HTTP status 500: out of order")
        assert len(server.requests) == 3


def test_silence_and_an_endless_answer_end_at_the_time_limit():
    def endless(_):
        for _ in range(100):
            time.sleep(0.03)
            yield b" "

    for script in ((200, {}, 30.0), (200, {}, endless)):
        with Endpoint(script) as server:
            start = time.monotonic()
            (reply,) = engine_at(server, tries=2, timeout=0.15).chat([say("a")])
            assert time.monotonic() - start < 2
            assert reply.error.endswith("no answer within 0.15 s")
            assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        "<html>Welcome</html>",
        '{"choices": [{"message": {"content": "a d',
        "",
        "[]",
        "null",
        "{}",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 7}}]}',
        '{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        '{"choices": [{"message": {"content": "  "}}]}',
        '{"error": {"message": "no such model"}}',
        "[" * 100_000,
        "\xff\x00",
    ],
)
def test_nonsense_is_an_error_of_the_reply_and_asked_once(body, tmp_path):
    with Endpoint((200, {}, body)) as server:
        (reply,) = engine_at(server, folder=tmp_path).chat([say("a")])
        assert reply.error.startswith("the answer is ") and reply.text == ""
        assert len(server.requests) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_refusal_is_an_error_with_its_words():
    message = {"content": None, "refusal": "I will not."}
    with Endpoint((200, {}, {"choices": [{"message": message}]})) as server:
        assert engine_at(server).chat([say("a")])[0].error == "the model refuses: I will not."


def test_an_answer_without_bounds_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(wire, "_MOST_BYTES", 10_000)
    with Endpoint((200, {}, lambda _: iter([b" " * 9000] * 100))) as server:
        (reply,) = engine_at(server).chat([say("a")])
        assert reply.error == "the answer is longer than 10000 bytes"
        assert len(server.requests) == 1


def test_an_answer_cut_off_on_its_way_is_asked_again():
    cut = (200, {"Content-Length": "5000"}, json.dumps(completion("a dog")))
    with Endpoint(cut, good("a cat")) as server:
        assert engine_at(server, timeout=1.0).chat([say("a")]) == [Reply("a cat")]


def test_one_bad_request_does_not_touch_the_others():
    def picky(request):
        return "{}" if request[2]["messages"][0]["content"] == "b" else completion("fine")

    with Endpoint((200, {}, picky)) as server:
        replies = engine_at(server).chat([say("a"), say("b"), Chat([]), say("\ud800 c")])
    assert [bool(r.error) for r in replies] == [False, True, True, False]


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_request_is_not_repeated(status):
    with Endpoint((status, {}, "no")) as server:
        assert f"HTTP status {status}: no" in engine_at(server).chat([say("a")])[0].error
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, "who?"), "refuses the key"),
        ((404, {}, ""), "no such path or model"),
        ((307, {"Location": "http://127.0.0.1:9/v1"}, ""), "redirects to .*not followed"),
        ((302, {"Location": "https://elsewhere.example/"}, ""), "redirects to .*not followed"),
    ],
)
def test_what_every_request_would_get_ends_the_run(answer, words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint(answer) as server, pytest.raises(ValueError, match=words):
        engine_at(server).chat([say(str(i)) for i in range(30)])


def test_a_redirect_takes_no_request_and_no_key_elsewhere(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint(good()) as other, Endpoint((308, {"Location": other.url}, "")) as server:
        with pytest.raises(ValueError, match="redirects"):
            engine_at(server).chat([say("a")])
        assert other.requests == []


def test_an_endpoint_that_is_gone_ends_the_run_and_answers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "GIVE_UP", 6)
    with Endpoint(good()) as server:
        engine = engine_at(server, folder=tmp_path, tries=2)
        assert engine.chat([say("a")]) == [Reply("a dog")]
    with pytest.raises(ConnectionError, match="not answered 6 tries in a row"):
        engine.chat([say("a"), *(say(str(i)) for i in range(9))])
    assert engine.chat([say("a")]) == [Reply("a dog")]


def test_a_wait_of_a_day_is_not_waited_for():
    refusal = pytest.raises(ConnectionError, match="asks to wait 86400 s")
    with Endpoint((429, {"Retry-After": "86400"}, "quota")) as server, refusal:
        engine_at(server).chat([say("a")])


def test_retry_after_may_be_a_date():
    refusal = pytest.raises(ConnectionError, match="asks to wait")
    with Endpoint((503, {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, "")) as server, refusal:
        engine_at(server).chat([say("a")])
    for past in ("Mon, 01 Jan 2001 00:00:00 GMT", "nonsense"):
        with Endpoint((503, {"Retry-After": past}, ""), good()) as server:
            assert engine_at(server).chat([say("a")]) == [Reply("a dog")]


def test_the_rate_limit_spaces_requests_out():
    with Endpoint(good()) as server:
        engine = engine_at(server, requests_per_minute=600)
        engine.chat([say(str(i)) for i in range(4)])
        engine.chat([say("later")])
        gaps = np.diff(server.times)
    assert len(gaps) == 4 and gaps.min() > 0.08  # 0.1 s, less the way to the server


def test_half_a_character_is_a_bad_reply():
    body = b'{"choices": [{"message": {"content": "a \\ud83d b"}}]}'
    assert wire.parse_answer(wire.Answer(200, body)) == Reply(
        "", "the answer holds half a character"
    )
    whole = body.replace(b"\\ud83d", b"\\ud83d\\ude00")
    assert wire.parse_answer(wire.Answer(200, whole)).text == "a \U0001f600 b"
