"""What a quantised base loses, and what an adapter's start makes up for: sections of `bench_calibration`.

quantization  `||W - (Q + B A)||` of every layer in the Frobenius and the nuclear norm, NF4 with double quantisation:
              QLoRA (Q = q(W), no B A), LoftQ and QPiSSA after 1 and 5 iterations, QPiSSA the best of its iterates
eora          `||(W - Q - B A) X||_F` on held-out text of no compensation, the SVD of W - Q, and EoRA
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_init import minilm
from common import print_table
from data_driven import linear_layers, moment_of
from torch import Tensor, nn

from llmreg.calibration import Statistics, calibrate
from llmreg.initializers import ResidualError, eora, pissa, quantized_residual
from llmreg.linalg import truncated_svd
from llmreg.pocket import load_model, load_tokenizer
from llmreg.pocket.corpus import corpus, held_out_passages

RANKS = {"pocket": 8, "minilm": 16}
ITERATIONS = (1, 5)
NORMS = ("frobenius", "nuclear")


def nf4(W: Tensor) -> tuple[Any, Tensor]:
    """The bitsandbytes object of a weight (out, in) and what it reads back as, with double quantisation as in QLoRA."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored = quantize_4bit(W.float().contiguous(), quant_type="nf4", compress_statistics=True)
    return stored, dequantize_4bit(*stored).reshape(W.shape).float()


def loftq(W: Tensor, rank: int, iterations: int) -> Iterator[Tensor]:
    """`W - (Q_t + B_t A_t)` of every iterate of LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1).

    `Q_t = q(W - B_{t-1} A_{t-1})`, then `B_t A_t` the best of its rank for `W - Q_t`; PEFT's runs on CUDA only.
    """
    product = torch.zeros_like(W)
    for _ in range(iterations):
        _, dequantized = nf4(W - product)
        U, S, Vh = torch.linalg.svd(W - dequantized, full_matrices=False)
        product = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        yield W - dequantized - product


# -- errors of the weights --------------------------------------------------------------------------------------


def section_quantization() -> dict[str, Any]:
    """Errors of every layer of both models, and what must hold of them."""
    result = {}
    for name, model in (("pocket", load_model()), ("minilm", minilm())):
        layers = {
            layer: layer_errors(module.weight.detach().float(), RANKS[name])
            for layer, module in linear_layers(model).items()
        }
        result[name] = {"rank": RANKS[name], "layers": layers, "mean": _means(layers), "holds": _checks(layers)}
        _print_errors(name, result[name])
    return result


def layer_errors(W: Tensor, rank: int) -> dict[str, dict[str, float]]:
    """Method -> norm -> error."""
    found = quantized_residual(
        W, lambda M: pissa(M, rank, 1.0), lambda M: nf4(M), scaling=1.0, iterations=max(ITERATIONS), nuclear=True
    )
    errors = {"QLoRA": found.errors[0]}
    for T, E in enumerate(loftq(W, rank, max(ITERATIONS)), start=1):
        if T in ITERATIONS:
            norms = torch.linalg.matrix_norm(E).item(), torch.linalg.svdvals(E).sum().item()
            errors[f"LoftQ {T}"] = ResidualError(*norms)
    for T in ITERATIONS:  # the iterates do not depend on T, which is kept does
        errors[f"QPiSSA {T}"] = min(found.errors[: T + 1], key=lambda error: error.frobenius)
    return {method: {norm: getattr(error, norm) for norm in NORMS} for method, error in errors.items()}


def _means(layers: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over the layers of each error as a share of QLoRA's."""
    methods = next(iter(layers.values()))
    return {
        method: {norm: statistics.fmean(e[method][norm] / e["QLoRA"][norm] for e in layers.values()) for norm in NORMS}
        for method in methods
    }


def _checks(layers: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, bool]]:
    means = _means(layers)
    checks = {}
    for norm in NORMS:
        chains = [[errors[method][norm] for method in ("QPiSSA 5", "QPiSSA 1", "QLoRA")] for errors in layers.values()]
        checks[norm] = {
            "QPiSSA 5 <= QPiSSA 1 <= QLoRA in every layer": all(chain == sorted(chain) for chain in chains),
            "QPiSSA below QLoRA on average": all(means[f"QPiSSA {T}"][norm] < 1 for T in ITERATIONS),
            "QPiSSA at most LoftQ on average at equal iterations": all(
                means[f"QPiSSA {T}"][norm] <= means[f"LoftQ {T}"][norm] for T in ITERATIONS
            ),
        }
    return checks


def _print_errors(name: str, result: dict[str, Any]) -> None:
    methods = list(result["mean"])
    for norm in NORMS:
        rows = [
            [
                layer,
                f"{errors['QLoRA'][norm]:.4g}",
                *(f"{errors[m][norm] / errors['QLoRA'][norm]:.4f}" for m in methods),
            ]
            for layer, errors in result["layers"].items()
        ]
        rows.append(["mean", "", *(f"{result['mean'][m][norm]:.4f}" for m in methods)])
        print_table(f"{name}, r {result['rank']}, {norm} norm over QLoRA's", ["layer", "QLoRA", *methods], rows)
        print(result["holds"][norm])


# -- EoRA -------------------------------------------------------------------------------------------------------

COMPENSATIONS = ("none", "svd", "eora")


def section_eora() -> dict[str, Any]:
    """Both models, calibrated on passages of the pocket corpus, measured on passages that are not in it."""
    documents = [document.text for document in corpus(0) if document.kind == "passage"][:1024]
    unseen = list(held_out_passages(0, 200))
    result = {}
    for name, load in (("pocket", _pocket), ("minilm", _minilm)):
        model, tokenize = load()
        layers = linear_layers(model)
        calibration = calibrate(model, _batches(tokenize, documents), layers, unreached="report")
        held_out = calibrate(model, _batches(tokenize, unseen), layers, unreached="report")
        result[name] = _compensated(layers, calibration, held_out, RANKS[name])
        if name == "pocket":
            result[name]["divergence"] = _divergences(model, _batches(tokenize, unseen), calibration, RANKS[name])
        _print_eora(name, result[name])
    return result


def _pocket() -> tuple[nn.Module, Callable[..., Any]]:
    return load_model(), load_tokenizer()


def _minilm() -> tuple[nn.Module, Callable[..., Any]]:
    from transformers import AutoTokenizer

    model = minilm().eval()
    return model, AutoTokenizer.from_pretrained(model.config._name_or_path)


def _batches(tokenize: Callable[..., Any], texts: list[str]) -> list[dict[str, Tensor]]:
    parts = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    return [dict(tokenize(part, return_tensors="pt", padding=True)) for part in parts]


def corrections(W: Tensor, rank: int, calibration: Any) -> dict[str, Tensor]:
    """Compensation -> the weight that the layer then computes with, `Q + B A`."""
    _, Q = nf4(W)
    U, S, Vh = truncated_svd(W - Q, rank, method="exact")
    factors = eora(W, Q, rank, moment_of(calibration))
    return {"none": Q, "svd": Q + (U * S) @ Vh, "eora": Q + factors.B @ factors.A}


def _compensated(
    layers: dict[str, nn.Linear], calibration: Statistics, held_out: Statistics, rank: int
) -> dict[str, Any]:
    """`||(W - Q - B A) X||_F / ||W X||_F` of each layer, from the second moments of the text in question."""
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for name in (name for name in layers if name in calibration and name in held_out):
        W = layers[name].weight.detach().float()
        found = corrections(W, rank, calibration[name])
        moments = {"calibration": calibration[name], "held out": held_out[name]}
        errors[name] = {
            text: {kind: _output_norm(W - V, part) / _output_norm(W, part) for kind, V in found.items()}
            for text, part in moments.items()
        }
    unseen = [entry["held out"] for entry in errors.values()]
    return {
        "rank": rank,
        "layers": errors,
        "mean": {kind: statistics.fmean(entry[kind] for entry in unseen) for kind in COMPENSATIONS},
        "holds": all(entry["eora"] < min(entry["svd"], entry["none"]) for entry in unseen),
        "layers_below_both": sum(entry["eora"] < min(entry["svd"], entry["none"]) for entry in unseen),
    }


def _output_norm(E: Tensor, part: Any) -> float:
    """`sqrt(Tr(E C E^T))`, the root mean square of `E x`."""
    E = E.double()
    return float(torch.trace(E @ part.second_moment().double() @ E.mT).sqrt())


@torch.no_grad()
def _divergences(
    model: nn.Module, batches: list[dict[str, Tensor]], calibration: Statistics, rank: int
) -> dict[str, float]:
    """Mean KL divergence a token, in nats, from the full-precision model's next-token distribution, held out."""
    layers = linear_layers(model)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    replaced = {name: corrections(W.float(), rank, calibration[name]) for name, W in weights.items()}
    expected = [model(**batch).logits.log_softmax(-1) for batch in batches]
    found = {}
    for kind in COMPENSATIONS:
        for name, layer in layers.items():
            layer.weight.copy_(replaced[name][kind])
        total = tokens = 0.0
        for batch, teacher in zip(batches, expected, strict=True):
            mask = batch["attention_mask"]
            divergence = (teacher.exp() * (teacher - model(**batch).logits.log_softmax(-1))).sum(-1)
            total, tokens = total + float((divergence * mask).sum()), tokens + int(mask.sum())
        found[kind] = total / tokens
    for name, layer in layers.items():
        layer.weight.copy_(weights[name])
    return found


def _print_eora(name: str, result: dict[str, Any]) -> None:
    rows = [
        [layer, *(f"{entry['held out'][kind]:.5f}" for kind in COMPENSATIONS)]
        for layer, entry in result["layers"].items()
    ]
    rows.append(["mean", *(f"{result['mean'][kind]:.5f}" for kind in COMPENSATIONS)])
    print_table(f"{name}, r {result['rank']}: relative output error, held out", ["layer", *COMPENSATIONS], rows)
    print(f"EoRA below both in {result['layers_below_both']} of {len(result['layers'])} layers")
    print(result.get("divergence", ""))


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"quantization": section_quantization, "eora": section_eora}
