"""Importing llmreg: cheap, registers with PEFT whoever imports it first, and the help does not wait for torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

import llmreg

REGISTERED = "import peft; assert peft.PeftModel._llmreg_installed; peft.PeftType.LLMREG_ADDITIVE"


@pytest.mark.parametrize(
    "code",
    [
        f"import llmreg; {REGISTERED}",
        f"import peft, llmreg; {REGISTERED}",
        f"import llmreg, sys; assert 'peft' not in sys.modules; llmreg.PissaConfig; {REGISTERED}",
        f"import importlib.util, llmreg; importlib.util.find_spec('peft'); {REGISTERED}",
        f"import llmreg, importlib; importlib.reload(llmreg); {REGISTERED}",
        f"from llmreg import PissaConfig; {REGISTERED}; assert PissaConfig(r=4).r == 4",
    ],
)
def test_peft_knows_the_methods_in_whatever_order_they_are_imported(code, run_python):
    run_python(code)


def test_every_public_name_is_listed():
    assert {*llmreg._LATER, "linalg", "__version__"} == set(llmreg.__all__)


def test_an_import_of_peft_that_fails_first_does_not_lose_the_registration(tmp_path, run_python):
    broken = tmp_path / "broken"
    (broken / "peft").mkdir(parents=True)
    (broken / "peft" / "__init__.py").write_text("raise ImportError('not today')")
    code = (
        "import sys, llmreg\n"
        f"sys.path.insert(0, {str(broken)!r})\n"
        "try:\n import peft\nexcept ImportError: pass\nelse: raise SystemExit('it should have failed')\n"
        f"sys.path.remove({str(broken)!r})\n{REGISTERED}"
    )
    run_python(code)


def test_no_test_reaches_the_hub():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE


def test_the_help_imports_neither_torch_nor_peft():
    code = "import sys; sys.argv = ['llmreg', '--help']\n"
    code += "try:\n from llmreg.cli import main; main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'peft', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_importing_llmreg_costs_at_most_a_third_of_a_second_over_peft_and_the_help_one_second():
    """Of a quiet machine: medians of five processes, what comes on top of PEFT timed within each."""
    code = (
        "import time, peft; s = time.perf_counter(); import llmreg; llmreg.PissaConfig; print(time.perf_counter() - s)"
    )
    added, pages = [], []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        added.append(float(done.stdout))
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llmreg", "--help"], check=True, capture_output=True)
        pages.append(time.perf_counter() - started)
    assert statistics.median(added) <= 0.3, added
    assert statistics.median(pages) <= 1.0, pages
    print(f"over peft {statistics.median(added):.2f} s, help {statistics.median(pages):.2f} s")
