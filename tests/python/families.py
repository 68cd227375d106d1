"""Small random models of the Mixture-of-Experts families of transformers."""

import torch
import transformers

LAYERS, HIDDEN, INNER, EXPERTS, TOPK, VOCABULARY = 2, 40, 33, 7, 3, 64

# Odd sizes, so that nothing fits by chance. What is not said here is transformers' default.
SIZES = dict(num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_experts_per_tok=TOPK, num_attention_heads=5,
             num_key_value_heads=5, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=None,
             eos_token_id=None, pad_token_id=None)
ATTENTION = dict(first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                 v_head_dim=4, head_dim=4)
FAMILIES = {
    "Mixtral": dict(num_local_experts=EXPERTS, intermediate_size=INNER),
    "Olmoe": dict(num_experts=EXPERTS, intermediate_size=INNER),
    "Qwen2Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INNER, shared_expert_intermediate_size=17),
    "Qwen3Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INNER, norm_topk_prob=True),
    "DeepseekV2": dict(n_routed_experts=8, moe_intermediate_size=INNER, n_shared_experts=1, n_group=4, topk_group=2,
                       topk_method="group_limited_greedy", routed_scaling_factor=1.5, **ATTENTION),
    "DeepseekV3": dict(n_routed_experts=8, moe_intermediate_size=INNER, n_shared_experts=2, n_group=4, topk_group=2,
                       routed_scaling_factor=2.5, **ATTENTION),
    "GptOss": dict(num_local_experts=EXPERTS, intermediate_size=INNER),
    "Llama4": dict(num_local_experts=EXPERTS, intermediate_size=INNER, num_experts_per_tok=1),
}


def random_model(family, **changes):
    """For causal language modelling, in f32 and eval mode, with weights so large that every expert matters."""
    config_name = "Llama4TextConfig" if family == "Llama4" else family + "Config"
    config = getattr(transformers, config_name)(**{**SIZES, **FAMILIES[family], **changes})
    config._experts_implementation = "eager"  # the others want sizes of whole 16 bytes
    torch.manual_seed(7)
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layers." in name and "norm" not in name:
                tensor.normal_(std=0.3)
        for name, tensor in model.named_buffers():
            if "correction_bias" in name:
                tensor.normal_(std=0.3)
    return model.eval()
