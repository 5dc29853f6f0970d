"""Endpoint engine: the key is sent in only one header, and no answer is paid for twice."""

import pickle

import pytest
from fake_endpoint import KEY, Endpoint, chat_of, engine_at, good, random_image

from realign.pairs.engines import Reply, make_engine
from realign.pairs.engines.endpoint import scrub


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Removes keys of this machine from the environment, and shortens waits between tries."""
    monkeypatch.setattr("realign.pairs.engines.endpoint._FIRST_WAIT", 0.01)
    for name in ("REALIGN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_the_key_is_sent_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("REALIGN_API_KEY", KEY)
    escaped = KEY.replace("/", "\\/")
    quoting = [
        (400, {}, f"bad key {KEY}"),
        (500, {}, f"Authorization: Bearer {KEY}"),
        (200, {}, f"<pre>{KEY}</pre>"),
        (200, {}, "x" * 92 + KEY),  # at the point where the message is truncated
        (200, {}, f'{{"choices": [{{"message": {{"content": "{escaped} {KEY}"}}}}]}}'),
        (401, {}, f"{KEY} is wrong"),
        (302, {"Location": f"http://127.0.0.1:9/?key={KEY}"}, ""),
    ]
    seen = []
    for answer in quoting:
        with Endpoint(answer) as server:
            engine = engine_at(server, folder=tmp_path, tries=2)
            try:
                seen.append(repr(engine.chat([chat_of("a")])))
            except ValueError as error:
                seen.append(str(error))
            assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
            seen += [repr(engine), repr(vars(engine)), repr(pickle.dumps(engine))]
            seen += [str(engine.estimate([chat_of("b")])), engine.name]
    seen += [file.read_text() for file in tmp_path.rglob("*.json")]
    seen += capfd.readouterr()
    assert len(list(tmp_path.rglob("*.json"))) == 1
    for text in seen:
        assert KEY not in text and KEY[:12] not in text


def test_without_a_key_none_is_sent():
    with Endpoint(good()) as server:
        engine_at(server).chat([chat_of("a")])
        assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("host", ["10.0.0.5:8000", "127.0.0.1.example.org", "gpu-box", "[::2]"])
def test_a_key_does_not_go_over_plain_http_to_another_machine(host, monkeypatch):
    spec = f"http://{host}/v1#m"
    make_engine(spec)  # without a key, plain HTTP is allowed
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="unencrypted.*https") as caught:
        make_engine(spec)
    assert KEY not in str(caught.value)
    for good_spec in ("http://127.0.0.1:1/v1#m", "http://localhost/v1#m", "http://[::1]/v1#m"):
        make_engine(good_spec)
    make_engine(f"https://{host}/v1#m")


def test_a_key_that_is_set_later_is_not_sent(monkeypatch):
    engine = make_engine("http://gpu-box.invalid/v1#m", tries=1)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="unencrypted"):
        engine.chat([chat_of("a")])


def test_a_key_with_a_line_break_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="characters that are not allowed in a key") as caught:
        make_engine("https://host.example/v1#m")
    assert KEY not in str(caught.value) and scrub(f"a {KEY}\nX-Other: 1 b") == "a [key] b"


def test_a_malformed_url_or_one_with_a_key_is_refused_unseen():
    for url in (f"user:{KEY}@host/v1#m", f"{KEY}@host/v1#m", f"host/v1?api_key={KEY}#m"):
        with pytest.raises(ValueError, match="contains a user, a password or a query") as caught:
            make_engine(f"https://{url}")
        assert KEY not in str(caught.value)
    for spec in ("https://#m", "https://host.example/v1", "http://h:x/#m"):
        with pytest.raises(ValueError, match="endpoint"):
            make_engine(spec)


def test_settings_out_of_range_are_refused():
    bad = {"concurrency": 0, "tries": 0, "timeout": 0.0, "requests_per_minute": 0.0}
    for name, value in (bad | {"price_in": -1.0, "price_out": float("nan")}).items():
        with pytest.raises(ValueError, match=f"{name} is"):
            make_engine("https://host.example/v1#m", **{name: value})


def test_kept_answers_make_no_request(tmp_path):
    with Endpoint(good("first"), good("second")) as server:
        asked = [chat_of("a", random_image()), chat_of("a", random_image(), max_tokens=9)]
        engine = engine_at(server, folder=tmp_path, concurrency=1)
        first = engine.chat(asked)
        assert [r.text for r in first] == ["first", "second"]
        again = pickle.loads(pickle.dumps(engine_at(server, folder=tmp_path)))
        assert again.chat(asked) == first and len(server.requests) == 2
        file = next(tmp_path.rglob("*.json"))
        file.write_text(file.read_text()[:9])  # the request of a damaged answer is repeated
        again.chat(asked)
        assert len(server.requests) == 3
        other = engine_at(server, "other", folder=tmp_path)
        other.chat(asked[:1])
        assert len(server.requests) == 4


def test_errors_are_not_kept(tmp_path):
    with Endpoint((500, {}, ""), good()) as server:
        engine = engine_at(server, folder=tmp_path, tries=1)
        first, second = (engine.chat([chat_of("a")])[0] for _ in range(2))
    assert first.error and second == Reply("a dog")


def test_the_estimate_counts_only_unanswered_requests(tmp_path):
    with Endpoint(good()) as server:
        engine = engine_at(server, folder=tmp_path, price_in=2.0, price_out=8.0)
        asked = [
            chat_of("x" * 4000, random_image(), max_tokens=100),
            chat_of("y" * 400, max_tokens=50),
        ]
        # Input is 4000 / 4 + 1000 + 400 / 4 = 2100 tokens, and output is 150 tokens.
        # The cost is (2100 * 2 + 150 * 8) / 1e6 = 0.0054.
        line = engine.estimate([*asked, asked[0]])
        assert "2 requests to send (0 answered before)" in line
        assert "about 2100 tokens in and at most 150 out" in line and "about 0.01 (at" in line
        sample = engine.estimate(asked, total=2000)
        assert "2000 requests" in sample and "cost at most about 5.40 (at 2 in and 8 out" in sample
        engine.chat(asked[:1])
        line = engine.estimate(asked)
        assert "1 requests to send (1 answered before), about 100 tokens" in line
        assert "--price-in and --price-out" in engine_at(server).estimate(asked)
        assert len(server.requests) == 1
