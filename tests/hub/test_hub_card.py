"""The model card: everything that is known of an adapter, nothing of the machine it was trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import adapter_files as saved
import peft
import pytest
import tiny_models
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import llmreg
from llmreg.errors import AdapterFileError, RecipeError
from llmreg.hub import read_sidecar
from llmreg.hub.card import model_card, write_card
from llmreg.hub.privacy import hub_id, is_local, neutral, neutral_text
from llmreg.hub.serving import served_rank
from llmreg.hub.sidecar import BaseRecord, Sidecar
from llmreg.methods import get_method

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LORA = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base-1b",
}
RECIPE = {
    "model": {"name": "org/base-1b", "revision": COMMIT, "dtype": "auto"},
    "task": "sft",
    "data": {"train": "org/questions", "split": "train"},
    "adapter": {"method": "pissa", "r": 4, "target_modules": r"model\.layers\.\d+\.(q|v)_proj"},
    "training": {"learning_rate": 0.001, "max_steps": 20, "eos_token": "<|im_end|>"},
    "evaluation": {"tasks": ["org/questions"], "forgetting": ["pocket/facts", "org/texts"]},
    "output": {"dir": "runs/mine", "export": "lora"},
    "seed": 7,
}
REPORT = {
    "method": "pissa",
    "model": "org/base-1b",
    "seed": 7,
    "steps": 20,
    "trainable_parameters": 123456,
    "heldout_loss": {"before": 2.5, "after": 1.25},
    "measurements": [
        {"name": "org/questions", "metric": "exact match", "role": "task", "rows": 50, "before": 0.1, "after": 0.64},
        {"name": "pocket/facts", "metric": "exact match", "role": "forgetting", "rows": 9, "before": 1.0, "after": 0.9},
        {"name": "org/texts", "metric": "perplexity", "role": "forgetting", "rows": 5, "before": 3.0, "after": 3.5},
    ],
    "export": {"path": "/home/somebody/runs/mine/lora", "rank": 6, "dtype": "bfloat16", "relative_error": 0.0123},
    "versions": {"torch": "2.13.0+cpu", "peft": "0.21.2"},
    "adapter": "/home/somebody/runs/mine/adapter",
    "machine": {"system": "Linux", "processor": "the-processor", "gpu": "the-gpu"},
}


def sidecar_of(config: dict, name: str | None = "org/base-1b") -> Sidecar:
    base = BaseRecord("a" * 64, "checkpoint", name, COMMIT if name else None, "b" * 64, "nf4")
    files = {"adapter_model.safetensors": "e" * 64, "llmreg_factors.safetensors": "f" * 64}
    return Sidecar(Path("adapter"), "pissa", config, files, base, "c" * 64, {"torch": "2.13.0", "llmreg": "0.1.0"})


PISSA = sidecar_of({"r": 4, "rank_pattern": {"v_proj": 6}})
SAVED = {**LORA, "r": 8, "rank_pattern": {"v_proj": 12}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("somebodys-secret-base"))


@pytest.fixture
def adapter(base, tmp_path):
    config = llmreg.PissaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    saved.drift(peft.get_peft_model(saved.load_base(base), config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def data_of(text: str) -> dict:
    """The metadata block, as the Hub reads it."""
    return ModelCard(text).data.to_dict()


def recipe_of(text: str) -> dict:
    """The recipe in the card, read back."""
    return yaml.safe_load(re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, re.S | re.M)[2])


# -- what it tells ---------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_reads():
    data = data_of(model_card(SAVED, sidecar=PISSA, recipe=RECIPE, report=REPORT, license={"license": "apache-2.0"}))
    assert data["library_name"] == "peft"
    assert data["base_model"] == "org/base-1b"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert {"llmreg", "pissa", "lora"} <= set(data["tags"])
    results = {row["dataset"]["type"]: row["metrics"][0] for row in data["model-index"][0]["results"]}
    assert results["org/questions"] == {"type": "exact_match", "value": 0.64, "name": "exact match"}
    assert results["org/texts"]["value"] == 3.5


def test_base_revision_hashes_ranks_and_versions_are_told():
    text = model_card(SAVED, sidecar=PISSA, recipe=RECIPE, report=REPORT)
    for known in ("org/base-1b", COMMIT, "a" * 64, "b" * 64, "c" * 64, "nf4", "torch 2.13.0", "llmreg 0.1.0", "123456"):
        assert known in text
    assert "| rank as trained | 6 |" in text
    assert "| rank as saved | 12 |" in text
    assert "rank 6, bfloat16, relative error 1.230e-02" in text


@pytest.mark.parametrize("name", ["pissa", "lora"])
def test_the_method_is_told_from_the_catalogue(name):
    method = get_method(name)
    text = model_card(LORA, report={"method": name})
    assert method.what in text
    assert method.paper.title in text
    assert f"https://arxiv.org/abs/{method.paper.arxiv}" in text


def test_the_whole_recipe_stands_in_the_card_and_reads_back():
    told = recipe_of(model_card(SAVED, sidecar=PISSA, recipe=RECIPE, report=REPORT))
    assert told == {**RECIPE, "output": {"dir": "output", "export": "lora"}}


def test_scores_before_and_after_are_a_table():
    text = model_card(SAVED, sidecar=PISSA, recipe=RECIPE, report=REPORT)
    assert "| org/questions (exact match) | task | 50 | 10.0% | 64.0% | +54.0 points |" in text
    assert "| pocket/facts (exact match) | forgetting | 9 | 100.0% | 90.0% | -10.0 points |" in text
    assert "| org/texts (perplexity) | forgetting | 5 | 3.000 | 3.500 | +0.500 |" in text
    assert "| held-out loss | task | | 2.500 | 1.250 | -1.250 |" in text


def test_a_score_that_is_no_number_is_shown_but_not_claimed_to_the_hub():
    row = {"name": "org/questions", "metric": "perplexity", "role": "task", "rows": 5, "before": 3.0}
    text = model_card(LORA, report={"measurements": [{**row, "after": float("nan")}]})
    assert "| 3.0 | nan |" in text
    assert "model-index" not in data_of(text)


def test_a_licence_that_is_not_known_is_left_out_and_said():
    text = model_card(LORA)
    assert "license" not in data_of(text)
    assert "licence of the base model was not known" in text


def test_a_recipe_cannot_break_out_of_its_fence():
    recipe = {**RECIPE, "data": {"train": "org/x", "columns": {"prompt": "```\n# heading\n```` {question}"}}}
    assert recipe_of(model_card(LORA, recipe=recipe))["data"]["columns"] == recipe["data"]["columns"]


def test_a_name_cannot_break_the_table():
    text = model_card(LORA, report={"measurements": [{"name": "org/x", "metric": "a | b\nc", "before": 1, "after": 1}]})
    assert "(a \\| b c)" in text


# -- how to load and train on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 8, 12, 32, 100, 512])
def test_vllm_is_given_a_rank_that_holds_the_adapter(rank):
    text = model_card({**LORA, "r": rank})
    assert f"--max-lora-rank {served_rank(rank)} " in text
    assert "vllm serve org/base-1b --enable-lora" in text


@pytest.mark.parametrize(
    "changed",
    [{"r": 513}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"rank_pattern": {"q": 2}}],
)
def test_what_vllm_would_refuse_or_misread_is_said_instead_of_a_command(changed):
    text = model_card({**LORA, **changed})
    assert "vLLM does not serve it" in text
    assert "--max-lora-rank" not in text


def test_the_python_in_the_card_is_python():
    for sidecar in (PISSA, None):
        blocks = re.findall(r"```python\n(.*?)```", model_card(SAVED, sidecar=sidecar), re.S)
        assert len(blocks) == (2 if sidecar else 1)
        for block in blocks:
            compile(block, "card", "exec")
            assert f'org/base-1b", revision="{COMMIT}' in block or not sidecar


def test_the_card_says_what_training_further_means():
    text = model_card(SAVED, sidecar=PISSA)
    assert "in plain PEFT trains an ordinary LoRA of rank 12" in text
    assert "With llmreg it resumes exactly" in text
    assert "resumes exactly" not in model_card(LORA)


@pytest.mark.parametrize(
    ("changed", "tag"),
    [
        ({"task_type": "SEQ_CLS"}, "text-classification"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, "text-generation"),
        ({"task_type": None, "auto_mapping": None}, None),
    ],
)
def test_the_pipeline_tag_follows_the_task(changed, tag):
    assert data_of(model_card({**LORA, **changed})).get("pipeline_tag") == tag


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_gets_a_card_that_validates(adapter, base):
    text = write_card(adapter, recipe=yaml.safe_dump(RECIPE), report=REPORT)
    assert (adapter / "README.md").read_text() == text
    sidecar = read_sidecar(adapter)
    assert sidecar.base.digest in text
    assert sidecar.base.stored_bytes in text
    assert sidecar.start_hash in text
    assert "base_model" not in data_of(text)
    assert base.name not in text
    assert str(base) not in text


def test_a_model_of_the_recipe_that_was_a_folder_is_not_named(adapter):
    """`org/base-1b` looks like a Hub id, but the sidecar knows of no such id: it was a folder."""
    told = recipe_of(write_card(adapter, recipe=yaml.safe_dump(RECIPE)))
    assert told["model"]["name"] == "local-model"


def test_plain_lora_gets_a_card_too(base, tmp_path):
    peft.get_peft_model(saved.load_base(base), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    recipe = yaml.safe_dump({**RECIPE, "adapter": {"method": "lora", "r": 3}})
    text = write_card(tmp_path, recipe=recipe, report={**REPORT, "method": "lora"})
    assert "| rank as trained | 3 |" in text
    assert "lora" in data_of(text)["tags"]
    assert base.name not in text


def test_the_pocket_model_is_named_and_loads_from_the_package(tmp_path):
    config = {**LORA, "base_model_name_or_path": "/somewhere/site-packages/llmreg/pocket/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = write_card(tmp_path, recipe=yaml.safe_dump({**RECIPE, "model": {"name": "pocket"}}))
    assert "llmreg.pocket.load_model()" in text
    assert "base_model" not in data_of(text)
    assert recipe_of(text)["model"] == {"name": "pocket"}


def test_the_licence_comes_from_the_card_beside_the_base(adapter, base):
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    data = data_of(write_card(adapter))
    (base / "README.md").unlink()
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert "license_link" not in data


def test_an_exported_adapter_tells_the_error_and_where_it_comes_from(adapter, tmp_path):
    report = llmreg.export_lora(adapter, tmp_path / "lora", rank=3)
    text = (tmp_path / "lora" / "README.md").read_text()
    error = f"{report.relative_error:.3e}"
    assert f"Relative error of the recompression (Frobenius, all layers): {error}." in text
    assert "| rank as trained | 4 |" in text
    assert "| rank as saved | 3 |" in text
    assert read_sidecar(adapter).start_hash in text
    assert "resumes exactly" not in text
    whole = {"export": {"path": "runs/lora", "rank": 3, "dtype": "float32", "relative_error": report.relative_error}}
    assert error in write_card(tmp_path / "lora", report=whole)


@pytest.mark.parametrize("recipe", ["", "- 1", "a: [", "text", "\t"])
def test_a_recipe_that_is_no_mapping_is_refused_and_the_old_card_stays(adapter, recipe):
    before = (adapter / "README.md").read_bytes()
    with pytest.raises(RecipeError, match="mapping in YAML"):
        write_card(adapter, recipe=recipe)
    assert (adapter / "README.md").read_bytes() == before


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is missing"):
        write_card(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterFileError, match="damaged"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


# -- what it never tells ---------------------------------------------------------------------------------------------

NAMES = st.text("abcXYZ09_é", min_size=3, max_size=8).map(lambda text: f"marker{text}")
PATHS = st.builds(
    lambda form, first, last, suffix: form.format(first, last) + suffix,
    st.sampled_from(
        [
            "/home/{0}/{1}",
            "/home/{0} smith/my models/{1}",
            "/Users/{0}/Library/{1}",
            "/root/{0}{1}",
            "/{0}/{1}",
            "~/{0}/{1}",
            "~{0}/{1}",
            "./{0}/{1}",
            "../{0}/../{1}",
            "$HOME/{0}/{1}",
            "${{SCRATCH}}/{0}/{1}",
            "%USERPROFILE%\\{0}\\{1}",
            "C:\\Users\\{0} x\\{1}",
            "D:/{0}/{1}",
            "\\\\{0}\\share\\{1}",
            "file:///home/{0}/{1}",
            "s3://{0}/{1}",
            "{0}/sub/{1}",
        ]
    ),
    NAMES,
    NAMES,
    st.sampled_from(["", "/", ".jsonl", ".parquet", "/config.json"]),
)
KEYS = "hf_{0} sk-{0} sk-proj-{0} ghp_{0} github_pat_{0} AKIA{0} glpat-{0} bearer\u00a0{0} api_key={0} password:{0}"
TOKENS = st.builds(
    lambda form, body: form.format(body),
    st.sampled_from(KEYS.split(" ")),
    st.text("abcdefGHIJKL0123456789", min_size=20, max_size=34).map(lambda text: f"marker{text}"),
)
few = settings(max_examples=60, deadline=None)
#: Where a recipe takes text, as a function that puts it there.
SLOTS = {
    "model": lambda text: {"model": {"name": text}},
    "train": lambda text: {"data": {"train": text, "test": text}},
    "tasks": lambda text: {"evaluation": {"tasks": [text], "forgetting": text}},
    "output": lambda text: {"output": {"dir": text}},
    "training": lambda text: {"training": {"chat_template_path": text, "hub_token": text, "logging_dir": text}},
    "nested": lambda text: {"training": {"model_init_kwargs": {"cache": [{"where": text}]}}},
    "calibration": lambda text: {"calibration": {"data": text}},
    "unknown": lambda text: {"somewhere": text, "new": {"deep": [text]}},
}


@pytest.mark.parametrize("slot", SLOTS)
@few
@given(text=st.one_of(PATHS, TOKENS))
def test_no_path_and_no_secret_of_a_recipe_gets_into_the_card(slot, text):
    assert "marker" not in model_card(LORA, recipe={**RECIPE, **SLOTS[slot](text)})


@few
@given(text=st.one_of(PATHS, TOKENS), prose=st.sampled_from(["see {}", "run at '{}'", "--data {} --more", "a: {}\nb"]))
def test_nor_where_it_stands_inside_other_text(text, prose):
    inside = prose.format(text)
    if "/sub/" not in text:  # a relative path in prose cannot be told from a fraction
        assert "marker" not in model_card(LORA, recipe={**RECIPE, "training": {"run_name": inside}})


@few
@given(text=st.one_of(PATHS, TOKENS))
def test_no_path_and_no_secret_of_config_sidecar_or_report_gets_into_the_card(text):
    row = {"name": text, "metric": "exact match", "role": "task", "rows": 1, "before": 0.0, "after": 1.0}
    report = {**REPORT, "model": text, "method": text, "adapter": text, "measurements": [row], "load": [text]}
    report |= {"machine": {"gpu": text}, "versions": {"torch": text}, "start_hash": text}
    report["export"] = {"path": text, "rank": 2, "dtype": text, "relative_error": 0.1}
    config = {**LORA, "base_model_name_or_path": text, "revision": text}
    assert "marker" not in model_card(config, report=report, recipe={"model": {"name": text, "revision": text}})
    sidecar = sidecar_of({"r": 4}, name=text)
    assert "marker" not in model_card(config, sidecar=sidecar)


def test_nothing_of_the_machine_is_told():
    text = model_card(SAVED, sidecar=PISSA, recipe=RECIPE, report=REPORT)
    for told in ("somebody", "the-gpu", "the-processor", "Linux", "runs/mine"):
        assert told not in text


def test_the_same_local_data_has_the_same_neutral_name_in_recipe_and_scores():
    first, second = "/home/x/train.jsonl", "/home/x/test.jsonl"
    recipe = {**RECIPE, "data": {"train": first}, "evaluation": {"tasks": [second], "forgetting": [first]}}
    rows = [{"name": name, "metric": "exact match", "before": 0.0, "after": 0.5} for name in (second, first)]
    text = model_card(LORA, recipe=recipe, report={"measurements": rows})
    told = recipe_of(text)
    assert told["data"]["train"] == told["evaluation"]["forgetting"][0] != told["evaluation"]["tasks"][0]
    assert f"| {told['evaluation']['tasks'][0]} (exact match)" in text


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name/blob/main/LICENSE",
        "s (B A - B0 A0) / r, and/or more",
        "`hf_hub_download` of huggingface_hub, hf_transfer",
        f"revision {COMMIT}, digest {'ab' * 32}",
        "vllm serve org/base-1b and POST to /v1/completions",
        "</details><br/>",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert neutral_text(text) == text


def test_what_names_modules_or_tokens_is_left_alone():
    settings = {
        "target_modules": r".*\.layers\.\d+\..*_proj",
        "rank_pattern": {r"layers\.0\.\w+": 4},
        "pad_token": "</s>",
    }
    assert neutral(settings) == settings


@pytest.mark.parametrize("name", ["org/name", "gpt2", "meta-llama/Llama-3.2-1B", "hf-internal-testing/tiny-random"])
def test_hub_ids_are_known_as_such(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == name
    (tmp_path / name).mkdir(parents=True)
    assert hub_id(name) is None  # a folder of that name wins, as in transformers


@pytest.mark.parametrize("name", ["/org/name", "a/b/c", "org/data.jsonl", "..", "org/hf_abcdef0123456789", "", None, 3])
def test_everything_else_is_none(name):
    assert hub_id(name) is None


def test_paths_are_known_as_such():
    assert all(map(is_local, ["/x", "~", ".", "../x", "C:\\x", "a/b/c", "data.jsonl", "sub\\dir\\file"]))
    assert not any(map(is_local, ["org/name", "linear", "Question: {q} / {a}", ".*_proj", "https://x.org/a/b/c", ""]))


def test_every_card_of_a_tiny_model_is_free_of_its_folder(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = tiny_models.llama()
    model.config._name_or_path = str(tmp_path / "models" / "secret-model")
    model.name_or_path = model.config._name_or_path
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert "secret-model" in (tmp_path / "adapter" / "README.md").read_text()  # PEFT's own card
    assert "secret-model" not in write_card(tmp_path / "adapter")


def test_the_card_of_a_classifier_loads_it_with_its_head_and_names_the_classes():
    config = {**SAVED, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    text = model_card(config, sidecar=PISSA, recipe=RECIPE, report={**REPORT, "classes": ["no", "yes", "maybe"]})
    assert "AutoModelForSequenceClassification.from_pretrained(" in text
    assert "num_labels=3)" in text
    assert "classes = ['no', 'yes', 'maybe']" in text
    assert "vllm serve" not in text


@pytest.mark.parametrize(
    "secret",
    [
        f"WANDB_API_KEY={'0123456789abcdef' * 2}01234567",
        "OPENAI_API_KEY=abcdefgh12345678",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE",
        "MY_PASSWORD: hunter2hunter2",
        "my-hub-token=abcdef123456",
    ],
)
def test_a_secret_under_any_name_is_removed(secret):
    from llmreg.hub.privacy import neutral_text

    value = secret.replace(": ", "=").partition("=")[2]
    assert value not in neutral_text(f"run with {secret} please")
