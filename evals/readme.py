"""Puts measured figures into the README: the tables, and the picture of a quickstart run.

    python evals/readme.py runs/quickstart/report.json

Reads evals/results/*.json and a report; figures change nowhere else.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import bandit
import imbalance
import lp_reg
import matplotlib.pyplot as plt
from divergence import TEXTS
from first_steps import summary as first_steps_summary
from sweep import SCORES, SWEEPS, best_rate, kept_at, key, summaries

from llmreg.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evals" / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def against_peft() -> list[str]:
    header = ["| | PEFT `pissa_niter_16` | llmreg |", "|---|---:|---:|"]
    rows = read("against_peft")["rows"]
    return header + [f"| {row['question']} | {shown(row['peft'])} | {shown(row['llmreg'])} |" for row in rows]


def bench_init() -> list[str]:
    sections = read("bench_init")
    rows = ["| | peer | llmreg | ratio |", "|---|---:|---:|---:|"]
    entries = sections["matrix"]["result"]["entries"]
    mine = entries["llmreg"]["seconds"]
    for peer, label in (("svd_lowrank", "torch.svd_lowrank, niter 16"), ("full svd", "full SVD")):
        seconds = entries[peer]["seconds"]
        rows.append(
            f"| 2048 x 2048, rank 64, against {label} | {seconds * 1e3:.0f} ms | {mine * 1e3:.0f} ms "
            f"| {seconds / mine:.1f}x faster |"
        )
    for name, label in (("llama-1024", "Llama, hidden 1024, 8 layers"), ("minilm", "MiniLM")):
        result = sections["model"]["result"][name]
        seconds, extra = result["seconds"], result["extra_mib"]
        rows.append(
            f"| start of all linears, {label}, r 16, against `pissa_niter_16` | {seconds['pissa_niter_16']:.2f} s "
            f"| {seconds['llmreg']:.2f} s | {result['ratio']:.1f}x faster |"
        )
        rows.append(f"| the same, extra memory | {extra['pissa_niter_16']:.0f} MiB | {extra['llmreg']:.0f} MiB | |")
    for rank, result in sections.get("step", {}).get("result", {}).items():
        seconds = result["seconds"]
        rows.append(
            f"| training step, r {rank[1:]}, against plain LoRA | {seconds['lora']:.2f} s | {seconds['llmreg']:.2f} s "
            f"| {result['ratio']:.2f}x the time |"
        )
    return rows


def bench_calibration() -> list[str]:
    """Starts from data against PEFT, calibration over bare passes, and what quantisation loses; what was measured."""
    measured = read("bench_calibration")
    sections = {name: section["result"] | {"clock": section.get("clock")} for name, section in measured.items()}
    rows = ["| Llama, hidden 1024, 8 layers, 16 x 256 tokens | peer | exact | sketched |", "|---|---:|---:|---:|"]
    for name, table in (("corda", _corda), ("eva", _eva), ("passes", _passes)):
        rows += table(sections[name]) if name in sections else []
    on_gpu = _on_gpu(sections["gpu"], measured["gpu"]["gpu"]) if "gpu" in sections else []
    return [*rows, "", *on_gpu, "", *_quantized(sections["quantization"], sections["eora"])]


def _corda(result: dict[str, Any]) -> list[str]:
    rows = []
    for figure, label, unit in (
        ("seconds", "CorDA of all linears, from data to factors, against PEFT", "s"),
        ("decomposition", "the decomposition alone", "s"),
        ("extra_mib", "extra memory", "MiB"),
    ):
        peft, cells = result[figure]["peft"], [result[figure][form] for form in ("exact", "sketch")]
        ours = " | ".join(f"{cell:.{0 if cell > 50 else 1}f} {unit}, {peft / cell:.1f}x less" for cell in cells)
        busy = ", wall time" if unit == "s" and result["clock"] == "wall" else ""
        rows.append(f"| {label}{busy} | {peft:.0f} {unit} | {ours} |")
    held = " | ".join(f"{result['energy'][form]['least']:.3f}" for form in ("exact", "sketch"))
    return [*rows, f"| energy of `W C` in its components, over PEFT's, least of all layers | 1 | {held} |"]


def _eva(result: dict[str, Any]) -> list[str]:
    peft, cells = result["peft"], [result["seconds"][form] for form in ("exact", "sketch")]
    stopped = f"{peft['seconds']:.0f} s" + ("" if peft["converged"] else ", not converged")
    ours = " | ".join(f"{cell:.1f} s, {peft['seconds'] / cell:.1f}x less" for cell in cells)
    held = " | ".join(f"{result['captured'][form]['least']:.3f}" for form in ("exact", "sketch"))
    return [
        f"| EVA of all linears, against PEFT | {stopped} | {ours} |",
        f"| variance in its components, over the most possible, least of all layers | | {held} |",
    ]


def _passes(result: dict[str, Any]) -> list[str]:
    rows = []
    for method, label in (("corda", "CorDA"), ("eva", "EVA")):
        ours = " | ".join(f"{result['ratio'][f'{method} {form}']:.2f}x the time" for form in ("exact", "sketch"))
        rows.append(f"| calibration for {label}, against bare passes | {result['seconds']['bare']:.1f} s | {ours} |")
    return rows


def _on_gpu(result: dict[str, Any], gpu: str) -> list[str]:
    """Calibration over bare passes by the size of a batch."""
    sizes = [name for name in result if name.startswith("passes, ")]
    heads = [f"{name.removeprefix('passes, ')}, {form}" for name in sizes for form in ("exact", "sketched")]
    rows = [f"| Llama-2-7B shapes, {gpu} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for method, label in (("corda", "CorDA"), ("eva", "EVA")):
        ratios = [result[name]["ratio"][f"{method} {form}"] for name in sizes for form in ("exact", "sketch")]
        cells = " | ".join(f"{ratio:.2f}x the time" for ratio in ratios)
        rows.append(f"| calibration for {label}, against bare passes | {cells} |")
    return rows


def _quantized(quantization: dict[str, Any], eora: dict[str, Any]) -> list[str]:
    methods = ("QLoRA", "LoftQ 1", "QPiSSA 1", "LoftQ 5", "QPiSSA 5")
    rows = [
        f"| NF4, error over QLoRA's, mean of all layers | {' | '.join(methods)} |",
        "|---|" + "---:|" * len(methods),
    ]
    for name in ("pocket", "minilm"):
        result = quantization[name]
        for norm in ("frobenius", "nuclear"):
            cells = " | ".join(f"{result['mean'][method][norm]:.3f}" for method in methods)
            rows.append(f"| {name}, r {result['rank']}, {norm} norm | {cells} |")
    rows += ["", "| NF4, relative output error on held-out text | none | SVD | EoRA |", "|---|---:|---:|---:|"]
    for name in ("pocket", "minilm"):
        result = eora[name]
        cells = " | ".join(f"{result['mean'][kind]:.4f}" for kind in ("none", "svd", "eora"))
        rows.append(f"| {name}, r {result['rank']}, mean of {len(result['layers'])} layers | {cells} |")
    return rows


def sweep() -> list[str]:
    """Every recipe at the best of the rates that were tried: means over the seeds, on both worlds."""
    rows: list[str] = []
    entries = read("sweep")["recipes"]
    for task, columns in (("sft", ("word problems", "facts kept")), ("classification", ("macro F1", "accuracy"))):
        rows += (
            ["", f"| recipe | rates tried | best | seeds | {' | '.join(columns)} | on world 1 |"]
            if rows
            else [f"| recipe | rates tried | best | seeds | {' | '.join(columns)} | on world 1 |"]
        )
        rows.append("|---|---|---:|---:|---:|---:|---:|")
        for name, entry in entries.items():
            first = next(iter(entry["runs"].values()))
            if SCORES[task][0] in first["scores"] and "divergence" not in first:  # those have a table of their own
                rows.append(_sweep_row(name, entry))
    return rows


def _sweep_row(name: str, entry: dict[str, Any]) -> str:
    tried, best = summaries(entry), best_rate(entry)
    first, second = (f"{mean:.1%}" for mean in tried[best]["means"])
    other = summaries(entry, world=1).get(best)
    elsewhere = ", ".join(f"{mean:.1%}" for mean in other["means"]) if other else ""
    rates = ", ".join(f"{rate:.1e}" for rate in tried)
    return f"| `{name}` | {rates} | {best:.1e} | {tried[best]['runs']} | {first} | {second} | {elsewhere} |"


def conditioning() -> list[str]:
    """Condition numbers of the trained factors A and B at one learning rate."""
    rows = ["| at 1.0e-03, seed 0 | median | largest | loss at the end | word problems |", "|---|---:|---:|---:|---:|"]
    labels = {
        "quickstart": "PiSSA",
        "pocket-sorsa, start only": "SORSA without its regulariser",
        "pocket-sorsa": "SORSA (gamma 4e-4, mean over factors)",
        "pocket-sorsa, sum": "SORSA (gamma 4e-4, sum over layers)",
    }
    entries = read("sweep")["recipes"]
    for name, label in labels.items():
        run = entries[name]["runs"][key(name, 1e-3, 0)]
        numbers, solved = run["condition"], run["scores"]["pocket/word-problems"]["after"]
        rows.append(
            f"| {label} | {numbers['median']:.2f} | {numbers['largest']:.2f} | {run['train_loss']:.3f} | {solved:.1%} |"
        )
    return rows


def bench_adapters() -> list[str]:
    """A training step of each method over its peer's, and peak memory, by rank and tokens."""
    sections = read("bench_adapters")
    steps = dict(sections["step"]["result"])
    steps |= {f"hidden 2048, {key}": cell for key, cell in sections["wide"]["result"].items()}
    rows = ["| training step | " + " | ".join(steps) + " |", "|---|" + "---:|" * len(steps)]
    cells = steps.values()
    names = {"pissa": "PiSSA", "sorsa": "SORSA, regulariser included", "svfit": "SVFit", "LoRA again": "(the noise)"}
    for name, label in names.items():
        ratios = " | ".join(
            f"{cell[name]['ratio']['step']:.2f}x, {cell[name]['memory']['peak_mib']:.0f} MiB" for cell in cells
        )
        rows.append(f"| {label} over plain LoRA | {ratios} |")
    lora = " | ".join(f"{cell['LoRA']['memory']['peak_mib']:.0f} MiB" for cell in cells)
    products = " | ".join(f"{cell['products']:.2f}x" for cell in cells)
    rows += [
        f"| plain LoRA's own memory | {lora} |",
        f"| multiplications of PiSSA's and SORSA's form over LoRA's | {products} |",
    ]
    rows += ["", "| training step | " + " | ".join(sections["bone"]["result"])]
    rows[-1] += " |"
    rows.append("|---|---:|---:|---:|---:|")
    cells = sections["bone"]["result"].values()
    for name in ("bone", "mini", "bat"):
        key, peer = ("bone", "MiSS") if name == "bone" else (f"bone {name}", f"MiSS {name}")
        over = [next(v for k, v in cell["over_miss"].items() if k in (name, key)) for cell in cells]
        memory = [(cell["memory"][key]["peak_mib"], cell["memory"][peer]["peak_mib"]) for cell in cells]
        shown_cells = [f"{o['step']:.2f}x, {m:.0f} of {p:.0f} MiB" for o, (m, p) in zip(over, memory, strict=True)]
        rows.append(f"| Bone `{name}` over PEFT's MiSS | {' | '.join(shown_cells)} |")
    return rows


def bench_regularizers() -> list[str]:
    """Steps with regularisers over stock ones, each with the least that its multiplications allow; peak memory."""
    measured = read("bench_regularizers")
    sections = {name: section["result"] for name, section in measured.items()}
    rows = _sft_steps(sections["sft"], "SFT")
    steps = [("orthonormal", "SORSA", "SORSA, orthonormal term "), ("grpo", "TRL", "GRPO, Lp-Reg, ")]
    measured_steps = [(sections[name], peer, label) for name, peer, label in steps if name in sections]
    if measured_steps:
        rows += ["", "| a step over the stock one | time | floor |", "|---|---:|---:|"]
    for result, peer, label in measured_steps:
        rows += _steps(result, peer, label)
    if "memory" in sections:
        rows += ["", *_peaks(sections["memory"])]
    if "gpu" in sections:
        gpu = measured["gpu"]["gpu"]
        rows += ["", *_sft_steps(sections["gpu"]["sft"], f"SFT, {gpu}")]
        rows += ["", f"| GRPO, {gpu}, over TRL's step | time | floor |", "|---|---:|---:|"]
        rows += _steps(sections["gpu"]["grpo"], "TRL", "Lp-Reg, ")
    return rows


def _sft_steps(result: dict[str, Any], label: str) -> list[str]:
    """Over TRL's step with a forward pass of a teacher."""
    peer = "TRL, teacher forward"
    rows = [
        f"| {label}, over TRL and a forward pass of the base | half of the tokens scored | floor | all | floor |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in result["half"]["seconds"]:
        if name != peer:
            parts = (result["half"], result["all"])
            cells = [(part["over"][peer][name], part["floor"][name]) for part in parts]
            rows.append(f"| {name} | " + " | ".join(f"{over:.2f}x | {floor:.2f}x" for over, floor in cells) + " |")
    return rows


def _steps(result: dict[str, Any], peer: str, label: str) -> list[str]:
    floors = {name: f"{floor:.2f}x" for name, floor in result["floor"].items()}
    times = {name: over for name, over in result["over"][peer].items() if name != peer}
    return [f"| {label}{name} | {over:.2f}x | {floors.get(name, '')} |" for name, over in times.items()]


def _peaks(result: dict[str, Any]) -> list[str]:
    """By vocabulary: what a step takes over the loaded model, over what TRL's takes."""
    sizes = list(dict.fromkeys(key.split(", ")[1] for key in result))
    heads = [f"vocabulary {int(size):,}" for size in sizes]
    rows = [f"| peak memory of a step, over that of TRL's | {' | '.join(heads)} |", "|---|" + "---:|" * len(sizes)]
    for kind in ("sft", "grpo"):
        label = {"sft": "SFT, ", "grpo": "GRPO, Lp-Reg, "}[kind]
        for name in result[f"{kind}, {sizes[0]}"]:
            cells = [result[f"{kind}, {size}"][name] for size in sizes]
            if name == "TRL":
                shown_cells = " | ".join(f"{cell['extra_mib']:.0f} MiB" for cell in cells)
                rows.append(f"| {kind.upper()}, TRL itself | {shown_cells} |")
            else:
                rows.append(f"| {label}{name} | " + " | ".join(f"{cell['over_trl']:.2f}x" for cell in cells) + " |")
    return rows


def fill(text: str, name: str, rows: list[str]) -> str:
    """Replace what stands between the markers of `name`."""
    block = f"<!-- {name} -->\n" + "\n".join(rows) + f"\n<!-- end {name} -->"
    pattern = rf"<!-- {name} -->.*?<!-- end {name} -->"
    return re.sub(pattern, lambda _: block, text, count=1, flags=re.DOTALL)


def picture(report: dict[str, Any], path: Path) -> None:
    """Training loss beside the scores before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained")
    left.plot(
        [point["step"] for point in report["losses"]], [point["loss"] for point in report["losses"]], color="#3b6fb6"
    )
    left.set(
        xlabel="step", ylabel="training loss", title=f"{report['method']} on {report['model']}, seed {report['seed']}"
    )
    scores = [m for m in report["measurements"] if "exact" in m["metric"]]
    for place, score in enumerate(scores):
        for offset, when, colour in ((-0.2, "before", "#b8b8b8"), (0.2, "after", "#3b6fb6")):
            bar = right.bar(place + offset, 100 * score[when], 0.38, color=colour, label=when if place == 0 else None)
            right.bar_label(bar, fmt="%.0f %%")
    right.set(ylim=(0, 115), ylabel="exact match, %", title="task learned, facts forgotten")
    right.set_xticks(range(len(scores)), [score["name"].removeprefix("pocket/") for score in scores])
    right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def kept() -> list[str]:
    """What was learned and what was kept at every rate, of the recipes that differ in that."""
    entries = read("sweep")["recipes"]
    rows = ["| recipe | rate: word problems, facts kept (seeds) |", "|---|---|"]
    for name in ("pocket-lora", "quickstart", "pocket-corda", "pocket-corda-kpm", "pocket-eva"):
        cells = [
            f"{rate:.1e}: {row['means'][0]:.0%}, {row['means'][1]:.0%} ({row['runs']})"
            for rate, row in summaries(entries[name]).items()
        ]
        rows.append(f"| `{name}` | {' · '.join(cells)} |")
    return rows


def kept_at_equal_score() -> list[str]:
    """The facts that are kept where the task is learned as well."""
    entries, wanted = read("sweep")["recipes"], (0.7, 0.8, 0.85, 0.9, 0.95)
    rows = [f"| word problems at least | {' | '.join(f'{score:.0%}' for score in wanted)} |"]
    rows.append("|---|" + "---:|" * len(wanted))
    for name in ("pocket-lora", "quickstart", "pocket-corda", "pocket-corda-kpm", "pocket-eva"):
        cells = [kept_at(entries[name], score) for score in wanted]
        shown_cells = [f"{statistics.mean(cell):.0%} ({len(cell)})" if cell else "never" for cell in cells]
        rows.append(f"| `{name}` | {' | '.join(shown_cells)} |")
    return rows


def first_steps_table() -> list[str]:
    """The first hundred steps, each method at its best rate."""
    rows = [
        "| three seeds | rate | first gradient norm | loss around step 50 | around step 100 |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, rate, _, *cells in first_steps_summary(read("first_steps")):
        rows.append(f"| {method} | {rate} | {' | '.join(cells)} |")
    return rows


def balora_divergence() -> list[str]:
    """PiSSA and BA-LoRA at every rate: how well the task was learned, and how far the model went from its base."""
    rows = ["| 500 steps | rate | seeds | word problems | task loss | KL, corpus | KL, facts |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    entries = read("sweep")["recipes"]
    for name in (name for name, sweep in SWEEPS.items() if sweep.divergence and name in entries):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for label, run in entries[name]["runs"].items():
            by_rate.setdefault(float(label.split(" lr=")[1].split()[0]), []).append(run)
        for rate, runs in sorted(by_rate.items()):
            solved = statistics.mean(run["scores"][SCORES["sft"][0]]["after"] for run in runs)
            losses = [run["task_loss"] for run in runs]
            means = [statistics.mean(run["divergence"][text] for run in runs) for text in TEXTS]
            numbers = " | ".join(f"{value:.3g}" for value in (statistics.mean(losses), *means))
            rows.append(f"| {name.replace(', 500 steps', '')} | {rate:.1e} | {len(runs)} | {solved:.1%} | {numbers} |")
    return rows


#: Task losses at which the divergence is compared, nats a token of the answer.
LOSSES = (0.8, 0.6, 0.4, 0.2)


def divergence_at_equal_loss() -> list[str]:
    """The divergence at equal task losses: of each seed between the two rates around a loss, linear in its log.

    The geometric mean of the seeds that have rates on both sides, and the least and most of them.
    """
    entries, rows = read("sweep")["recipes"], []
    for name in (name for name, sweep in SWEEPS.items() if sweep.divergence and name in entries):
        seeds: dict[str, list[dict[str, Any]]] = {}
        for label, run in entries[name]["runs"].items():
            seeds.setdefault(label.split("seed=")[1].split()[0], []).append(run)
        for text in TEXTS:
            cells = []
            for loss in LOSSES:
                found = [one for runs in seeds.values() if (one := _divergence_at(runs, text, loss)) is not None]
                mean = f"{statistics.geometric_mean(found):.2g}" if found else ""
                cells.append(mean + (f" ({min(found):.2g} to {max(found):.2g})" if len(found) > 1 else ""))
            rows.append([f"{name.replace(', 500 steps', '')}, {text.removeprefix('pocket/')}", *cells])
    return _table(["KL at a task loss of", *(f"{loss:g}" for loss in LOSSES)], rows)


def _divergence_at(runs: list[dict[str, Any]], text: str, loss: float) -> float | None:
    """None where this seed's runs are all above that loss, or all below."""
    points = sorted((run["task_loss"], math.log(run["divergence"][text])) for run in runs)
    for (low, below), (high, above) in pairwise(points):
        if low <= loss <= high:
            return math.exp(below + (above - below) * (loss - low) / (high - low))
    return None


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def bandit_table() -> list[str]:
    """The probability of the spark after three batches and after thirty, medians over seeds."""
    runs, times, rows = read("bandit")["runs"], [bandit.SHOWN.index(batches) for batches in (3, 30)], []
    for method in bandit.METHODS:
        cells = []
        for rate in bandit.RATES:
            sparks = [runs[f"{method} {rate:g} {seed}"]["spark"] for seed in bandit.SEEDS]
            cells.append(" / ".join(f"{statistics.median(one[at] for one in sparks):.4f}" for at in times))
        rows.append([method, *cells])
    return _table(["spark, 0.02 at the start", *(f"rate {rate:g}" for rate in bandit.RATES)], rows)


def imbalance_table() -> list[str]:
    """Each method at its best rate."""
    rows = imbalance.cells(imbalance.summary(read("imbalance")))
    return _table([f"{len(imbalance.SEEDS)} seeds", "rate or penalty", *imbalance.COLUMNS], rows)


def lp_reg_table() -> list[str]:
    """GRPO against what is to keep its entropy, each at its best rate."""
    return _table([f"{lp_reg.STEPS} updates", "rate", "seeds", *lp_reg.COLUMNS], lp_reg.best_rows(read("lp_reg")))


def main() -> None:
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "against_peft", against_peft())
    text = fill(text, "sweep", sweep())
    text = fill(text, "kept", kept())
    text = fill(text, "kept_at_equal_score", kept_at_equal_score())
    text = fill(text, "first_steps", first_steps_table())
    text = fill(text, "balora_divergence", balora_divergence())
    text = fill(text, "divergence_at_equal_loss", divergence_at_equal_loss())
    text = fill(text, "imbalance", imbalance_table())
    text = fill(text, "bandit", bandit_table())
    text = fill(text, "lp_reg", lp_reg_table())
    text = fill(text, "conditioning", conditioning())
    text = fill(text, "bench_adapters", bench_adapters())
    text = fill(text, "bench_regularizers", bench_regularizers())
    text = fill(text, "bench_calibration", bench_calibration())
    write_text(readme, fill(text, "bench_init", bench_init()))
    if len(sys.argv) > 1:
        picture(json.loads(Path(sys.argv[1]).read_text()), ROOT / "docs" / "quickstart.png")


if __name__ == "__main__":
    main()
