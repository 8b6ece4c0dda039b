"""numoe bench: what it prints is complete and agrees with itself. How fast it says things are is not tested."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numoe.deploy.commands.bench.concurrency import Stream, percentile, summary
from numoe.deploy.commands.bench.sweep import Window, depths_of, draw, header, row
from numoe.engine.errors import InputError
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.scheduler import Scheduler, SchedulerConfig
from numoe.engine.worker.engine import Engine, Measurement
from tests.engine.worker.local import local_forward
from tests.models import make_model
from tests.system.harness import numoe

MACHINE_PARTS = {"attention", "experts", "wait", "other"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "tiny.gguf", experts_type="IQ4_NL", attn_type="Q8_0")


def json_lines(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_sweep_prints_a_row_for_each_depth(model: Path) -> None:
    rows = json_lines(numoe("bench", "sweep", model, "--ctx-size", 128, "--pp", 48, "--tg", 5, "--json"))
    assert [(r["n_kv"], r["pp"], r["tg"]) for r in rows] == [(0, 48, 5), (48, 48, 5)]
    for r in rows:
        for mode in ("pp", "tg"):
            assert r[f"speed_{mode}"] == pytest.approx(r[mode] / r[f"t_{mode}"])
            parts = r[f"ms_{mode}"]
            assert parts.keys() == MACHINE_PARTS
            assert min(parts.values()) >= 0
            assert sum(parts.values()) == pytest.approx(1e3 * r[f"t_{mode}"] / r[mode])


def test_the_table_has_the_columns_of_llama_sweep_bench() -> None:
    parts = dict.fromkeys(MACHINE_PARTS, 250.0)
    window = Window("f16", 1024, Measurement(512, 2.0, parts), Measurement(32, 1.0, parts))
    names, rule, cells = (line.split("|")[1:-1] for line in f"{header()}\n{row(window)}".splitlines())
    assert [name.strip() for name in names[:7]] == [
        "PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s",
    ]  # fmt: skip
    assert [cell.strip() for cell in cells[:7]] == ["512", "32", "1024", "2.000", "256.00", "1.000", "32.00"]
    assert [len(name) for name in names] == [len(cell) for cell in cells] == [len(dashes) for dashes in rule]


def test_depths_end_where_prompt_or_answer_would_not_fit() -> None:
    assert list(depths_of(context=2080, size=2048, pp=512, tg=32)) == [0, 512, 1024, 1536]
    assert list(depths_of(context=2048, size=2048, pp=512, tg=32)) == [0, 512, 1024]
    assert list(depths_of(context=44, size=40, pp=40, tg=4)) == [0]
    with pytest.raises(InputError, match="--pp 40"):
        depths_of(context=43, size=43, pp=40, tg=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "/no/such/folder/x.png"], "there is no folder /no/such/folder"),
        (["--plot", "x.nonsense"], "give a name that ends in .png"),
        (["--pp", 0], "--pp 0"),
        (["--tg", 0], "--tg 0"),
        (["--ctx-size", 64], "--pp 512 and --tg 32 do not fit into 96 tokens"),
        (["--ctx-size", 9999], "--ctx-size 9999"),
        (["--kv-types", "f16,q9"], "q9"),
    ],
)
def test_sweep_refuses_what_is_not_possible_in_one_line(model: Path, arguments: list, message: str) -> None:
    done = numoe("bench", "sweep", model, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_says_what_to_install(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from numoe.deploy.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "bench", "sweep", str(model), "--plot", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'numoe[plot]'" in done.stderr


def test_a_plot_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = dict.fromkeys(MACHINE_PARTS, 1.0)
    windows = [
        Window(kind, depth, Measurement(8, 1.0, parts), Measurement(4, 1.0, parts))
        for kind in ("f16", "q8_0")
        for depth in (0, 8)
    ]
    for name, drawn in (("one.png", windows[:2]), ("both.png", windows)):
        draw(drawn, tmp_path / name, "tiny")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        draw(windows, tmp_path / "folder.png", "tiny")


def test_measured_steps_are_the_steps_of_a_sequence(model: Path) -> None:
    """What is timed is the real computation: it leaves the keys and values that `logits` leaves."""
    with GgufFile.open(model) as gguf:
        vocab = ModelConfig.from_gguf(gguf).vocab
    tokens = [(7 * i + 3) % vocab for i in range(20)]
    with local_forward(model, slots=1) as forward:
        options = forward.options
        config = SchedulerConfig(
            slots=1, context=options.context, chunk_tokens=16, queue_limit=1, n_pages=options.n_pages
        )
        engine = Engine(Scheduler(config), forward, emit=lambda _: None)
        forward.pool.data[:] = 0
        answer = list(tokens)
        for _ in range(3):
            answer.append(int(np.concatenate(list(engine.logits(answer, 16)))[-1].argmax()))
        want = forward.pool.data.copy()
        forward.pool.data[:] = 0
        prefill = engine.measure_prefill(tokens, 0, 16)
        decode = engine.measure_decode(answer[20], 20, 2)
        assert (prefill.tokens, decode.tokens) == (20, 2)
        assert np.array_equal(forward.pool.data, want)
        with pytest.raises(InputError, match="do not fit"):
            engine.measure_decode(0, options.context - 2, 3)
        with pytest.raises(InputError, match="token ids"):
            engine.measure_prefill([vocab], 0, 16)


def test_kernels_prints_a_row_for_each_format_and_number_of_rows() -> None:
    arguments = ("--formats", "Q8_0,F32", "--buffer-mb", 4, "--rounds", 1, "--threads", 2)
    found = json_lines(numoe("bench", "kernels", *arguments, "--json"))
    assert [(r["format"], r["rows"]) for r in found] == [(f, n) for f in ("Q8_0", "F32") for n in (1, 4, 16, 64, 512)]
    bytes_per_weight = {"Q8_0": 34 / 32, "F32": 4}
    for r in found:
        assert r["gb_s"] == pytest.approx(r["gflop_s"] / 2 / r["rows"] * bytes_per_weight[r["format"]])
        by_memory = 2 * r["read_gb_s"] * r["rows"] / bytes_per_weight[r["format"]]
        assert r["limit"] == ("memory" if by_memory < r["peak_gflop_s"] else "compute")
        assert r["share"] == pytest.approx(r["gflop_s"] / min(by_memory, r["peak_gflop_s"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--formats", "Q8_0,Q9_9"), "--formats Q9_9: choose from"),
        (("--threads", 0), "--threads 0"),
        (("--threads", 5000), "from 1 to 4096"),
        (("--rounds", 0), "--rounds 0"),
    ],
)
def test_kernels_refuses_what_is_not_possible_in_one_line(arguments: tuple, message: str) -> None:
    done = numoe("bench", "kernels", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_concurrency_starts_a_server_and_counts_every_token(model: Path) -> None:
    arguments = ("--streams", "1,3", "--prompt-tokens", 9, "--max-tokens", 6)
    rows = json_lines(numoe("bench", "concurrency", model, *arguments, "--json"))
    assert [(r["streams"], r["tokens"]) for r in rows] == [(1, 6), (3, 18)]
    for r in rows:
        assert r["speed"] == pytest.approx(r["tokens"] / r["seconds"])
        assert 0 < r["first_ms_p50"] <= r["first_ms_p99"] <= 1e3 * r["seconds"]
        assert 0 <= r["between_ms_p50"] <= r["between_ms_p99"] <= 1e3 * r["seconds"]


def test_concurrency_wants_a_model_or_a_server(model: Path) -> None:
    for arguments in ((), (model, "--address", "127.0.0.1:1")):
        done = numoe("bench", "concurrency", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"numoe: give either a model file or the --address of a server\n", done.stderr)
    done = numoe("bench", "concurrency", "--address", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no numoe server answers" in done.stderr
    assert "--streams x" in numoe("bench", "concurrency", model, "--streams", "x").stderr


def test_a_summary_is_of_all_streams_together() -> None:
    streams = [Stream(10.0, [10.5, 10.6, 10.8]), Stream(10.1, [10.3, 11.0])]
    values = summary(streams)
    assert (values["streams"], values["tokens"]) == (2, 5)
    assert values["seconds"] == pytest.approx(1.0)
    assert values["speed"] == pytest.approx(5.0)
    assert values["speed_of_all"] == pytest.approx(2 / 0.3)  # from 10.5 to 10.8
    assert values["first_ms_p50"] == pytest.approx(350.0)
    assert values["between_ms_p50"] == pytest.approx(200.0)
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


def test_slots_are_saved_and_restored(model: Path, tmp_path: Path) -> None:
    arguments = ("--tokens", 300, "--more", 60, "--rounds", 1, "--store", tmp_path / "store")
    (values,) = json_lines(numoe("bench", "slots", model, *arguments, "--json"))
    whole, again, same, (fresh,) = (values[name] for name in ("whole", "again", "same", "fresh"))
    assert (whole["chunks"], whole["moved_chunks"]) == (2, 2)
    assert (again["chunks"], again["moved_chunks"]) == (2, 1)  # 300 and 360 tokens share a full chunk
    assert (same["moved_chunks"], fresh["moved_chunks"]) == (0, 2)
    assert fresh["moved_bytes"] == fresh["bytes"]
    assert values["ratio"] == pytest.approx(values["prefill_s"] / fresh["seconds"])
    assert values["share"] == pytest.approx(values["read"][0] / fresh["seconds"])
    done = numoe("bench", "slots", model, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "holds chunks already: give an empty one" in done.stderr
