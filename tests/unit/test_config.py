"""`Qwen35Config`: every key of a config.json is read, carried through, or refused by name."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from qwen35_mcore.config.flavors import FLAVORS, get_flavor
from qwen35_mcore.config.hf_keys import MODEL_TYPES, QWEN3_5, architecture_keys
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters, YarnScaling
from qwen35_mcore.errors import ConfigError
from tests.helpers.hf_configs import of_type, text_level, text_only, vision_language, without
from tests.helpers.kinds import examples

HF_CLASSES = {
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_text": Qwen3_5TextConfig,
    "qwen3_5_moe": Qwen3_5MoeConfig,
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig,
    "qwen3_next": Qwen3NextConfig,
}

HF_ARCHITECTURES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}


PUBLISHED_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


class TestReading:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_every_architecture_key_is_read(self, model_type: str) -> None:
        raw = of_type(model_type)
        config = Qwen35Config.from_hf(raw)
        for key in architecture_keys(MODEL_TYPES[model_type]):
            assert getattr(config, key) == text_level(raw)[key], key
        assert config.layer_types == (LayerKind.GDN, LayerKind.ATTENTION) * 2
        assert config.mtp_num_hidden_layers == 1
        assert config.rope_parameters == RopeParameters(
            rope_theta=1e7,
            partial_rotary_factor=0.5,
            mrope_section=(4, 2, 2) if config.family is QWEN3_5 else None,
        )
        assert config.is_moe == MODEL_TYPES[model_type].moe
        assert config.is_vision_language == MODEL_TYPES[model_type].nested

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_everything_else_comes_back_verbatim(self, model_type: str) -> None:
        raw = of_type(model_type)
        written = Qwen35Config.from_hf(raw).to_hf()
        expected = deepcopy(raw)
        # partial_rotary_factor is written in one place; the nested tie is corrected
        text_level(expected).pop("partial_rotary_factor")
        text_level(expected)["tie_word_embeddings"] = raw["tie_word_embeddings"]
        assert written == expected

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_folder_file_and_dictionary_are_the_same(self, model_type: str, tmp_path: Path) -> None:
        raw = of_type(model_type)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(raw))
        config = Qwen35Config.from_hf(raw)
        assert Qwen35Config.from_hf(file) == config
        assert Qwen35Config.from_hf(str(file)) == config
        assert Qwen35Config.from_hf(tmp_path) == config

    def test_the_dictionary_given_is_neither_changed_nor_shared(self) -> None:
        raw = vision_language()
        before = deepcopy(raw)
        config = Qwen35Config.from_hf(raw)
        config.to_hf()["vision_config"]["depth"] = 99
        assert raw == before
        raw["vision_config"]["depth"] = 99
        assert config.to_hf()["vision_config"]["depth"] == 2

    def test_the_tie_at_the_top_counts(self) -> None:
        raw = vision_language()
        raw["text_config"]["tie_word_embeddings"] = False
        raw["tie_word_embeddings"] = True
        assert Qwen35Config.from_hf(raw).tie_word_embeddings is True
        raw["text_config"]["tie_word_embeddings"] = True
        raw["tie_word_embeddings"] = False
        assert Qwen35Config.from_hf(raw).tie_word_embeddings is False

    def test_a_tie_that_is_only_nested_is_ambiguous(self) -> None:
        raw = without(vision_language(), "tie_word_embeddings")
        assert Qwen35Config.from_hf(raw).tie_word_embeddings is False
        raw["text_config"]["tie_word_embeddings"] = True
        with pytest.raises(ConfigError, match="absent at the top level"):
            Qwen35Config.from_hf(raw)

    def test_a_text_only_tie_is_read(self) -> None:
        raw = text_only() | {"tie_word_embeddings": True}
        assert Qwen35Config.from_hf(raw).tie_word_embeddings is True

    def test_layer_types_need_no_interval_and_the_interval_no_layer_types(self) -> None:
        config = Qwen35Config.from_hf(text_only())
        for key in ("full_attention_interval", "layer_types"):
            assert Qwen35Config.from_hf(without(text_only(), key)) == config
        neither = without(text_only(), "full_attention_interval", "layer_types")
        assert Qwen35Config.from_hf(neither).layer_types == (LayerKind.GDN,) * 3 + (
            LayerKind.ATTENTION,
        )

    def test_a_pattern_without_interval_survives(self) -> None:
        names = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
        raw = without(text_only(), "full_attention_interval") | {"layer_types": names}
        written = Qwen35Config.from_hf(raw).to_hf()
        assert written["layer_types"] == names
        assert "full_attention_interval" not in written

    def test_defaults_where_every_size_agrees(self) -> None:
        defaulted = {
            "head_dim": 256,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "router_aux_loss_coef": 0.001,
        }
        raw = without(text_only(), *defaulted) | {"linear_num_value_heads": 32}
        raw["rope_parameters"] = {"rope_theta": 1e7}
        raw.pop("partial_rotary_factor")
        config = Qwen35Config.from_hf(raw)
        reference = Qwen3_5MoeTextConfig(**raw)
        for key, value in defaulted.items():
            assert getattr(config, key) == value == getattr(reference, key), key
        assert config.rotary_dim == 64

    def test_a_config_that_does_not_mention_mtp_has_none(self) -> None:
        raw = without(text_only(), "mtp_num_hidden_layers")
        assert Qwen35Config.from_hf(raw).mtp_num_hidden_layers == 0

    def test_qwen3_next_as_it_is_published(self) -> None:
        """Old style, with a dense width that no layer has; it has an MTP layer and does not say so.

        From the files of Qwen/Qwen3-Next-80B-A3B-Instruct.
        """
        config = Qwen35Config.from_hf(PUBLISHED_NEXT)
        assert config.carried["intermediate_size"] == 5120
        assert replace(config, carried={}) == get_flavor("80b-a3b")
        for layers in (0, 1):
            said = PUBLISHED_NEXT | {"num_nextn_predict_layers": layers}
            assert Qwen35Config.from_hf(said).mtp_num_hidden_layers == layers


class TestTransformers:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_it_reads_the_same_values_from_what_we_write(self, model_type: str) -> None:
        config = Qwen35Config.from_hf(of_type(model_type))
        theirs = HF_CLASSES[model_type](**config.to_hf())
        text = theirs.get_text_config()
        for key in architecture_keys(MODEL_TYPES[model_type]):
            assert getattr(text, key) == getattr(config, key), key
        for key, value in config.family.always_written.items():
            assert getattr(text, key) == value
        assert text.layer_types == [str(kind) for kind in config.layer_types]
        assert text.rope_parameters == config.rope_parameters.to_hf()
        assert theirs.tie_word_embeddings == config.tie_word_embeddings
        assert theirs.architectures == [config.hf_architecture]

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_we_read_what_it_saves(self, model_type: str, tmp_path: Path) -> None:
        config = Qwen35Config.from_hf(of_type(model_type))
        HF_CLASSES[model_type](**config.to_hf()).save_pretrained(tmp_path)
        saved = Qwen35Config.from_hf(tmp_path)
        assert replace(saved, carried={}, carried_outer={}) == replace(
            config, carried={}, carried_outer={}
        )

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_we_read_its_complete_dictionary(self, model_type: str) -> None:
        config = Qwen35Config.from_hf(HF_CLASSES[model_type]().to_dict())
        assert config.model_type == model_type
        assert Qwen35Config.from_hf(config.to_hf()) == config

    @pytest.mark.parametrize("name", FLAVORS)
    def test_flavors(self, name: str) -> None:
        config = get_flavor(name)
        theirs = HF_CLASSES[config.model_type](**config.to_hf())
        assert Qwen35Config.from_hf(theirs.to_dict()).to_text_only().rope_parameters == (
            config.rope_parameters
        )
        for key in architecture_keys(MODEL_TYPES[config.model_type]):
            assert getattr(theirs, key) == getattr(config, key), key


@st.composite
def configs(draw: st.DrawFn) -> Qwen35Config:
    model_type = draw(st.sampled_from(list(MODEL_TYPES)))
    moe = MODEL_TYPES[model_type].moe
    size = st.integers(1, 64)
    kinds = draw(st.lists(st.sampled_from(LayerKind), min_size=1, max_size=9))
    kv_heads, key_heads, experts = draw(size), draw(size), draw(size)
    yarn = draw(
        st.none()
        | st.builds(
            YarnScaling,
            factor=st.floats(1, 64),
            original_max_position_embeddings=st.integers(1, 10**6),
            attention_factor=st.none() | st.floats(0.1, 4),
            truncate=st.booleans(),
        )
    )
    sizes = (
        {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(size),
            "shared_expert_intermediate_size": draw(size),
        }
        if moe
        else {"intermediate_size": draw(size)}
    )
    return Qwen35Config(
        model_type=model_type,
        vocab_size=draw(size),
        hidden_size=draw(size),
        num_hidden_layers=len(kinds),
        layer_types=tuple(kinds),
        num_attention_heads=kv_heads * draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.integers(1, 16)) * 8,
        max_position_embeddings=draw(st.integers(1, 10**6)),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * draw(st.integers(1, 4)),
        rope_parameters=RopeParameters(
            rope_theta=draw(st.floats(1, 1e8)),
            partial_rotary_factor=draw(st.sampled_from([0.25, 0.5, 1.0])),
            yarn=yarn,
        ),
        tie_word_embeddings=draw(st.booleans()),
        mtp_num_hidden_layers=draw(st.integers(0, 1)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        router_aux_loss_coef=draw(st.floats(0, 1)),
        carried={"dtype": draw(st.sampled_from(["bfloat16", "float32"])), "eos_token_id": [1, 2]},
        carried_outer={"vision_config": {"depth": 2}} if MODEL_TYPES[model_type].nested else {},
        **sizes,
    )


class TestObject:
    @examples(200)
    @given(configs())
    def test_from_hf_inverts_to_hf_also_through_a_file(self, config: Qwen35Config) -> None:
        assert Qwen35Config.from_hf(config.to_hf()) == config
        through_json = json.loads(json.dumps(config.to_hf()))
        assert Qwen35Config.from_hf(through_json) == config
        assert hash(Qwen35Config.from_hf(through_json)) == hash(config)

    @examples(50)
    @given(configs())
    def test_dropping_the_wrapper_keeps_the_text_model(self, config: Qwen35Config) -> None:
        text = config.to_text_only()
        assert not text.is_vision_language
        assert text.model_type == config.text_model_type
        assert replace(text, model_type=config.model_type, carried_outer=config.carried_outer) == (
            config
        )

    def test_it_is_frozen_hashable_and_pickles(self) -> None:
        config = Qwen35Config.from_hf(vision_language())
        with pytest.raises(FrozenInstanceError):
            config.hidden_size = 1  # type: ignore[misc]
        assert {config: 1}[Qwen35Config.from_hf(vision_language())] == 1
        assert pickle.loads(pickle.dumps(config)) == config

    def test_replace_is_checked(self) -> None:
        config = get_flavor("tiny-moe")
        with pytest.raises(ConfigError, match="one entry per decoder layer"):
            replace(config, num_hidden_layers=8)
        assert replace(config, num_hidden_layers=8, layer_types=()).num_attention_layers == 2

    def test_layer_types_may_be_strings(self) -> None:
        names: Any = ["full_attention", "linear_attention"]
        config = replace(get_flavor("tiny-dense"), num_hidden_layers=2, layer_types=names)
        assert config.layer_types == (LayerKind.ATTENTION, LayerKind.GDN)
        assert [config.is_gdn(i) for i in range(2)] == [False, True]

    def test_derived_sizes(self) -> None:
        config = Qwen35Config.from_hf(text_only())
        assert config.rotary_dim == 16
        gdn, attention = config.gdn_shape, config.attention_shape
        assert (gdn.key_width, gdn.value_width) == (2 * 24, 6 * 40)
        assert (gdn.conv_width, gdn.qkvz_width) == (2 * 48 + 240, 2 * 48 + 2 * 240)
        assert gdn.in_proj_width == gdn.qkvz_width + 2 * 6
        assert replace(gdn, gates_apart=True).in_proj_width == gdn.qkvz_width
        assert gdn.split(2) == replace(gdn, key_heads=1, value_heads=3)
        assert (attention.query_width, attention.kv_width) == (6 * 32, 3 * 32)
        assert attention.qkv_width == (2 * 6 + 2 * 3) * 32
        assert config.rope_theta == 1e7
        assert config.yarn is None
        assert (config.num_gdn_layers, config.num_attention_layers) == (2, 2)

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_names(self, model_type: str) -> None:
        config = Qwen35Config.from_hf(of_type(model_type))
        assert config.text_model_type == MODEL_TYPES[model_type].text_model_type
        assert config.hf_architecture == HF_ARCHITECTURES[model_type]

    def test_a_wrapper_without_a_vision_language_type_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="vision-language configs only"):
            replace(get_flavor("tiny-moe"), carried_outer={"image_token_id": 1})
