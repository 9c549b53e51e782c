"""The size table, and the spellings by which a flavor can be named."""

from __future__ import annotations

import pytest

from qwen35_mcore.config.flavors import FLAVORS, flavor_name, get_flavor
from qwen35_mcore.config.layer_pattern import interval_of
from qwen35_mcore.config.rope import YarnScaling
from qwen35_mcore.errors import ConfigError

# hidden, layers, heads, kv heads, dense width, GDN value heads, tied
DENSE = {
    "0.8b": (1024, 24, 8, 2, 3584, 16, True),
    "2b": (2048, 24, 8, 2, 6144, 16, True),
    "4b": (2560, 32, 16, 4, 9216, 32, True),
    "9b": (4096, 32, 16, 4, 12288, 32, False),
    "27b": (5120, 64, 24, 4, 17408, 48, False),
}
# hidden, layers, heads, kv heads, GDN value heads, experts, top-k, expert width
NEXT = {"80b-a3b": (2048, 48, 16, 2, 32, 512, 10, 512)}
MOE = {
    "35b-a3b": (2048, 40, 16, 2, 32, 256, 8, 512),
    "122b-a10b": (3072, 48, 32, 2, 64, 256, 8, 1024),
    "397b-a17b": (4096, 60, 32, 2, 64, 512, 10, 1024),
    "397b-a19b": (4096, 60, 32, 2, 64, 512, 10, 1024),
}
TINY = ("tiny-dense", "tiny-moe")


def test_the_table_is_complete() -> None:
    assert set(FLAVORS) == {*DENSE, *MOE, *NEXT, *TINY}


@pytest.mark.parametrize("name", DENSE)
def test_dense_sizes(name: str) -> None:
    c = FLAVORS[name]
    assert (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.intermediate_size,
        c.linear_num_value_heads,
        c.tie_word_embeddings,
    ) == DENSE[name]
    assert c.model_type == "qwen3_5_text"
    assert not c.is_moe


@pytest.mark.parametrize("name", [*MOE, *NEXT])
def test_moe_sizes(name: str) -> None:
    c = FLAVORS[name]
    assert (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.linear_num_value_heads,
        c.num_experts,
        c.num_experts_per_tok,
        c.moe_intermediate_size,
    ) == (MOE | NEXT)[name]
    assert c.model_type == ("qwen3_next" if name in NEXT else "qwen3_5_moe_text")
    assert c.is_moe
    assert c.shared_expert_intermediate_size == c.moe_intermediate_size
    assert not c.tie_word_embeddings


@pytest.mark.parametrize("name", [*DENSE, *MOE, *NEXT])
def test_what_all_published_sizes_share(name: str) -> None:
    c = FLAVORS[name]
    assert interval_of(c.layer_types) == 4
    assert (c.head_dim, c.rotary_dim, c.rms_norm_eps) == (256, 64, 1e-6)
    assert c.vocab_size == (151936 if name in NEXT else 248320)
    assert (c.linear_key_head_dim, c.linear_value_head_dim) == (128, 128)
    assert (c.linear_num_key_heads, c.linear_conv_kernel_dim) == (16, 4)
    assert c.mtp_num_hidden_layers == 1
    assert c.rope_theta == 1e7
    assert c.rope_parameters.mrope_section == (None if name in NEXT else (11, 11, 10))
    if name != "397b-a19b":
        assert c.max_position_embeddings == 262144
        assert c.yarn is None


def test_the_long_context_flavor_differs_by_yarn_alone() -> None:
    long, base = FLAVORS["397b-a19b"].to_hf(), FLAVORS["397b-a17b"].to_hf()
    assert {key for key in long if long[key] != base[key]} == {
        "max_position_embeddings",
        "rope_parameters",
    }
    assert FLAVORS["397b-a19b"].max_position_embeddings == 1_000_000
    assert FLAVORS["397b-a19b"].yarn == YarnScaling(
        factor=3.0, original_max_position_embeddings=262144
    )


@pytest.mark.parametrize("name", TINY)
def test_tiny_flavors_have_every_mechanism(name: str) -> None:
    c = FLAVORS[name]
    assert (c.num_gdn_layers, c.num_attention_layers, c.mtp_num_hidden_layers) == (3, 1, 1)
    assert c.vocab_size == 512
    assert c.linear_num_value_heads > c.linear_num_key_heads
    assert c.num_attention_heads > c.num_key_value_heads
    assert c.rotary_dim < c.head_dim


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("35b-a3b", "35b-a3b"),
        ("Qwen3.5-35B-A3B", "35b-a3b"),
        ("Qwen/Qwen3.5-35B-A3B-Base", "35b-a3b"),
        ("Qwen3.6-35B-A3B", "35b-a3b"),
        ("397B_A19B", "397b-a19b"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "80b-a3b"),
        ("Qwen3-Next-80B-A3B-Thinking", "80b-a3b"),
        ("qwen3_next_80b_a3b", "80b-a3b"),
        (" Qwen/Qwen3.5-0.8B ", "0.8b"),
        ("Tiny_MoE", "tiny-moe"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert flavor_name(spelling) == name
    assert get_flavor(spelling) is FLAVORS[name]


def test_a_typo_is_answered_with_the_nearest_name_and_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        get_flavor("35b-a3")
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("did you mean 35b-a3b")
    assert all(name in str(caught.value) for name in FLAVORS)


@pytest.mark.parametrize(
    "name",
    [
        *("", "qwen3.6-9b", "qwen3-35b-a3b", "Qwen/Qwen3.5-tiny-moe"),
        *("Qwen3.5-80B-A3B", "Qwen3-Next-35B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8"),
    ],
)
def test_models_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such flavor"):
        get_flavor(name)
