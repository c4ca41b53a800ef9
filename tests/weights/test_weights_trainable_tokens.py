"""A model whose tokens are trained beside the adapter still has its base's identity."""

import peft
import tiny_models
import torch

from llmreg import PissaConfig
from llmreg.weights import identity_hash


def test_trainable_tokens_do_not_change_the_identity_of_a_base_in_memory():
    base = tiny_models.llama()
    before = identity_hash(base)
    config = PissaConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert identity_hash(model) == before
