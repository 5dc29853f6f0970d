"""Answers requests with vLLM; run by vllm_engine.py in vLLM's own environment.

Needs Python 3.9, vLLM and the standard library. The argument is JSON: `model`, `options` of
`vllm.LLM`, `images` of a prompt at most, and the file `answers`, which it appends to. Every line
of its input names a file of requests; when they are answered it makes one with the suffix .done.
"""

import base64
import json
import os
import sys
from pathlib import Path

# Run as a script, the folder of this file comes first among the places of modules. It is no place
# for vLLM's imports.
if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

CHUNK = 256  # requests; what is answered is written after each chunk


def main(told):
    """Load the model, then answer files of requests until the input ends.

    Args:
        told: the settings, as above.
    """
    from vllm import LLM, SamplingParams

    options = dict(told["options"])
    if told["images"]:  # refused for text-only models
        options.setdefault("limit_mm_per_prompt", {"image": told["images"]})
    llm = LLM(model=told["model"], **options)
    with open(told["answers"], "a", encoding="ascii") as answers:
        for line in sys.stdin:
            file = Path(line.rstrip("\n"))
            requests = [json.loads(text) for text in file.read_text().splitlines()]
            for start in range(0, len(requests), CHUNK):
                for answer in answer_chunk(llm, SamplingParams, requests[start : start + CHUNK]):
                    answers.write(json.dumps(answer) + "\n")
                answers.flush()
            file.with_suffix(".done").touch()


def answer_chunk(llm, sampling_params, requests):
    """Answers to requests, as dicts with key, text, error and cut.

    A chunk that vLLM refuses, for one request that is too long, say, is asked one by one.

    Raises:
        RuntimeError: when vLLM returns another number of answers.
    """
    try:
        # The last ones: of a refused chunk, some versions still answer what they had taken.
        outputs = ask(llm, sampling_params, requests)[-len(requests) :]
    except ValueError as error:
        if len(requests) == 1:
            return [{"key": requests[0]["key"], "text": "", "error": str(error), "cut": False}]
        return [a for request in requests for a in answer_chunk(llm, sampling_params, [request])]
    if len(outputs) != len(requests):
        raise RuntimeError(f"vLLM gave {len(outputs)} answers to {len(requests)} requests")
    found = []
    for request, output in zip(requests, outputs):  # noqa: B905 (Python 3.9)
        written = output.outputs[0]
        text = written.text.strip()
        found.append(
            {
                "key": request["key"],
                "text": text,
                "error": "" if text else "the answer is empty",
                "cut": written.finish_reason == "length",
            }
        )
    return found


def ask(llm, sampling_params, requests):
    """vLLM's outputs for requests, in their order."""
    return llm.chat(
        [[message_of(message) for message in request["messages"]] for request in requests],
        [
            sampling_params(
                max_tokens=request["max_tokens"],
                temperature=request["temperature"],
                seed=request["seed"] if request["temperature"] > 0 else None,
            )
            for request in requests
        ],
        use_tqdm=False,
    )


def message_of(message):
    """A message as vLLM takes it: images as data: URLs, which every version reads."""
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            data = base64.b64encode(Path(part["file"]).read_bytes()).decode()
            url = {"url": "data:image/png;base64," + data}
            part = {"type": "image_url", "image_url": url}
        parts.append(part)
    return {"role": message["role"], "content": parts}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
