"""The vLLM engine and its worker, with a fake `vllm` that writes down how it is called."""

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from fake_endpoint import KEY, picture, say

from realign.pairs.engines import Chat, Reply, make_engine


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key of the machine that runs the tests."""
    for name in ("REALIGN_API_KEY", "OPENAI_API_KEY", "REALIGN_VLLM_PYTHON"):
        monkeypatch.delenv(name, raising=False)


FAKE_VLLM = '''
"""Stands for vLLM: writes down how it is called, and answers with what it was asked."""
import base64, hashlib, json, os
from types import SimpleNamespace

CALLS = os.environ["FAKE_VLLM_CALLS"]


def note(**what):
    with open(CALLS, "a") as file:
        file.write(json.dumps(what) + "\\n")


class SamplingParams:
    def __init__(self, max_tokens, temperature, seed):
        self.settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}


class LLM:
    def __init__(self, model, **options):
        print("loading", model)
        if model == "missing":
            raise OSError("no such model: missing")
        note(model=model, options=options, key=os.environ.get("REALIGN_API_KEY"))

    def chat(self, messages, sampling_params, use_tqdm=True):
        texts = ["".join(p["text"] for p in m[-1]["content"] if p["type"] == "text")
                 for m in messages]
        note(chats=texts)
        if any("die" in text for text in texts):
            os._exit(9)
        if any("too long" in text for text in texts):
            raise ValueError("the prompt is longer than the model takes")
        return [self.output(*both) for both in zip(texts, messages, sampling_params)]

    def output(self, text, message, params):
        urls = [p["image_url"]["url"] for p in message[-1]["content"] if p["type"] == "image_url"]
        data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        said = [text, params.settings, [hashlib.md5(d).hexdigest() for d in data]]
        done = SimpleNamespace(text=json.dumps(said), finish_reason="length")
        return SimpleNamespace(outputs=[done])
'''


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A fake vLLM for the worker; returns what it was called with, and makes engines."""
    package = tmp_path / "fake" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_VLLM_CALLS", str(calls))
    monkeypatch.setenv("REALIGN_API_KEY", KEY)
    monkeypatch.syspath_prepend(str(package.parent))
    engines = []

    def make(model="some/model", **settings):
        engines.append(make_engine(f"vllm:{model}", folder=tmp_path / "exchange", **settings))
        return engines[-1]

    def called():
        return [json.loads(line) for line in calls.read_text().splitlines()]

    yield make, called
    for engine in engines:
        engine.close()


def test_vllm_answers_by_files_and_asks_nothing_twice(vllm, tmp_path):
    make, called = vllm
    image = picture()
    png = io.BytesIO()
    image.save(png, format="PNG")
    asked = [say("seen", image, max_tokens=5), say("drawn", image, temperature=0.5, seed=3)]
    engine = make(vllm_options={"max_model_len": 100})
    replies = engine.chat([*asked, asked[0]])
    digest = hashlib.md5(png.getvalue()).hexdigest()
    expected = [
        ["seen", {"max_tokens": 5, "temperature": 0.0, "seed": None}, [digest]],
        ["drawn", {"max_tokens": 256, "temperature": 0.5, "seed": 3}, [digest]],
    ]
    assert [json.loads(r.text) for r in replies] == [*expected, expected[0]]
    assert all(r.cut and not r.error for r in replies)
    engine.chat([say("more")])  # by the same worker
    options = {"max_model_len": 100, "limit_mm_per_prompt": {"image": 1}}
    assert called() == [
        {"model": "some/model", "options": options, "key": None},
        {"chats": ["seen", "drawn"]},
        {"chats": ["more"]},
    ]
    again = make(vllm_options={"max_model_len": 100})
    assert again.chat(asked) == replies[:2] and len(called()) == 3
    kinds = {file.name.split("-")[0] for file in (tmp_path / "exchange").iterdir()}
    assert kinds == {"answers", "worker"}  # no requests, no images left


def test_vllm_is_started_anew_for_more_images(vllm):
    make, called = vllm
    engine = make()
    engine.chat([say("one", picture())])
    engine.chat([say("two", picture(), picture(seed=1))])
    limits = [c["options"]["limit_mm_per_prompt"]["image"] for c in called() if "options" in c]
    assert limits == [1, 2]


def test_vllm_gets_no_image_limit_for_texts(vllm):
    make, called = vllm
    make().chat([say("text")])
    assert called()[0]["options"] == {}


def test_a_request_that_vllm_refuses_spares_the_others(vllm):
    make, called = vllm
    good_one, bad, last, empty = make().chat(
        [say("a"), say("too long"), say("b"), Chat([{"role": "user", "content": 5}])]
    )
    assert json.loads(good_one.text)[0] == "a" and json.loads(last.text)[0] == "b"
    assert bad == Reply("", "the prompt is longer than the model takes")
    assert "it has the message {'content': 5" in empty.error
    assert called()[1:] == [
        {"chats": ["a", "too long", "b"]},
        {"chats": ["a"]},
        {"chats": ["too long"]},
        {"chats": ["b"]},
    ]


def test_after_a_death_of_vllm_the_rest_is_asked(vllm, tmp_path):
    make, called = vllm
    engine = make()
    engine.chat([say("a")])
    with pytest.raises(ValueError, match="ended with status 9"):
        engine.chat([say("a"), say("die")])
    (answers,) = (tmp_path / "exchange").glob("answers-*.jsonl")
    answers.write_bytes(answers.read_bytes() + b'{"key": "torn')
    before = len(called())
    replies = make().chat([say("a"), say("b")])
    assert [json.loads(r.text)[0] for r in replies] == ["a", "b"]
    assert called()[before:][1:] == [{"chats": ["b"]}]


def test_a_model_that_vllm_cannot_load_shows_the_end_of_its_log(vllm):
    make, _ = vllm
    with pytest.raises(ValueError, match="no such model: missing"):
        make("missing").chat([say("a")])


def test_the_worker_ends_with_its_engine(vllm):
    make, _ = vllm
    engine = make()
    engine.chat([say("a")])
    process = engine._worker._process
    engine.close()
    assert process.returncode == 0


def test_without_vllm_the_remedy_is_said(monkeypatch):
    with pytest.raises(ValueError, match="not installed.*REALIGN_VLLM_PYTHON"):
        make_engine("vllm:m").open()
    monkeypatch.setenv("REALIGN_VLLM_PYTHON", os.path.join("no", "python"))
    with pytest.raises(ValueError, match="no program"):
        make_engine("vllm:m").open()


def test_vllm_refuses_options_that_run_code_or_are_no_json():
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_engine("vllm:m", vllm_options={"trust_remote_code": True})
    with pytest.raises(ValueError, match="no JSON"):
        make_engine("vllm:m", vllm_options={"dtype": object()})


def test_the_worker_needs_the_standard_library_and_vllm_alone():
    file = Path(make_engine.__code__.co_filename).with_name("vllm_worker.py")
    lines = [line.split() for line in file.read_text().splitlines()]
    found = {line[1] for line in lines if line[:1] in (["import"], ["from"]) and len(line) > 1}
    assert found == {"base64", "json", "os", "sys", "pathlib", "vllm"}
