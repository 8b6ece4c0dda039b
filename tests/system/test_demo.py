"""`numoe demo`, the README's first command."""

from __future__ import annotations

from tests.system.harness import SHM, numoe


def test_the_demo_answers_and_leaves_nothing() -> None:
    result = numoe("demo", "The capital of France is")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "ms/tok" in result.stderr
    assert not list(SHM.glob("[!t]*"))


def test_without_a_prompt_it_chats() -> None:
    result = numoe("demo", stdin="What is the capital of France?\nWho are you?\n")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert len(result.stdout.splitlines()) >= 3
    assert result.stderr.count("ms/tok") == 4  # prompt and answer of two turns
