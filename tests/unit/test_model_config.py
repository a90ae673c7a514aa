"""What a config.json of each family means, where the spelling or an absent field decides."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ModelError
from engine.model.config import LlamaConfig
from engine.model.hf_config import config_from_hf
from kernels.rope import LinearScaling, YarnScaling
from tests.tiny_models import hf_config

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def config(family: str, **changes: Any) -> LlamaConfig:
    return config_from_hf(hf_config(model_type=family, architectures=None, **changes))


def test_old_and_new_spelling_of_scaling_mean_the_same() -> None:
    old = config("llama", rope_scaling={"type": "yarn", **YARN}, rope_theta=7e3)
    new = config(
        "llama", rope_parameters={"rope_type": "yarn", "rope_theta": 7e3, **YARN}, rope_theta=None
    )
    assert old == new
    assert isinstance(old.rope, YarnScaling)
    assert old.rope_theta == 7e3


def test_the_theta_beside_the_scaling_goes_first() -> None:
    assert config("llama", rope_parameters={"rope_theta": 7e3}, rope_theta=6e3).rope_theta == 7e3
    assert config("llama", rope_parameters={"rope_theta": None}, rope_theta=6e3).rope_theta == 6e3


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", **YARN}, 256),
        ({"rope_type": "yarn", **YARN, "original_max_position_embeddings": 200}, 800),
        ({"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, **YARN}, 256),
    ],
)
def test_the_context_is_the_one_that_scaling_was_made_for(
    scaling: dict[str, Any], context: int
) -> None:
    assert config("llama", rope_scaling=scaling).max_context == context


def test_a_yarn_factor_that_is_absent_is_the_ratio_of_the_contexts() -> None:
    rope = config(
        "qwen2", rope_scaling={"type": "yarn", "original_max_position_embeddings": 64}
    ).rope
    assert isinstance(rope, YarnScaling)
    assert rope.factor == 256 / 64


def test_windows_are_those_of_the_family() -> None:
    layers = {"num_hidden_layers": 3}
    some = layers | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    assert config("llama", **layers).windows == (None, None, None)
    assert config("mistral", **layers).windows == (4096, 4096, 4096)
    assert config("mistral", sliding_window=9, **layers).windows == (9, 9, 9)
    assert config("qwen2", sliding_window=9, **layers).windows == (None, None, None)
    assert config("qwen2", **some).windows == (None, None, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert config("qwen3", **some, layer_types=types).windows == (9, None, None)


def test_layer_types_that_a_family_does_not_have_are_refused() -> None:
    types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="layer_types"):
        config("mistral", sliding_window=9, layer_types=types)
    assert config("llama", layer_types=["full_attention"] * 2).windows == (None, None)


def test_biases_are_those_of_the_family() -> None:
    def biases(found: LlamaConfig) -> tuple[bool, ...]:
        return found.attention_bias, found.output_bias, found.mlp_bias, found.qk_norm

    assert biases(config("llama")) == (False, False, False, False)
    assert biases(config("llama", attention_bias=True)) == (True, True, False, False)
    assert biases(config("llama", mlp_bias=True)) == (False, False, True, False)
    assert biases(config("mistral")) == (False, False, False, False)
    assert biases(config("qwen2")) == (True, False, False, False)
    assert biases(config("qwen3")) == (False, False, False, True)


def test_linear_scaling_is_known_by_its_old_name() -> None:
    found = config("llama", rope_scaling={"type": "linear", "factor": 2})
    assert found.rope == LinearScaling(2.0)
