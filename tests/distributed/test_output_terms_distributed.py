"""Law 3 over processes for terms on the output: two take the steps of one, whether the model is whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_process
import pytest
import torch
import trl_runs
import two_processes
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("output_terms_worker.py")
CASES = ("squared", "teacher", "adaptive", "balora", "current", "exact", "old", "unscored")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]
#: Trained factors, and what was logged at each step.
Result = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_runs.checkpoint(tmp_path_factory.mktemp("base"))


def trained(base: Path, out: Path, processes: int, rows: int, *cases: str, mode: str = "plain") -> dict[str, Result]:
    """Two steps of each case; `rows` are those of a micro-batch."""
    out.mkdir()
    arguments = [str(WORKER), mode, str(base), str(out), str(rows), *cases]
    if processes == 1:
        done = fresh_process.run(fresh_process.RUN_FILE, *arguments, folder=out)
    else:
        done = two_processes.run(*arguments, **({"ACCELERATE_USE_CPU": "true"} if mode == "plain" else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        case: (load_file(out / f"{case}.safetensors"), json.loads((out / f"{case}.json").read_text())) for case in cases
    }


@pytest.fixture(scope="module")
def one_process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Micro-batches of two rows, four a step."""
    return trained(base, tmp_path_factory.mktemp("one") / "out", 1, 2, *CASES, "sft", "grpo")


def assert_equal(found: Result, expected: Result, case: str) -> None:
    """To the rounding of sums that are taken in another order: 1e-6 was seen, of factors up to 2."""
    assert found[0].keys() == expected[0].keys()
    for key, value in expected[0].items():
        torch.testing.assert_close(
            found[0][key], value, atol=4e-6, rtol=1e-5, msg=lambda text, key=key: f"{case}, {key}: {text}"
        )
    assert [log.keys() for log in found[1]] == [log.keys() for log in expected[1]], case
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), case


def test_the_terms_move_the_factors_far_more_than_these_tests_tolerate(one_process: dict[str, Result]) -> None:
    for case in CASES:
        without = one_process["sft" if case in ("squared", "teacher", "adaptive") else "grpo"][0]
        if case != "balora":  # another adapter than both
            assert max(float((one_process[case][0][key] - without[key]).abs().max()) for key in without) > 2e-3, case


def test_two_processes_take_the_steps_of_one(tmp_path: Path, base: Path, one_process: dict[str, Result]) -> None:
    """However tokens are dealt out, where a term is a mean of tokens."""
    for rows in (4, 1):
        found = trained(base, tmp_path / str(rows), 2, rows, "squared")
        for key, value in one_process["squared"][0].items():
            torch.testing.assert_close(found["squared"][0][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", two_processes.SHARDED)
def test_with_the_head_in_shards_two_processes_take_the_steps_of_one(
    tmp_path: Path, base: Path, one_process: dict[str, Result], mode: str
) -> None:
    """Of `unscored` a process has micro-batches without a scored token while the other has some: both gather alike."""
    found = trained(base, tmp_path / "out", 2, 2, *CASES, mode=mode)
    for case in CASES:
        assert_equal(found[case], one_process[case], case)
