"""What `Qwen35Config.from_hf` refuses, each thing by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.hf_keys import MODEL_TYPES
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from tests.helpers.hf_configs import of_type, text_level, text_only, vision_language, without


class TestRefusals:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_an_unknown_key_is_named_with_what_it_may_have_meant(self, model_type: str) -> None:
        raw = of_type(model_type)
        text_level(raw)["linear_num_value_head"] = 6
        with pytest.raises(ConfigError, match="unknown key in the config: linear_num_value_head\n"):
            Qwen35Config.from_hf(raw)
        with pytest.raises(ConfigError, match="did you mean linear_num_value_heads"):
            Qwen35Config.from_hf(raw)

    def test_an_unknown_key_beside_text_config_is_refused_too(self) -> None:
        with pytest.raises(ConfigError, match="unknown key in the config: talker_config"):
            Qwen35Config.from_hf(vision_language() | {"talker_config": {}})

    def test_a_vision_tower_in_a_text_only_config_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="unknown key in the config: vision_config"):
            Qwen35Config.from_hf(text_only() | {"vision_config": {}})

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_every_key_without_a_safe_default_is_required(self, model_type: str) -> None:
        kind = MODEL_TYPES[model_type]
        required = {
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "linear_num_value_heads",
        } | (
            {
                "num_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
            }
            if kind.moe
            else {"intermediate_size"}
        )
        for key in required:
            raw = of_type(model_type)
            text_level(raw).pop(key)
            with pytest.raises(ConfigError, match=f"the config lacks {key}\n"):
                Qwen35Config.from_hf(raw)
            text_level(raw)[key] = None
            with pytest.raises(ConfigError, match=f"the config lacks {key}\n"):
                Qwen35Config.from_hf(raw)

    @pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl", "llama", "", 3, ["qwen3_5"]])
    def test_another_model_type(self, name: object) -> None:
        with pytest.raises(ConfigError, match=r"not a Qwen3\.5") as caught:
            Qwen35Config.from_hf(text_only() | {"model_type": name})
        assert caught.value.allowed == ", ".join(MODEL_TYPES)

    def test_no_model_type(self) -> None:
        with pytest.raises(ConfigError, match="lacks model_type"):
            Qwen35Config.from_hf(without(text_only(), "model_type"))

    def test_a_flat_vision_language_config_has_no_text_model(self) -> None:
        with pytest.raises(ConfigError, match="needs text_config"):
            Qwen35Config.from_hf(without(vision_language(), "text_config"))

    def test_a_text_config_of_another_kind(self) -> None:
        raw = vision_language("qwen3_5_moe")
        raw["text_config"]["model_type"] = "qwen3_5_text"
        with pytest.raises(ConfigError, match="text_config is of another model_type"):
            Qwen35Config.from_hf(raw)

    @pytest.mark.parametrize(
        ("model_type", "key", "right"),
        [
            ("qwen3_next", "mtp_num_hidden_layers", "num_nextn_predict_layers"),
            ("qwen3_5_moe", "num_nextn_predict_layers", "mtp_num_hidden_layers"),
        ],
    )
    def test_the_mtp_key_of_another_family(self, model_type: str, key: str, right: str) -> None:
        raw = of_type(model_type)
        text_level(raw)[key] = 1
        with pytest.raises(ConfigError, match=f"another key for {key}") as caught:
            Qwen35Config.from_hf(raw)
        assert caught.value.fix == f"write it as {right} alone"

    def test_another_head(self) -> None:
        raw = text_only("qwen3_5_text")
        with pytest.raises(ConfigError, match="architectures does not fit"):
            Qwen35Config.from_hf(raw | {"architectures": ["Qwen3_5ForSequenceClassification"]})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("attn_output_gate", False),
            ("attn_output_gate", 1),
            ("mtp_use_dedicated_embeddings", True),
            ("mlp_only_layers", [0]),
            ("mamba_ssm_dtype", "bfloat16"),
            ("output_gate_type", "sigmoid"),
            ("norm_topk_prob", False),
            ("decoder_sparse_step", 2),
            ("use_sliding_window", True),
            ("is_decoder", True),
        ],
    )
    @pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"])
    def test_a_value_that_no_published_model_has(
        self, model_type: str, key: str, value: object
    ) -> None:
        raw = of_type(model_type)
        text_level(raw)[key] = value
        with pytest.raises(ConfigError, match=f"{key} has a value that no published model has"):
            Qwen35Config.from_hf(raw)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_act": "gelu"}, "hidden_act must be silu"),
            ({"attention_bias": True}, "attention_bias must be false"),
            ({"mtp_num_hidden_layers": 2}, "more than one MTP layer"),
            ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
            ({"linear_num_value_heads": 5}, "multiple of linear_num_key_heads"),
            ({"num_experts_per_tok": 9}, "num_experts_per_tok is larger than num_experts"),
            ({"num_experts": 0}, "needs a positive num_experts"),
            ({"head_dim": 30}, "positive even number of channels"),
            ({"hidden_size": "96"}, "hidden_size must be a positive integer"),
            ({"hidden_size": 96.0}, "hidden_size must be a positive integer"),
            ({"vocab_size": True}, "vocab_size must be a positive integer"),
            ({"num_hidden_layers": -4}, "num_hidden_layers must be a positive integer"),
            ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
            ({"initializer_range": "0.02"}, "initializer_range must be a number"),
            ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
            ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must not be negative"),
            ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false"),
            ({"full_attention_interval": 4}, "describe different models"),
            ({"layer_types": []}, "layer_types is empty"),
            ({"layer_types": ["sliding_attention"] * 4}, r"layer_types\[0\] is not a layer kind"),
            (
                {"layer_types": ["full_attention"] * 3, "full_attention_interval": 1},
                "layer_types must have one entry per decoder layer",
            ),
        ],
    )
    def test_impossible_or_contradictory(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Qwen35Config.from_hf(text_only() | changes)

    def test_experts_in_a_dense_config(self) -> None:
        raw = text_only("qwen3_5_text")
        assert not Qwen35Config.from_hf(raw | {"num_experts": 0}).is_moe
        with pytest.raises(ConfigError, match="dense config has the mixture-of-experts key num_ex"):
            Qwen35Config.from_hf(raw | {"num_experts": 8})

    def test_a_dense_width_in_a_moe_config_is_carried(self) -> None:
        config = Qwen35Config.from_hf(text_only() | {"intermediate_size": 160})
        assert config.intermediate_size == 0
        assert config.to_hf()["intermediate_size"] == 160

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_quantised_checkpoints(self, model_type: str) -> None:
        with pytest.raises(ConfigError, match=r"quantised \(quantization_config\)"):
            Qwen35Config.from_hf(of_type(model_type) | {"quantization_config": {"bits": 4}})

    def test_a_copy_at_the_top_level_must_agree(self) -> None:
        raw = vision_language() | {"hidden_size": 96}
        assert Qwen35Config.from_hf(raw).to_hf()["hidden_size"] == 96
        with pytest.raises(ConfigError, match="hidden_size at the top level contradicts"):
            Qwen35Config.from_hf(raw | {"hidden_size": 64})


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"there is no config\.json"):
            Qwen35Config.from_hf(tmp_path)
        with pytest.raises(ConfigError, match=r"there is no config\.json"):
            Qwen35Config.from_hf("Qwen/Qwen3.5-35B-A3B")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b'{"model_type": ' + b"9" * 5000 + b"}", "not valid JSON"),
            (b"[]", "must be a JSON object"),
            (b"\xff\xfe", "cannot read the config"),
        ],
    )
    def test_unreadable(self, content: bytes, message: str, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            Qwen35Config.from_hf(file)
