"""Plain sentences: no listed word, and no sentence over 25 words."""

import prose
import pytest

AREAS = ["README.md", "docs", "examples", "realign", "realign_kernels", "csrc", "benchmarks"]
AREAS += ["experiments", "tests", "CHANGELOG.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("area", AREAS)
def test_sentences_are_plain_and_short(area):
    listed, findings = prose.word_list(), []
    files = prose.files(prose.ROOT, [area])
    assert files
    for file in files:
        for text in prose.prose_of(file):
            place = f"{file.relative_to(prose.ROOT)}:{text.line}"
            for sentence in prose.sentences(text.words):
                if (count := len(prose.words(sentence))) > prose.MOST_WORDS:
                    findings.append(f"{place}: {count} words: {sentence}")
            for word, instead in prose.banned(text.words, listed):
                findings.append(f"{place}: {word!r}, better {instead!r}: {text.words[:100]}")
    assert not findings, f"{len(findings)} findings:\n" + "\n".join(findings[:50])
