"""The model card of an adapter: what it is, what it was trained on, what that did, and how to load it anywhere.

Everything comes from what lies beside the adapter (its two configs, its sidecar) and from the recipe and report of the
run; what is not known is left out. Paths of this machine and secrets never get into it (`privacy.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapters.registry import QUANTIZED_RESIDUAL, SVFIT_TINY
from ..files import write_text
from .card_facts import Facts, gather, license_of_base, parse_recipe, read_config
from .privacy import neutral_text
from .residual_io import Approximation
from .serving import served_rank, why_not_served
from .sidecar import Sidecar, read_sidecar

__all__ = ["card_of", "model_card", "write_card"]

_METRIC_IDS = {"exact match": "exact_match", "macro F1": "f1", "preference accuracy": "accuracy"}


def write_card(adapter: str | Path, *, recipe: str | None = None, report: Mapping[str, Any] | None = None) -> str:
    """Write the `README.md` of a saved adapter, by rename, and return its text.

    Args:
        adapter: folder of a saved adapter (of any method, plain LoRA too, or exported).
        recipe: the whole recipe, as YAML. report: of the run, as in `report.json`.

    Raises:
        AdapterFileError: the folder holds no adapter, or its sidecar is damaged.
        RecipeError: `recipe` is not a mapping in YAML.
    """
    text = card_of(Path(adapter), recipe=recipe, report=report)
    write_text(Path(adapter) / "README.md", text)
    return text


def card_of(
    adapter: Path, *, recipe: str | None = None, report: Mapping[str, Any] | None = None, online: bool = True
) -> str:
    """The card of the adapter in `adapter`; with `online`, the Hub may be asked for the base's licence."""
    config, sidecar = read_config(adapter), read_sidecar(adapter)
    export = (report or {}).get("export") or {}
    is_export = not sidecar and bool(export) and Path(str(export.get("path", ""))).name == adapter.name
    return model_card(
        config,
        sidecar=sidecar,
        recipe=parse_recipe(recipe),
        report=report,
        license=license_of_base(config, sidecar, online=online),
        relative_error=export.get("relative_error") if is_export else None,
        approximation=Approximation(**export["approximation"]).in_words()
        if is_export and export.get("approximation")
        else None,
        exported=is_export,
    )


def model_card(
    config: Mapping[str, Any],
    *,
    sidecar: Sidecar | None = None,
    recipe: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    license: Mapping[str, str] | None = None,
    relative_error: float | None = None,
    approximation: str | None = None,
    exported: bool = False,
) -> str:
    """A model card as text; writes nothing and asks nobody.

    Args:
        config: content of `adapter_config.json`. sidecar: of the adapter, or of the one it was exported from.
        recipe, report: of the run, with local names or without.
        license: "license", "license_name" and "license_link" of the base, as far as known.
        relative_error: of the recompression, if the adapter was recompressed. exported: it has no sidecar any more.
        approximation: what the export gets wrong otherwise, as a sentence.
    """
    facts = gather(
        config,
        sidecar,
        recipe or {},
        report or {},
        license=license,
        relative_error=relative_error,
        approximation=approximation,
        exported=exported,
    )
    sections = (_summary, _origin, _how_to_load, _continuing, _results, _recipe, _versions)
    body = "\n\n".join(text for text in (section(facts) for section in sections) if text)
    return neutral_text(str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n")))


# -- metadata -----------------------------------------------------------------------------------------------------


def _metadata(facts: Facts) -> ModelCardData:
    """The YAML block that the Hub reads."""
    kind = str(facts.config["peft_type"]).lower()
    method = facts.method_name
    name = f"{facts.base.split('/')[-1] if facts.base else 'adapter'}-{method or kind}"
    results = [result for row in facts.report.get("measurements", ()) if (result := _eval_result(facts, row))]
    tags = ["llmreg", *([method] if method else []), *([kind] if re.fullmatch(r"[\w.-]+", kind) else [])]
    return ModelCardData(
        base_model=facts.base,
        base_model_relation="adapter" if facts.base else None,
        library_name="peft",
        license=facts.license.get("license"),
        license_name=facts.license.get("license_name"),
        license_link=facts.license.get("license_link"),
        pipeline_tag=facts.task[0],
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_result(facts: Facts, row: Mapping[str, Any]) -> EvalResult | None:
    after, metric, source = row.get("after"), str(row.get("metric")), str(row.get("name"))
    if not _finite(after):
        return None
    return EvalResult(
        task_type=facts.task[0] or "other",
        dataset_type=source,
        dataset_name=source,
        metric_type=_METRIC_IDS.get(metric, metric.replace(" ", "_")),
        metric_name=metric,
        metric_value=after,
    )


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- text ---------------------------------------------------------------------------------------------------------


def _base_words(facts: Facts) -> str:
    if facts.is_pocket:
        return "the pocket model, which is embedded in llmreg"
    if facts.base is None:
        return "a base model that has no name on the Hub"
    return f"[{facts.base}](https://huggingface.co/{facts.base})"


def _summary(facts: Facts) -> str:
    title = facts.method.title if facts.method else facts.method_name or str(facts.config["peft_type"])
    dtype = (facts.report.get("export") or {}).get("dtype")
    made = (
        f", exported by llmreg as plain LoRA of rank {facts.rank}{f' in {dtype}' if dtype else ''}"
        if facts.exported
        else ""
    )
    lines = [f"# {title} adapter", f"A {title} adapter of {_base_words(facts)}{made}."]
    if facts.method:
        paper = facts.method.paper
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), section {paper.section}"
        lines.append(f"{facts.method.title}: {facts.method.what} Paper: {link}.")
    if facts.relative_error is not None:
        lines.append(f"Relative error of the recompression (Frobenius, all layers): {facts.relative_error:.3e}.")
    if facts.approximation is not None:
        lines.append(f"It was trained beside a quantised residual: {facts.approximation}")
    if facts.config["peft_type"] == QUANTIZED_RESIDUAL.value:
        lines.append(
            "It was trained beside a quantised residual (QPiSSA, arXiv 2404.02948): the base in `residual/` holds what "
            "the adapter does not carry, so that neither is anything without the other."
        )
    if "license" not in facts.license:
        lines.append("The licence of the base model was not known when this card was written: look it up before use.")
    return "\n\n".join(lines)


def _origin(facts: Facts) -> str:
    rows: list[tuple[str, Any]] = [
        ("base model", facts.base or ("llmreg's pocket model" if facts.is_pocket else "not on the Hub")),
        ("base revision", facts.revision),
    ]
    if facts.sidecar:
        base, source = facts.sidecar.base, facts.sidecar.base.source
        what = "parameters in memory" if source == "memory" else "checkpoint files"
        rows += [
            (f"base identity (SHA-256 of its {what})", _hash(base.digest)),
            (f"targeted layers as stored ({base.storage}), SHA-256", _hash(base.stored_bytes)),
            ("start of the adapter (A0, B0), SHA-256", _hash(facts.sidecar.start_hash)),
        ]
    else:
        rows.append(("start of the adapter, SHA-256", _hash(facts.report.get("start_hash"))))
    export = facts.report.get("export") or {}
    if facts.exported or not _finite(export.get("relative_error")):
        exported = None
    else:
        exported = f"rank {export.get('rank')}, {export.get('dtype')}, relative error {export['relative_error']:.3e}"
    rows += [
        ("rank as trained", facts.trained_rank),
        ("rank as saved", facts.rank),
        ("the same run's export", exported),
        ("seed", facts.report.get("seed", facts.recipe.get("seed"))),
        ("optimizer steps", facts.report.get("steps")),
        ("trainable parameters", facts.report.get("trainable_parameters")),
    ]
    known = [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["## What it is", "", "| | |", "|---|---|", *known])


def _how_to_load(facts: Facts) -> str:
    imports, base = (
        "import peft, transformers",
        f'transformers.{facts.task[1]}.from_pretrained("path-of-the-base-model")',
    )
    classes = facts.report.get("classes")
    if facts.task[0] == "text-classification":
        name = f'"{facts.base}"' if facts.base else '"path-of-the-base-model"'
        if facts.is_pocket:
            imports, name = "import llmreg.pocket, peft, transformers", "llmreg.pocket.path()"
        labels = f", num_labels={len(classes)}" if classes else ", num_labels=NUMBER_OF_CLASSES"
        base = f"transformers.{facts.task[1]}.from_pretrained({name}{labels})"
    elif facts.is_pocket:
        imports, base = "import llmreg.pocket, peft", "llmreg.pocket.load_model()"
    elif facts.base:
        revision = f', revision="{facts.revision}"' if facts.revision else ""
        base = f'transformers.{facts.task[1]}.from_pretrained("{facts.base}"{revision})'
    if facts.config["peft_type"] == QUANTIZED_RESIDUAL.value:
        labels = f", num_labels={len(classes)}" if classes else ""
        base = f'transformers.{facts.task[1]}.from_pretrained(folder + "/residual"{labels})'
        imports = "import huggingface_hub, peft, transformers"
    load = (
        f'base = {base}\nmodel = peft.PeftModel.from_pretrained(base, "owner/name")  # of this repository, or a folder'
    )
    if facts.config["peft_type"] == QUANTIZED_RESIDUAL.value:  # a subfolder cannot be loaded beside an adapter
        load = f'folder = huggingface_hub.snapshot_download("owner/name")\n{load}'.replace(
            '"owner/name")  # of this repository, or a folder', "folder)  # "
        )
    if classes:
        load += f"\nclasses = {list(map(str, classes))}"
    plain = f"With plain PEFT:\n\n```python\n{imports}\n\n{load}\n```"
    if facts.config["peft_type"] == "BONE":
        plain = "Plain PEFT refuses it (peft type BONE), since it would compute another function on these layers."
    if facts.config["peft_type"] == SVFIT_TINY.value:
        plain = (
            f"Plain PEFT refuses it (peft type {SVFIT_TINY.value}): it holds the change of the singular values alone, "
            "and the vectors are computed again from the base, which must be stored as it was in training. "
            "`llmreg export ADAPTER DIR` makes a plain LoRA of it."
        )
    if facts.config["peft_type"] == QUANTIZED_RESIDUAL.value:
        plain = (
            f"Plain PEFT refuses it (peft type {QUANTIZED_RESIDUAL.value}), since it belongs to the base in "
            "`residual/` alone. `llmreg export ADAPTER DIR --approximate` makes a plain LoRA for the original base of "
            "it, which is off by what quantisation lost."
        )
    parts = [f"## How to load it\n\n{plain}", _vllm(facts)]
    if facts.sidecar and not facts.exported:
        parts.append(
            "With llmreg, which checks base and files against the hashes above and mounts it as what was trained:\n\n"
            f"```python\nimport llmreg\n{imports}\n\n{load.replace(')  #', ', is_trainable=True)  #')}\n```"
        )
    return "\n\n".join(part for part in parts if part)


def _vllm(facts: Facts) -> str:
    if facts.task[0] != "text-generation" or facts.rank is None or facts.config["peft_type"] != "LORA":
        return ""
    reason = why_not_served(facts.config, facts.rank)
    if reason:
        return (
            f"vLLM does not serve it as it is: {reason}. `llmreg export ADAPTER DIR --rank N` recompresses adapters of "
            "linear layers to a rank that it serves."
        )
    base = facts.base or "path-of-the-base-model"
    revision = f" --revision {facts.revision}" if facts.revision else ""
    return (
        f"With vLLM:\n\n```bash\nvllm serve {base}{revision} --enable-lora --max-lora-rank {served_rank(facts.rank)} "
        "--lora-modules adapter=owner/name\n```"
    )


def _continuing(facts: Facts) -> str:
    if facts.sidecar and facts.config["peft_type"] == SVFIT_TINY.value:
        text = "With llmreg training resumes exactly, after base, singular values and vectors were checked."
    elif facts.sidecar and facts.config["peft_type"] == QUANTIZED_RESIDUAL.value:
        text = "With llmreg training resumes exactly, on the base in `residual/`, after its layers were compared."
    elif facts.sidecar and facts.config["peft_type"] in ("MISS", "BONE"):
        text = (
            "What is saved here are the trained tensors themselves, to the last bit. With llmreg training resumes "
            "exactly, after base and files were checked."
        )
        if facts.config["peft_type"] == "MISS":
            text += " Plain PEFT knows the form as MiSS and trains it further as that."
    elif facts.sidecar and not facts.exported:
        title = facts.method.title if facts.method else facts.sidecar.method
        text = (
            f"What is saved here is a plain LoRA of rank {facts.rank} that computes what the {title} adapter of rank "
            f"{facts.trained_rank} computed, over the unchanged base. Training it further in plain PEFT trains an "
            f"ordinary LoRA of rank {facts.rank}. With llmreg it resumes exactly: as {title}, from the bit-exact "
            "factors in `llmreg_factors.safetensors`."
        )
    elif facts.rank is not None:
        text = f"Training it further trains an ordinary LoRA of rank {facts.rank}, with llmreg as in plain PEFT."
    else:
        return ""
    return f"## Training it further\n\n{text}"


def _results(facts: Facts) -> str:
    rows = [_result_row(row) for row in facts.report.get("measurements", ())]
    loss = facts.report.get("heldout_loss") or {}
    before, after = loss.get("before"), loss.get("after")
    if _finite(before) and _finite(after):
        rows.append(f"| held-out loss | task | | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    if not rows:
        return ""
    head = ["| measured on | role | rows | before | after | change |", "|---|---|---:|---:|---:|---:|"]
    note = "A task should improve; what is marked forgetting is what the base could do, and should not change."
    return "\n".join(["## Scores before and after training", "", *head, *rows, "", note])


def _result_row(row: Mapping[str, Any]) -> str:
    before, after, metric = row.get("before"), row.get("after"), row.get("metric")
    cells = [f"{row.get('name')} ({metric})", row.get("role", "task"), row.get("rows", "")]
    if not (_finite(before) and _finite(after)):
        cells += [before, after, ""]
    elif metric == "perplexity":
        cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    else:
        cells += [f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _recipe(facts: Facts) -> str:
    if not facts.recipe:
        return ""
    text = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True, width=10_000).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"## Recipe\n\nLocal models, data and folders have neutral names.\n\n{fence}yaml\n{text}\n{fence}"


def _versions(facts: Facts) -> str:
    versions = facts.sidecar.versions if facts.sidecar else facts.report.get("versions") or {}
    known = {str(name): str(version) for name, version in versions.items()}
    plain = [
        f"{name} {version}" for name, version in known.items() if re.fullmatch(r"[\w-]+ [\w.+!-]+", f"{name} {version}")
    ]
    return f"## Trained with\n\n{', '.join(plain)}" if plain else ""


def _hash(value: Any) -> str | None:
    return f"`{value}`" if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,128}", value) else None


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
