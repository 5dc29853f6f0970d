"""Chat templates that each differ in one respect, and the expected error if any."""

_TURN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + TEXT + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _turn(text="m.content", end="</s>", opening="<|assistant|>", loop="messages"):
    changed = _TURN.replace("TEXT", text).replace("</s>", end).replace("in messages", f"in {loop}")
    return changed.replace("'<|assistant|>'", f"'{opening}'")


def _answer(text):
    return _turn(f"({text} if m.role == 'assistant' else m.content)")


_PARTS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
_THINKING = "m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content"

FINE = {
    "strings": _turn(),
    "parts": _PARTS,
    "concatenated": _turn("' ' + m.content + ' '"),
    "trimmed": _turn("m.content | trim"),
    "trimmed answers": _answer("m.content | trim"),
    "own end of turn": _turn(end="<|end|>\\n"),
    "no end": _turn(end=""),
    "no end but thoughts": _answer("'<think></think>' + m.content").replace("</s>", ""),
    "thoughts open in the generation prompt": _turn(opening="<|assistant|><think>\\n"),
    "thoughts closed in the generation prompt": _turn(
        opening="<|assistant|><think>\\n\\n</think>\\n\\n"
    ),
    "thoughts written in front": _answer("'<think>\\n\\n</think>\\n\\n' + m.content").replace(
        "'<|assistant|>' }}{% endif", "'<|assistant|><think>\\n' }}{% endif"
    ),
    "thoughts dropped from history": _turn(f"(m.content if loop.last else ({_THINKING}))"),
    "another generation header": _turn(opening="<|bot|>"),
    "no generation prompt": _turn(opening=""),
    "start in every turn": "{% for m in messages %}{{ '<s>[' + m.role + '] ' + m.content }}"
    "{{ '</s>' }}{% endfor %}{{ '<s>[assistant] ' if add_generation_prompt }}",
    "number of messages": "{{ messages | length > 2 and 'talk' or 'ask' }}" + _turn(),
    "date": "{{ strftime_now('%d %b %Y') }}" + _turn(),
    "microseconds": "{{ strftime_now('%f') }}" + _turn(),
    "documents and tools": "{% if tools %}{{ tools }}{% endif %}{% if documents %}{{ documents }}"
    "{% endif %}" + _turn(),
    "system in the first user message": "{% set s = messages[0].content + '\\n' if "
    "messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}"
    "{{ '<|' + m.role + '|>' + (s if loop.first else '') + m.content + '</s>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}",
    "system in the last user message": "{% set s = messages[0].content + '\\n' if "
    "messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}"
    "{{ '<|' + m.role + '|>' + (s if loop.revindex == (1 if add_generation_prompt else 2) else '') "
    "+ m.content + '</s>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}",
    "empty messages dropped": _turn(loop="messages if m.content"),
}
REFUSED = {
    "upper case": (_answer("m.content | upper"), "drops or changes responses"),
    "escaped": (_answer("m.content | e"), "does not write its response .* whole and once"),
    "escaped questions": (
        _turn("(m.content | e if m.role == 'user' else m.content)"),
        "changes the text of its prompt",
    ),
    "lines joined": (_answer("m.content | replace('\\n', ' ')"), "not write its response"),
    "cut": (_answer("m.content[:20]"), "does not write its response"),
    "as JSON": (_answer("m.content | tojson"), "does not write its response"),
    "answers twice": (_answer("m.content + ' ' + m.content"), "repeats responses"),
    "a remark behind some": (
        _answer("m.content + (' indeed' if '&' in m.content else '')"),
        "does not write its response",
    ),
    "no responses": (
        _turn(loop="messages if m.role != 'assistant'"),
        "drops .* message of the assistant",
    ),
    "no system": (_turn(loop="messages if m.role != 'system'"), "drops .* message of the system"),
    "no first message": (
        _turn(loop="messages[1:]"),
        "drops or changes the text of a message of the user",
    ),
    "last messages only": (
        _turn(loop="messages[-2:]"),
        "drops or changes the text of a message of the user",
    ),
    "reversed": (_turn(loop="messages | reverse"), "changes the order of the messages"),
    "system refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + _turn(),
        r"cannot render its messages \(TemplateError: System role not supported\)",
    ),
    "roles alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + _turn(),
        r"cannot render its messages \(TemplateError: Roles must alternate\)",
    ),
    "its own mistake": (_turn("m.content / 2"), r"cannot render its messages \(TypeError"),
    "another prompt for some": (
        "{{ 'careful' if '&' in messages[-1].content }}" + _turn(),
        "writes a different prompt before its response",
    ),
}

GLM = (  # thoughts before every answer, and no end of a turn
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ '\\n' }}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set thoughts = parts[0].split('<think>')[-1] "
    "if parts | length > 1 and loop.last else '' %}<think>{{ thoughts.strip() }}</think>{{ '\\n' + "
    "parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
