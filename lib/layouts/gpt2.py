"""GPT-2: gpt.py's parameters under the published names, which keep linear layers as [in, out]."""

from gpt import GPT, GPTConfig
from lib.checks import checked
from lib.layouts.common import Layout, Name, activation, block_names
from lib.layouts.settings import check_settings

READ = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon")
READ += ("tie_word_embeddings",)
NEUTRAL = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "is_causal": (True,)}
# n_ctx is n_positions again; attention in fp32, reordered or not, is the same; summary_*: of a head that is not read.
HARMLESS = "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type"
HARMLESS += " summary_use_proj"


def read_gpt2_config(published: dict) -> GPTConfig:
    check_settings(published, "gpt2", READ, NEUTRAL, HARMLESS)
    return checked(
        GPTConfig,
        vocab_size=published["vocab_size"],
        context_length=published["n_positions"],
        hidden_size=published["n_embd"],
        num_hidden_layers=published["n_layer"],
        num_attention_heads=published["n_head"],
        intermediate_size=published.get("n_inner"),
        hidden_act=activation(published.get("activation_function", "gelu_new")),
        layer_norm_eps=published.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=published.get("tie_word_embeddings", True),
    )


def write_gpt2_config(config: GPTConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.hidden_act, config.hidden_act),
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **{key: config.dropout for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
    }


GPT2_BLOCK = {
    "norm_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def gpt2_names(model: GPT) -> list[Name]:
    names = [
        Name("token_embedding.weight", ("transformer.wte.weight",)),
        Name("lm_head.weight", ("transformer.wte.weight",), repeat="lm_head.weight")
        if model.config.tie_word_embeddings
        else Name("lm_head.weight", ("lm_head.weight",)),
        Name("position_embedding.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(model.config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"transformer.h.{i}", GPT2_BLOCK, transpose=True)
    return names + [Name(f"norm.{kind}", (f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")]


def clean_gpt2(tensors: dict) -> dict:
    """OpenAI's own upload has no "transformer." before its names and carries its causal masks as tensors."""
    no_parameters = (".attn.bias", ".attn.masked_bias")
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith(no_parameters)
    }


LAYOUTS = {"gpt2": Layout(GPT, read_gpt2_config, write_gpt2_config, gpt2_names, clean_gpt2)}
