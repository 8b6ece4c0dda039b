"""A tiny model, and what an engine computed of a conversation, earlier and later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.store.conftest import open_again, pytest_generate_tests, s3_server, store  # noqa: F401
from tests.engine.worker.served import served
from tests.models import make_model

PROMPT = [(7 * i + i // 11) % 250 for i in range(400)]
MORE = [(3 * i) % 250 for i in range(260)]


@dataclass(frozen=True)
class Story:
    """A conversation: `--prompt-cache` files of it earlier and later, its tokens then, and what follows."""

    model: Path
    files: tuple[Path, Path]
    texts: tuple[list[int], list[int]]
    answers: tuple[list[int], list[int]]


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    model = make_model(folder / "m.gguf", "qwen3moe")
    files, texts, answers = (folder / "old", folder / "new"), [], []
    with served(model, None, ram=0) as server:
        text: list[int] = []
        for path, added in zip(files, (PROMPT, MORE), strict=True):
            text = [*text, *added]
            text += server.ask(text, slot=0)[1]
            server.engine.slots.save_file(path, all_tokens=True)
            texts.append(list(text))
            answers.append(server.ask([*text, 5, 6, 7], slot=1)[1])
    return Story(model, files, (texts[0], texts[1]), (answers[0], answers[1]))
