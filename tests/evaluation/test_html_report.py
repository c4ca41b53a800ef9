"""The page of a run: complete, closed to the network, safe with any string, and legible on every medium."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmreg.evaluation.html_report import write_html
from llmreg.evaluation.measure import Measurement
from llmreg.evaluation.report import Report

NASTY = '<script>alert("x")</script><b>&amp;\'"</b> {{ 7 * 7 }}'
LONG = "organisation/" + "a-name-without-end-" * 12 + "x" * 200
VOID = {"meta", "link", "br", "hr", "img", "input"}
OPTIONAL = {
    "Before and after": ("measurements", "heldout_loss"),
    "Training loss": ("losses",),
    "Regularisers": ("regularizers",),
    "Spectrum": ("singular_values",),
    "Exported to": ("export",),
    "Recipe": ("recipe",),
    "Versions": ("versions",),
}


def report(**changes) -> Report:
    """A run with everything in it."""
    noise = random.Random(0)
    values = {
        "method": "pissa",
        "model": "pocket",
        "seed": 7,
        "measurements": (
            Measurement("problems", "exact match", "task", 200, 0.0, 0.645),
            Measurement("facts", "exact match", "forgetting", 200, 1.0, 0.485),
            Measurement("corpus", "perplexity", "forgetting", 200, 1.88, 1.92),
            Measurement("labels", "macro F1", "forgetting", 50, 0.5, 0.5),
        ),
        "heldout_loss": {"before": 2.345, "after": 1.234},
        "steps": 400,
        "train_loss": 1.5,
        "losses": tuple(
            {"step": step, "loss": 4 * math.exp(-step / 80) + noise.random(), "learning_rate": 1e-3 * (1 - step / 400)}
            for step in range(400)
        ),
        "trainable_parameters": 163_840,
        "total_parameters": 1_375_744,
        "adapter_bytes": 1_317_912,
        "rank": 32,
        "start_hash": "4eed4b17" * 8,
        "peak_memory_mib": {"process": 716.1, "gpu": 71_234.0},
        "seconds": {"load": 1.2, "init": 3.5, "evaluate": 2.8, "train": 5400.0, "save": 0.1, "total": 5410.0},
        "adapter": "runs/quickstart/adapter",
        "export": {"path": "runs/quickstart/lora", "rank": 16, "dtype": "bfloat16", "relative_error": 0.0032},
        "load": ("base = load()", "model = mount(base)"),
        "versions": {"torch": "2.13.0", "llmreg": "0.1.0"},
        "machine": {"system": "Linux", "cores": 2, "gpu": None},
        "regularizers": {"dfa": [[step, math.exp(-step / 100)] for step in range(400)], "nsvd": [[0, 1.0], [9, 2.0]]},
        "singular_values": {f"layers.{i}.q_proj": [(1 + i) * 0.9**k for k in range(32)] for i in range(4)},
        "recipe": "model: {name: pocket}\ntask: sft\n",
    }
    return Report(**{**values, **changes})


@pytest.fixture
def page(tmp_path):
    """A function (values of a report) -> the text of its page."""

    def written(values) -> str:
        write_html(values, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return written


class Outline(HTMLParser):
    """Elements, attributes and text of a page; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


# -- what it says ---------------------------------------------------------------------------------------------


def test_the_summary_says_in_words_what_was_learned_forgotten_and_kept(page):
    text = Outline(page(report().as_dict())).text
    assert "Learned: exact match on problems rose from 0.0% to 64.5%." in text
    assert (
        "Forgotten: exact match on facts fell from 100.0% to 48.5%; perplexity on corpus rose from 1.88 to 1.92."
        in text
    )
    assert "Kept: macro F1 on labels stayed at 50.0%." in text


def test_a_task_that_did_not_improve_is_not_called_learned(page):
    flat = Measurement("problems", "exact match", "task", 200, 0.3, 0.2)
    text = Outline(page(report(measurements=(flat,)).as_dict())).text
    assert "Not learned: exact match on problems fell from 30.0% to 20.0%." in text


def test_a_perplexity_that_is_no_number_counts_as_forgotten(page):
    rows = [{"name": "corpus", "metric": "perplexity", "role": "forgetting", "rows": 9, "before": 2.0, "after": after}
            for after in (math.inf, math.nan)]  # fmt: skip
    text = Outline(page({"method": "pissa", "model": "pocket", "measurements": rows})).text
    assert "Forgotten: perplexity on corpus rose from 2.00 to inf; perplexity on corpus went from 2.00 to nan." in text


def test_without_measurements_the_summary_falls_back_to_the_losses(page):
    values = report(measurements=()).as_dict()
    assert "Held-out loss: it fell from 2.345 to 1.234." in Outline(page(values)).text
    values["heldout_loss"] = None
    assert "400 steps to a mean loss of 1.500; nothing was measured" in Outline(page(values)).text


def test_every_fact_of_the_report_is_on_the_page(page):
    text = Outline(page(report().as_dict())).text
    for fact in (
        "pissa on pocket", "seed 7", "−51.5 points", "+0.021 nats a token", "−1.111", "1 h 30 min", "716 MiB",
        "71,234 MiB", "163,840 of 1,375,744", "plain LoRA of rank 32, 1.3 MB", "runs/quickstart/adapter", "4eed4b17",
        "runs/quickstart/lora", "rank 16, bfloat16, relative error 3.2e-03", "base = load() model = mount(base)",
        "torch 2.13.0", "model: {name: pocket} task: sft", "dfa", "nsvd",
    ):  # fmt: skip
        assert fact in text


def test_report_json_gives_the_same_page_as_the_report_itself(page):
    values = report().as_dict()
    assert page(json.loads(json.dumps(values))) == page(values)


@pytest.mark.parametrize("section", OPTIONAL)
def test_a_section_without_its_values_is_left_out(page, section):
    values = report().as_dict()
    assert section in Outline(page(values)).text
    nothing = {**values, **dict.fromkeys(OPTIONAL[section])}
    missing = {key: value for key, value in values.items() if key not in OPTIONAL[section]}
    assert section not in Outline(page(nothing)).text
    assert section not in Outline(page(missing)).text


def test_a_report_of_only_a_name_is_still_a_page(page):
    assert "pissa on pocket" in Outline(page({"method": "pissa", "model": "pocket"})).text


# -- what it may not do ---------------------------------------------------------------------------------------


def nasty_report() -> dict:
    """Every string that can come from a user is markup, or longer than any screen is wide."""
    values = report(
        method=NASTY,
        model=LONG,
        measurements=(
            Measurement(NASTY, "exact match", "task", 1, 0.0, 1.0),
            Measurement(LONG, "perplexity", "forgetting", 1, 2.0, 300.0),
            Measurement("kind", NASTY, "forgetting", 1, 0.5, 1.0),
        ),
        regularizers={NASTY: [[0, 1.0], [1, 2.0]], LONG: [[0, 1e-9], [1, 2e5]]},
        adapter=NASTY + LONG,
        start_hash=NASTY,
        load=(NASTY, LONG),
        recipe=f"# {NASTY}\n# {LONG}",
        export={"path": NASTY + LONG, "rank": 1, "dtype": NASTY, "relative_error": 0.1},
        versions={NASTY: NASTY, "torch": LONG},
        machine={NASTY: NASTY, "processor": LONG},
        peak_memory_mib={NASTY: 1.0},
        seconds={NASTY: 1.0, "total": 2.0},
    )
    return values.as_dict()


def test_no_string_of_the_user_becomes_markup(page):
    text = page(nasty_report())
    outline = Outline(text)
    assert not outline.having("script")
    assert not outline.having("b")
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]
    assert outline.text.count("alert(") == text.count("&lt;script&gt;alert(") >= 15
    assert "{{ 7 * 7 }}" in text


def test_the_page_loads_nothing_and_forbids_itself_to(page):
    text = page(report().as_dict())
    outline = Outline(text)
    assert not [attributes for _, attributes in outline.elements if {"src", "href", "srcset"} & attributes.keys()]
    assert not re.search(r"https?://|url\(|@import", text)
    policy = next(tag["content"] for tag in outline.having("meta") if tag.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_path_that_is_not_unicode_does_not_cost_the_page(page):
    assert "runs/?/adapter" in page(report(adapter="runs/\udcff/adapter").as_dict())


def test_an_existing_page_is_replaced_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_html({"method": "pissa", "model": "pocket", "measurements": [{}]}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_run_of_a_large_model_stays_under_300_kb(page):
    noise = random.Random(0)
    steps = range(20_000)
    text = page(
        report(
            losses=tuple({"step": step, "loss": noise.random(), "learning_rate": noise.random()} for step in steps),
            regularizers={f"term {i}": [[step, noise.random()] for step in steps[::10]] for i in range(30)},
            singular_values={f"layer {i}": [noise.random() for _ in range(500)] for i in range(50)},
        ).as_dict()
    )
    assert len(text.encode()) < 300_000


# -- accessibility --------------------------------------------------------------------------------------------


def test_every_plot_has_a_title_and_every_header_a_scope(page):
    text = page(report().as_dict())
    outline = Outline(text)
    images = [attributes for attributes in outline.having("svg") if attributes.get("role") == "img"]
    assert len(images) == len(re.findall(r'<svg role="img"[^>]*>\s*<title>[^<]{10,}</title>', text)) == 9
    assert all(
        attributes.get("aria-hidden") == "true" for attributes in outline.having("svg") if attributes not in images
    )
    assert all(attributes.get("scope") for attributes in outline.having("th"))
    assert outline.having("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in pairwise(levels))


def test_text_has_a_contrast_of_4_5_to_1_in_light_in_dark_and_on_paper(page):
    schemes = re.findall(r":root \{([^}]*)\}", page(report().as_dict()))
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for ground in ("paper", "tint"):
            for text in ("ink", "soft", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (scheme, text, ground)


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio of relative luminances."""

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


# -- in a browser ---------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PHONE = 360


@pytest.fixture
def browser(tmp_path):
    """A function (page, *flags) that opens a page in headless Chromium and returns its standard output."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile")

    def opened(path: Path, *more: str) -> str:
        command = [CHROMIUM, *flags, *more, path.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return opened


def test_chromium_draws_it_light_dark_on_a_phone_and_on_paper(browser, tmp_path):
    import matplotlib.image

    path = tmp_path / "report.html"
    write_html(report().as_dict(), path)
    views = {"light": (900, 1400), "dark": (900, 1400), "phone": (PHONE, 800)}
    for name, (width, height) in views.items():
        scheme = ["--force-dark-mode"] if name == "dark" else []
        browser(path, f"--window-size={width},{height}", f"--screenshot={tmp_path / name}.png", *scheme)
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert pixels.shape == (height, width, 3)
        ground = pixels[2, 2]
        assert ground.max() < 0.2 if name == "dark" else ground.min() > 0.95
        written = np.abs(pixels - ground).max(axis=-1) > 0.4
        assert 0.01 < written.mean() < 0.3
        assert not written[:, :12].any(), "something runs over the left margin"
        assert not written[:, -12:].any(), "something runs over the right margin"
    browser(path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--force-dark-mode")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 8


@pytest.mark.parametrize("values", [report().as_dict(), nasty_report()], ids=["plain", "nasty"])
def test_nothing_on_a_phone_is_wider_than_the_phone(browser, tmp_path, values):
    path = tmp_path / "report.html"
    write_html(values, path)
    measuring = "<script>parent.document.title = [innerWidth, document.documentElement.scrollWidth]</script></body>"
    page = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text()).replace("</body>", measuring)
    # a window cannot be as narrow as a phone, a frame can
    frame = tmp_path / "frame.html"
    frame.write_text(f'<title></title><iframe width="{PHONE}" height="800" frameborder="0" srcdoc="{escape(page)}">')
    seen = browser(frame, "--window-size=800,900", "--dump-dom")
    assert re.search(r"<title>(.*?)</title>", seen).group(1) == f"{PHONE},{PHONE}"
