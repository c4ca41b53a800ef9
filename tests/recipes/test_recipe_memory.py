"""`llmreg.recipes.memory`: what is said of a training before anything is loaded, against what the training needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import peft
import pytest
import tiny_models
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, SFTConfig

import llmreg
from llmreg import pocket
from llmreg.errors import RecipeError
from llmreg.recipes.memory import MemoryEstimate, estimate
from llmreg.recipes.outline import count, outline, targets

POCKET = str(pocket.path())


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a saved two-layer Llama: hidden 64, MLP 96, 4 heads, 2 key-value heads."""
    tiny_models.llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pissa(**settings):
    return llmreg.PissaConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def arguments(tmp_path, config=SFTConfig, **settings):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "activation_checkpointing": False,
    }
    return config(str(tmp_path / "out"), **{**defaults, **settings})


_OF_ESTIMATE = {"quantization", "double_quantization", "gpu", "tokens"}


def estimated(tmp_path, folder=POCKET, adapter=None, **settings) -> MemoryEstimate:
    given = {name: settings.pop(name) for name in _OF_ESTIMATE & settings.keys()}
    task, dtype = settings.pop("task", "sft"), settings.pop("dtype", torch.float32)
    config = DPOConfig if task == "dpo" else SFTConfig
    return estimate(
        outline(folder, task=task),
        adapter or lora(),
        arguments(tmp_path, config, **settings),
        task=task,
        dtype=dtype,
        libraries=0,
        **given,
    )


# -- the outline ------------------------------------------------------------------------------------------------------


def test_an_outline_has_the_models_parameters_and_no_storage():
    model, loaded = outline(POCKET), pocket.load_model()
    shapes = {name: parameter.shape for name, parameter in loaded.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_outline_keeps_tied_weights_tied():
    model = outline(POCKET)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_classifier_gets_its_number_of_labels():
    assert outline(POCKET, task="classification", num_labels=5).score.out_features == 5


def test_a_hub_model_that_is_not_here_is_not_downloaded():
    with pytest.raises(
        RecipeError, match=r"nobody/nothing .* downloads nothing.*`hf download nobody/nothing config.json`"
    ):
        outline("nobody/nothing")


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"holds no config\.json"):
        outline(str(tmp_path))


# -- its targets ------------------------------------------------------------------------------------------------------


def test_targets_are_the_layers_that_peft_wraps(checkpoint):
    found = targets(outline(checkpoint), lora(target_modules=["q_proj", "mlp.down_proj", "no_proj"]))
    layers = ["model.layers.0", "model.layers.1"]
    assert found == {
        "mlp.down_proj": [f"{layer}.mlp.down_proj" for layer in layers],
        "no_proj": [],
        "q_proj": [f"{layer}.self_attn.q_proj" for layer in layers],
    }


@pytest.mark.parametrize("config", [lora, pissa])
def test_all_linear_leaves_out_the_head(checkpoint, config):
    found = targets(outline(checkpoint), config())
    assert len(found["all-linear"]) == 14
    assert not any("lm_head" in name for name in found["all-linear"])


def test_excluded_layers_and_a_choice_of_layers_are_respected(checkpoint):
    model = outline(checkpoint)
    assert targets(model, lora(target_modules=r".*\.1\..*proj", exclude_modules=["up_proj", "q_proj", "o_proj"])) == {
        r".*\.1\..*proj": [f"model.layers.1.{name}" for name in ("self_attn.k_proj", "self_attn.v_proj")]
        + [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "down_proj")]
    }
    assert targets(model, lora(target_modules=["v_proj"], layers_to_transform=[1])) == {
        "v_proj": ["model.layers.1.self_attn.v_proj"]
    }


def test_patterns_that_match_nothing_at_all_are_said(checkpoint):
    assert targets(outline(checkpoint), lora(target_modules=["query", "value"])) == {"query": [], "value": []}


def test_the_outline_stays_as_it_was(checkpoint):
    model = outline(checkpoint)
    before = tiny_models.structure(model)
    targets(model, pissa())
    assert tiny_models.structure(model) == before


def test_parameters_are_counted_by_role(checkpoint):
    base = outline(checkpoint)
    numbers = sum(parameter.numel() for parameter in base.parameters())
    factors = sum(4 * (m.in_features + m.out_features) for n, m in base.named_modules() if "proj" in n)
    adapted = peft.get_peft_model(base, pissa(), low_cpu_mem_usage=True)
    assert count(adapted) == (numbers, factors, factors)


# -- bytes that follow from shapes ------------------------------------------------------------------------------------


def test_weights_take_their_dtype_and_adapters_float32(tmp_path):
    unknown = {"adapter": pissa(target_modules=["q_proj"]), "max_length": None}
    full, half = estimated(tmp_path, **unknown), estimated(tmp_path, dtype=torch.bfloat16, **unknown)
    assert half.weights * 2 == full.weights == 4 * sum(p.numel() for p in pocket.load_model().parameters())
    assert half.adapter == full.adapter == 2 * full.gradients
    assert full.optimizer == 2 * full.gradients


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_are_what_bitsandbytes_stores(tmp_path, checkpoint, quantization):
    pytest.importorskip("bitsandbytes")
    entries = tiny_models.llama(quantization).state_dict()
    tables = ("quant_map", "bitsandbytes__nf4", "weight_format")  # 16 or 256 numbers that describe the format
    expected = sum(v.numel() * v.element_size() for key, v in entries.items() if not key.endswith(tables))
    settings = {"double_quantization": True, "max_length": None}
    got = estimated(tmp_path, checkpoint, quantization=quantization, **settings).weights
    assert got == expected


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch", 8), ("paged_adamw_32bit", 8), ("sgd", 0), ("adagrad", 4), ("lion_32bit", 4)],
)
def test_optimizer_states(tmp_path, optim, bytes_each):
    got = estimated(tmp_path, optim=optim, max_length=None)
    assert got.optimizer == bytes_each * got.gradients // 4


def test_eight_bit_states_are_a_quarter_where_parameters_are_large(tmp_path):
    small = estimated(tmp_path, adapter=lora(r=64), optim="adamw_8bit", max_length=None)
    assert 2 < 4 * small.optimizer / small.gradients < 2.1


def test_an_unknown_optimizer_is_said_and_not_guessed(tmp_path):
    got = estimated(tmp_path, optim="galore_adamw", optim_target_modules="all-linear", max_length=None)
    assert got.optimizer is None
    assert any("galore_adamw is not known" in note for note in got.notes)


# -- a step without numbers -------------------------------------------------------------------------------------------


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(tmp_path):
    one, two = estimated(tmp_path, max_length=64), estimated(tmp_path, max_length=64, per_device_train_batch_size=4)
    assert 1.9 < two.activations / one.activations < 2.01
    kept = estimated(tmp_path, max_length=64, activation_checkpointing=True)
    assert kept.activations < one.activations / 3


def test_saved_activations_are_those_of_a_real_forward_pass(tmp_path):
    """The same model, batch and loss with real tensors: what autograd keeps, each storage once."""
    from trl.trainer.utils import add_fused_lm_head

    model = pocket.load_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = peft.get_peft_model(model, lora()).train()
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone(), fused_lm_head=True)
        out.log_probs.sum()
    real = sum(storage.nbytes() for storage in saved.values())
    assert estimated(tmp_path, max_length=64).activations == pytest.approx(real, rel=0.05)  # and the batch


def test_preference_pairs_are_two_rows_and_the_reference_pass_keeps_nothing(tmp_path):
    rows = estimated(tmp_path, per_device_train_batch_size=4)
    pairs = estimated(tmp_path, task="dpo", per_device_train_batch_size=2)
    assert pairs.activations == pytest.approx(rows.activations, rel=0.02)


def test_the_datas_length_takes_the_place_of_max_length(tmp_path):
    assert estimated(tmp_path, max_length=None, tokens=32) == estimated(tmp_path, max_length=32)
    unknown = estimated(tmp_path, max_length=None)
    assert unknown.activations is None
    assert "max_length" in unknown.notes[0]


def test_half_precision_arithmetic_keeps_fewer_bytes(tmp_path):
    half = estimated(tmp_path, bf16=True, dtype=torch.bfloat16)
    assert half.activations < estimated(tmp_path).activations


def test_packed_rows_are_one_row(tmp_path):
    assert estimated(tmp_path, packing=True).activations > estimated(tmp_path).activations


def test_classification_has_no_vocabulary(tmp_path):
    adapter = lora(task_type="SEQ_CLS", target_modules=["q_proj"])
    got = estimated(tmp_path, task="classification", adapter=adapter)
    assert got.activations > 0
    assert got.notes == ()


def test_a_start_needs_room_only_where_it_decomposes(tmp_path):
    assert estimated(tmp_path, max_length=None).start == 0
    decomposed = {"adapter": pissa(target_modules=["q_proj"]), "max_length": None}
    full, half = estimated(tmp_path, **decomposed), estimated(tmp_path, dtype=torch.bfloat16, **decomposed)
    assert 0 < full.start < half.start


def test_the_starts_workspace_is_that_of_a_real_start(checkpoint):
    """One layer's decomposition with real tensors, seen by the same bookkeeping; simulated with no short cut taken."""
    from llmreg.recipes.memory_step import LiveBytes, simulate_start

    W = torch.randn(1024, 768, generator=torch.Generator().manual_seed(0))
    config = pissa(target_modules=["0"], task_type=None, power_iterations=4)
    adapted = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(768, 1024)), config)
    with torch.no_grad(), LiveBytes([W]) as real:
        config.start(W, 4, 1.0)
    assert real.peak <= simulate_start(adapted, "default", config, copied=False, device="cpu") <= 1.2 * real.peak


# -- against real trainings -------------------------------------------------------------------------------------------

_CASE = """
import json, sys
import peft, torch, trl, llmreg
case = json.loads(sys.argv[1])
settings = dict(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
adapter = llmreg.PissaConfig(**settings) if case["method"] == "pissa" else peft.LoraConfig(**settings)
config = trl.DPOConfig if case["task"] == "dpo" else trl.SFTConfig
training = config("out", per_device_train_batch_size=case["rows"], max_length=case["length"], max_steps=3,
    use_cpu=True, bf16=False, report_to="none", save_strategy="no", activation_checkpointing=False, disable_tqdm=True)
"""
_ESTIMATE = """
from llmreg.recipes.memory import estimate
from llmreg.recipes.outline import outline
got = estimate(outline(case["model"], task=case["task"]), adapter, training, task=case["task"], dtype=torch.float32,
    quantization=case["quantization"])
print(json.dumps({"peak": got.peak, "libraries": got.libraries, "notes": got.notes}))
"""
_TRAIN = """
from pathlib import Path
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from llmreg.pocket import load_tokenizer
long = "1 2 3 4 5 6 7 8 9 " * case["length"]
rows = {"prompt": "1 2 ", "chosen": long, "rejected": long} if case["task"] == "dpo" else {"text": long}
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32,
    quantization_config=nf4 if case["quantization"] else None)
trainer = (trl.DPOTrainer if case["task"] == "dpo" else trl.SFTTrainer)(model, args=training, peft_config=adapter,
    train_dataset=Dataset.from_list([rows] * 16), processing_class=load_tokenizer())
trainer.train()
"""
_PEAK = """
from pathlib import Path
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""
#: As `llmreg train` does it, in a process that then says its peak.
_RECIPE = """
import sys
from llmreg.recipes import load_recipe, run
run(load_recipe(sys.argv[2], sys.argv[3:]))
"""


@pytest.fixture
def run_python(tmp_path, request):
    """As everywhere, but Python itself is started: what a fork shares with others is counted in its memory or not."""

    def run(code: str, *arguments: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def compare(run_python):
    """A function (case, real training's code, its arguments): the estimate is within 20 % of the measured peak."""

    def check(case: dict, code: str = _CASE + _TRAIN, *more: str) -> None:
        case = {"task": "sft", "method": "pissa", "quantization": None, **case}
        said = json.loads(run_python(_CASE + _ESTIMATE, json.dumps(case)).splitlines()[-1])
        peak = int(run_python(code + _PEAK, json.dumps(case), *more).splitlines()[-1])
        beyond = [(total - said["libraries"]) / 2**20 for total in (said["peak"], peak)]
        print(
            f"{case}: estimated {said['peak'] / 2**20:.0f} MiB, measured {peak / 2**20:.0f}, ratio "
            f"{said['peak'] / peak:.2f}; beyond the libraries {beyond[0]:.0f} and {beyond[1]:.0f}"
        )
        assert said["notes"] == []
        assert said["peak"] == pytest.approx(peak, rel=0.2)

    return check


@pytest.fixture(scope="module")
def hidden_1024(tmp_path_factory):
    """The folder of a Llama of hidden 1024 and 4 layers with the pocket model's vocabulary, 206 MiB."""
    folder = tmp_path_factory.mktemp("hidden-1024")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1523,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(900)  # two processes, of about ten seconds each on an idle core
def test_a_quickstart_needs_what_was_estimated(compare, tmp_path, request):
    recipe = str(request.config.rootpath / "recipes" / "quickstart.yaml")
    short = ("training.max_steps=3", "evaluation={}", f"output.dir={tmp_path / 'run'}")
    compare({"model": POCKET, "rows": 16, "length": 64}, _RECIPE, recipe, *short)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_pocket_training_needs_what_was_estimated(compare, method, task):
    compare({"model": POCKET, "rows": 16, "length": 64, "method": method, "task": task})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("rows", "length"), [(2, 256), (4, 128), (4, 256)])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_a_larger_training_needs_what_was_estimated(compare, hidden_1024, method, rows, length):
    compare({"model": hidden_1024, "rows": rows, "length": length, "method": method})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_larger_preference_training_needs_what_was_estimated(compare, hidden_1024):
    compare({"model": hidden_1024, "rows": 2, "length": 128, "task": "dpo"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("rows", "length"), [(2, 256)])
def test_a_training_on_nf4_needs_what_was_estimated(compare, hidden_1024, rows, length):
    pytest.importorskip("bitsandbytes")
    compare({"model": hidden_1024, "rows": rows, "length": length, "quantization": "nf4"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pocket_training_on_nf4_needs_what_was_estimated(compare):
    pytest.importorskip("bitsandbytes")
    compare({"model": POCKET, "rows": 16, "length": 64, "quantization": "nf4"})
