"""Attention that trees do not compute: sinks, other options, values narrower than keys."""

from types import SimpleNamespace

import pytest
import torch
from family_cases import (
    CPU,
    LOGP_TOLERANCE,
    assert_same_gradients,
    encoded,
    forest_loss,
    gradients,
    lines,
    true_loss,
    truth,
)
from tiny_vlms import make
from transformers import AutoConfig, GotOcr2Config

from realign.modeling import attention, tree_attention
from realign.modeling.forest import build_batch
from realign.modeling.layouts import max_tokens
from realign.modeling.model import ForestModel

SINKS, LATENT = "internvl-gpt_oss", "kimi_k25"


def assert_is_the_truth(name, kind):
    """Log-probs and gradients of forests equal those of plain forwards by eager attention."""
    named = {"": "sdpa", "text_config": attention.IMPLEMENTATIONS[kind]}
    vlm, _ = make(name, attention=named)
    model = ForestModel(vlm)
    examples, store = encoded(name, model)
    loss, targets = forest_loss(model, examples, store)
    found = gradients(vlm)
    vlm.zero_grad()
    plain, _ = make(name, attention="eager")
    ForestModel(plain)  # freezes the same weights
    logps = truth(plain, name, examples)
    true = true_loss(logps, targets)
    true.backward()
    assert loss.item() == pytest.approx(true.item(), rel=1e-5)
    assert assert_same_gradients(found, gradients(plain)) >= 20
    with torch.no_grad():
        batch = build_batch(examples, store, row_tokens=150)
        assert (batch.leaf_sums(model.logps(batch)) - logps).abs().max() < LOGP_TOLERANCE
    return model, lines(model, examples, store)


@pytest.mark.parametrize("kind", ["tree", "flash"])
def test_attention_sinks_are_computed_by_eager_attention(kind):
    model, printed = assert_is_the_truth(SINKS, kind)
    assert model.attention == "eager"
    assert printed[0] == "attention is eager: GptOssModel supports no sdpa"


@pytest.mark.parametrize("chosen", ["sdpa", "tree", "tree_varlen"])
def test_a_loaded_model_with_sinks_is_set_to_eager(chosen):
    vlm, _ = make(SINKS)
    vlm.model.get_decoder().config._attn_implementation = chosen
    assert ForestModel(vlm).attention == "eager"
    assert vlm.model.get_decoder().config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["tree", "flash"])
def test_values_narrower_than_keys(kind):
    """Multi-head latent attention of DeepSeek V3 and Kimi K2.5: widths 8 and 6."""
    model, _ = assert_is_the_truth(LATENT, kind)
    assert model.attention == attention.IMPLEMENTATIONS[kind]


def test_heads_of_latent_attention_are_as_wide_as_both_parts_of_a_key():
    vlm, _ = make(LATENT, attention="flash")
    config = vlm.model.get_decoder().config
    config.qk_nope_head_dim, config.qk_rope_head_dim = 256, 8
    assert ForestModel(vlm).instead == "its heads are 264 wide"
    config._attn_implementation, config.v_head_dim = "tree_varlen", 272
    assert ForestModel(vlm).instead == "its heads are 272 wide"


@pytest.mark.parametrize("way", ["trees", "sequences"])
@pytest.mark.parametrize("option", ["s_aux", "softcap", "block_indices", "sinks", "is_causal"])
def test_an_option_that_would_be_left_out_is_an_error(option, way):
    states, trees = torch.zeros(1, 2, 6, 8), (((2, 2, 2),),)
    inputs = {"trees": trees, "sequences": tree_attention.varlen_attention.sequences(trees, 6)}

    def attend(**options):
        parts = torch.nn.Identity(), states, states, states, tree_attention.no_mask(CPU)
        return tree_attention.forest_attention(*parts, **{way: inputs[way]}, **options)

    harmless = {"position_ids": torch.arange(6), "use_cache": False, "is_causal": None}
    assert attend(**harmless, s_aux=None, softcap=None)[0].shape == (1, 6, 2, 8)
    assert attend(is_causal=True)[0].shape == (1, 6, 2, 8)
    value = False if option == "is_causal" else torch.zeros(2)
    with pytest.raises(ValueError, match=f"Identity passes {option} to .* Use --attention eager"):
        attend(**{option: value})


def test_a_layer_that_passes_an_unknown_option_stops_the_first_forward(monkeypatch):
    vlm, _ = make("llava", attention="tree")
    model = ForestModel(vlm).eval()
    examples, store = encoded("llava", model)
    decoder = vlm.model.get_decoder()
    for layer in decoder.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, **kw: forward(*a, **kw, sinks=1)
    with pytest.raises(ValueError, match="LlamaAttention passes sinks to its attention"):
        lines(model, examples, store)


def test_models_are_loaded_with_an_implementation_that_their_classes_support():
    sinks, plain = (make(name)[0].config for name in (SINKS, LATENT))
    for kind in ("tree", "flash", "sdpa", "eager"):
        assert attention.implementations(sinks, kind) == {"": "sdpa", "text_config": "eager"}
        name = attention.IMPLEMENTATIONS[kind]
        assert attention.implementations(plain, kind) == {"": "sdpa", "text_config": name}
    assert attention.implementations(sinks, "flex")["text_config"] == "flex_attention"
    assert attention.implementations(GotOcr2Config(), "sdpa") == {
        "": "eager",
        "text_config": "sdpa",
    }


def test_longrope_limits_records_to_the_original_length():
    """A longer sequence would change the frequencies of all others in a forward."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 60}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    text = {"model_type": "phi3", "rope_parameters": rope | {"rope_theta": 1e4}, **lengths, **sizes}
    config = AutoConfig.for_model("internvl", text_config=text)
    assert max_tokens(SimpleNamespace(config=config)) == 60
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = AutoConfig.for_model("internvl", text_config=text)
    assert max_tokens(SimpleNamespace(config=config)) == 512
