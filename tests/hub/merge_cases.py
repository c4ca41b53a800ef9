"""What the tests of merging share: bases, adapters, and the bytes of folders."""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llmreg.hub.merge import merge
from llmreg.hub.streaming import SafetensorsFile

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 7},
}


def sharded_checkpoint(folder):
    """The tiny Llama in bfloat16, in several files."""
    tiny_models.llama("bfloat16").save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return folder


def lora(base, folder, **settings):
    """A plain LoRA with random factors, trained on `base`, saved to `folder`."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": False, **settings}
    model = peft.get_peft_model(saved.load_base(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def peft_merged(base, adapter, auto=None, **kwargs):
    model = auto.from_pretrained(base, **kwargs) if auto else saved.load_base(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def file_bytes(folder):
    return {place: (folder / place).read_bytes() for place in saved.files(folder)}


def tensor_bytes(folder):
    """Bytes of every tensor of a checkpoint, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        found |= {name: b"".join(map(bytes, file.chunks(entry))) for name, entry in file.entries.items()}
    return found


def edit(path, change):
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refuse(error, match, adapter, folder, **arguments):
    with pytest.raises(error, match=match):
        merge(adapter, folder / "merged", **arguments)
    assert not (folder / "merged").exists()
