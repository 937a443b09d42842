"""The memory plan against bytes counted by hand."""

from dataclasses import replace

import pytest
import torch

from nibble.architectures.base import AltUp, Experts, GatedMlp, MlpBesideExperts, SharedExpert
from nibble.architectures.registry import model_spec
from nibble.engine import memory
from nibble.engine.config import EngineConfig
from nibble.engine.host_memory import Headroom
from nibble.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = model_spec(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
)
# keys and values of 3 layers, 2 heads of 16 numbers, 2 bytes each
TOKEN = 2 * 3 * 2 * 16 * 2
BLOCK = 16 * TOKEN
# 32 tokens in 16 bits: four times the hidden size, three of the MLP's, q, k and v twice; float32 logits of 8, twice
ACTIVATIONS = 32 * 2 * (4 * 64 + 3 * 96 + 2 * 4 * 16 + 4 * 2 * 16) + 2 * 4 * 8 * 1000


def config(**changes) -> EngineConfig:
    fields = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 16}
    return EngineConfig(model="unused", **(fields | changes))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what is free on the host."""

    def describe(available_kib: int):
        room = Headroom(available_kib * 1024, "a limit of 1 GiB")
        monkeypatch.setattr(memory, "headroom", lambda: room)

    return describe


def test_the_cache_gets_its_share_after_the_activations(machine) -> None:
    machine(4000)
    plan = memory.plan(config(), MODEL, torch.bfloat16, CPU)
    assert plan.activations == ACTIVATIONS
    assert plan.num_blocks == (4000 * 1024 * 4 // 10 - ACTIVATIONS) // BLOCK
    assert plan.kv_cache == plan.num_blocks * BLOCK
    assert plan.max_model_len == 512


def test_streams_of_hidden_states_are_in_the_plan() -> None:
    """In float32 in C++: all of them, what the mixer reads, and a product of that size at a time."""
    without = memory.activation_bytes(config(), MODEL, torch.bfloat16, CPU)
    streams = replace(MODEL, alt_up=AltUp(4, 0))
    more = memory.activation_bytes(config(), streams, torch.bfloat16, CPU) - without
    needed = 32 * MODEL.hidden_size * 4 * (4 + 1)
    assert needed <= more <= 2 * needed


def test_no_more_is_planned_than_the_batch_can_fill(machine) -> None:
    machine(1 << 30)
    assert memory.plan(config(), MODEL, torch.bfloat16, CPU).num_blocks == 8 * 512 // 16
    short = memory.plan(config(max_model_len=100), MODEL, torch.bfloat16, CPU)
    assert (short.num_blocks, short.max_model_len) == (8 * 7, 100)  # 100 tokens need 7 blocks


def test_the_limit_that_was_taken_is_told(machine, caplog) -> None:
    machine(1 << 20)
    with caplog.at_level("INFO", "nibble.engine.memory"):
        memory.plan(config(), MODEL, torch.bfloat16, CPU)
    assert "in 1.00 GiB, free of a limit of 1 GiB" in caplog.text


def test_the_context_shrinks_to_what_the_cache_holds(machine) -> None:
    machine(1 << 30)
    plan = memory.plan(config(kv_cache_memory=5 * BLOCK + 7), MODEL, torch.bfloat16, CPU)
    assert (plan.num_blocks, plan.max_model_len, plan.kv_cache) == (5, 80, 5 * BLOCK)


def test_a_context_that_was_asked_for_does_not_shrink(machine) -> None:
    machine(1 << 30)
    asked = config(kv_cache_memory=5 * BLOCK, max_model_len=81)
    with pytest.raises(UserError, match="holds 80 tokens .* a context of 81 needs"):
        memory.plan(asked, MODEL, torch.bfloat16, CPU)
    assert memory.plan(
        config(kv_cache_memory=5 * BLOCK, max_model_len=80), MODEL, torch.bfloat16, CPU
    )


def test_a_machine_without_room_for_one_block_is_refused(machine) -> None:
    machine((ACTIVATIONS * 10 // 4 + BLOCK) // 1024)
    with pytest.raises(UserError, match="holds 0 tokens"):
        memory.plan(config(), MODEL, torch.bfloat16, CPU)


def test_a_machine_without_room_for_a_step_says_what_to_lower(machine) -> None:
    machine(ACTIVATIONS * 10 // 4 // 1024 - 1)
    with pytest.raises(
        UserError, match="nothing is left .* 40% .* of a limit of 1 GiB; lower --max-num-batched"
    ):
        memory.plan(config(), MODEL, torch.bfloat16, CPU)


def test_more_positions_than_the_model_knows_are_refused(machine) -> None:
    machine(1 << 30)
    with pytest.raises(UserError, match="513 is more than the 512 positions"):
        memory.plan(config(max_model_len=513), MODEL, torch.bfloat16, CPU)


def test_a_quantized_cache_is_planned_with_its_scales() -> None:
    """One byte a number and a float32 scale for each vector."""
    assert memory.kv_bytes_per_token(MODEL, torch.bfloat16) == TOKEN
    assert memory.kv_bytes_per_token(MODEL, torch.float32) == 2 * TOKEN
    assert memory.kv_bytes_per_token(MODEL, torch.bfloat16, "int8") == 2 * 3 * 2 * (16 + 4)


def test_experts_need_room_for_every_path_of_a_token() -> None:
    """A token's inputs and what lies between, once for each expert it goes to; the widest kind counts."""
    experts = Experts(16, 3, 96, "silu", shared=SharedExpert(128))
    layers = (MODEL.layers[0], replace(MODEL.layers[1], mlp=experts), *MODEL.layers[2:])
    more = memory.activation_bytes(config(), replace(MODEL, layers=layers), torch.bfloat16, CPU)
    per_token = 4 * (3 * 128 + 64) + 2 * 16 - 3 * 96
    assert more - ACTIVATIONS == config().max_num_batched_tokens * per_token * 2


def test_an_mlp_beside_experts_needs_room_for_the_larger_and_for_what_the_other_gives() -> None:
    both = MlpBesideExperts(GatedMlp(96, "silu"), Experts(16, 3, 96, "silu"))
    layers = (MODEL.layers[0], replace(MODEL.layers[1], mlp=both), *MODEL.layers[2:])
    more = memory.activation_bytes(config(), replace(MODEL, layers=layers), torch.bfloat16, CPU)
    per_token = 3 * (3 * 96 + 64) + 2 * 16 + 64 - 3 * 96
    assert more - ACTIVATIONS == config().max_num_batched_tokens * per_token * 2


def test_a_gpu_needs_room_for_the_widest_matrix_in_16_bits(monkeypatch) -> None:
    assert (
        memory.activation_bytes(config(), MODEL, torch.bfloat16, CUDA)
        == ACTIVATIONS + 2 * 96 * 64 * 2
    )
    free = 4_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    plan = memory.plan(config(), MODEL, torch.bfloat16, CUDA)
    assert plan.num_blocks == min(256, (free * 9 // 10 - plan.activations) // BLOCK)


def test_weights_that_cannot_fit_are_refused_before_they_are_read(machine, monkeypatch) -> None:
    machine(1024)
    head = 2 * 1000 * 64  # its codes, twice
    memory.check_weights_fit(2**20 - head, MODEL, CPU)
    with pytest.raises(UserError, match=r"needs 0\.00 GiB, 0\.00 GiB are free of a limit of 1 GiB"):
        memory.check_weights_fit(2**20 - head + 1, MODEL, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    memory.check_weights_fit(2**20, MODEL, CUDA)
    with pytest.raises(UserError, match="are free of cuda's memory"):
        memory.check_weights_fit(2**20 + 1, MODEL, CUDA)


LATENT = model_spec(
    {
        "architectures": ["YoutuForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 1000,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "max_position_embeddings": 512,
    }
)


def test_latents_are_planned_once_for_all_heads() -> None:
    """3 layers, a latent of 32 numbers and a rotated key of 16; in int8, each with a scale."""
    assert memory.kv_bytes_per_token(LATENT, torch.bfloat16) == 3 * (32 + 16) * 2
    assert memory.kv_bytes_per_token(LATENT, torch.bfloat16, "int8") == 3 * (32 + 4 + 16 + 4)


def test_heads_need_room_for_queries_as_wide_as_latents() -> None:
    """Beside what the widest linear gives, twice: queries of 24 and 16 numbers a head, twice; of 32 and 16; the 32 that
    they find."""
    per_token = 4 * 64 + 3 * 96 + 2 * 4 * (24 + 20) + 4 * (2 * (24 + 16) + 32 + 16 + 32)
    found = memory.activation_bytes(config(), LATENT, torch.bfloat16, CPU)
    assert found == 32 * 2 * per_token + 2 * 4 * 8 * 1000


HYBRID = model_spec(
    {
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 512,
    }
)
# three layers, in float32: 3 inputs of 2 * 2 heads of 8 and 4 of 16, and 4 heads of 8 by 16
STATE = 3 * 4 * (3 * (2 * 2 * 8 + 4 * 16) + 4 * 8 * 16)
HYBRID_BLOCK = 16 * 2 * 2 * 16 * 2  # one layer has keys and values


def test_states_of_a_full_batch_and_snapshots_are_planned_beside_the_blocks(machine) -> None:
    machine(1 << 30)
    plan = memory.plan(config(), HYBRID, torch.bfloat16, CPU)
    assert (plan.num_states, plan.states) == (8 + 32, 40 * STATE)
    assert (plan.num_blocks, plan.kv_cache) == (8 * 32, 8 * 32 * HYBRID_BLOCK)
    without = memory.plan(config(enable_prefix_caching=False), HYBRID, torch.bfloat16, CPU)
    assert without.num_states == 8
    assert memory.plan(config(), MODEL, torch.bfloat16, CPU).num_states == 0


def test_states_take_half_of_the_caches_memory_at_most(machine) -> None:
    machine(1 << 30)
    plan = memory.plan(config(kv_cache_memory=10 * STATE + 5), HYBRID, torch.bfloat16, CPU)
    assert plan.num_states == 5
    assert plan.num_blocks == (5 * STATE + 5) // HYBRID_BLOCK
    with pytest.raises(UserError, match="two do not fit.*--kv-cache-memory"):
        memory.plan(config(kv_cache_memory=3 * STATE), HYBRID, torch.bfloat16, CPU)
