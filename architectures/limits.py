"""What a checkpoint may ask for. Whatever is read from one has its bound here, or is checked against its file's size.

A bound is far above every model that there is, and low enough that reading up to it takes seconds and hundreds of
megabytes at most: what is beyond it is damage, or was made to do harm.
"""

# Numbers in config.json, and in a GGUF file's metadata
SIZES = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "shared_expert_intermediate_size": 2**20,
    "num_experts": 2**12,
    "num_local_experts": 2**12,
    "n_routed_experts": 2**12,
    "n_shared_experts": 2**8,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "vocab_size": 2**22,
    "q_lora_rank": 2**14,
    "kv_lora_rank": 2**14,
    "qk_nope_head_dim": 2**12,
    "qk_rope_head_dim": 2**12,
    "v_head_dim": 2**12,
    "num_nextn_predict_layers": 2**10,
    "num_mtp_layers": 2**10,
    "linear_num_key_heads": 2**12,
    "linear_num_value_heads": 2**12,
    "linear_key_head_dim": 2**12,
    "linear_value_head_dim": 2**12,
    "linear_conv_kernel_dim": 2**6,
    "mamba_n_heads": 2**12,
    "mamba_num_heads": 2**12,
    "mamba_d_head": 2**12,
    "mamba_head_dim": 2**12,
    "mamba_d_state": 2**12,
    "ssm_state_size": 2**12,
    "mamba_n_groups": 2**12,
    "n_groups": 2**12,
    "mamba_d_conv": 2**6,
    "conv_kernel": 2**6,
    "mamba_expand": 2**6,
    "num_heads": 2**12,
    "state_size": 2**12,
    "expand": 2**6,
    "shared_intermediate_size": 2**20,
    "moe_shared_expert_intermediate_size": 2**20,
    "moe_latent_size": 2**18,
    "hidden_size_per_layer_input": 2**16,
    "altup_num_inputs": 2**4,
    "laurel_rank": 2**16,
}
MAX_SIZE = 2**31 - 1  # of any other: context, window, token id

# Files, in bytes
MAX_JSON_BYTES = 64 * 2**20  # config.json, an index of shards, what is beside a tokenizer
MAX_TEMPLATE_BYTES = 2**20  # a chat template
MAX_TEMPLATES = 64
MAX_TOKENIZER_BYTES = 256 * 2**20  # tokenizer.json and what is older
MAX_HEADER_BYTES = 32 * 2**20  # of a safetensors file

# Counts
MAX_TENSORS = 2**17  # of a file
MAX_SHARDS = 2**12
MAX_METADATA = 2**16  # entries of a GGUF file
MAX_ITEMS = 2**23  # of a list in a GGUF file's metadata: its vocabulary, its merges
