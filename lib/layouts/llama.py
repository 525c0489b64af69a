"""LLaMA, as transformers 4 and 5 write it."""

from lib.checks import checked
from lib.layouts.common import TOKEN_IDS, own_layout, prefix_layout, unusual, with_defaults
from model import Llama3ForCausalLM, LLAMA32Config

LLAMA = {
    **{"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None},
    **{"num_hidden_layers": 32, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02},
}
LLAMA_SETTINGS = {  # ours: theirs
    **{"vocab_size": "vocab_size", "hidden_size": "hidden_size", "n_heads": "num_attention_heads", "head_dim": "head_dim"},
    **{"n_kv_groups": "num_key_value_heads", "n_layers": "num_hidden_layers", "hidden_dim": "intermediate_size"},
    **{"context_length": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps", "mlp_bias": "mlp_bias"},
    **{key: key for key in ("tie_word_embeddings", "attention_bias", "initializer_range")},
}
HANDLED = (*LLAMA_SETTINGS, "max_position_embeddings", "rope_base", "rope_scaling", "dropout", "attention", "num_image_tokens")


def read_llama(published: dict) -> LLAMA32Config:
    given = with_defaults(published, LLAMA)
    if given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the activation {given['hidden_act']!r} is not implemented for a LLaMA, only silu is")
    # transformers 5 has it all in rope_parameters; 4.x the base as rope_theta and the rest, if any, in rope_scaling
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    base = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    return checked(
        LLAMA32Config,
        **{ours: given[theirs] for ours, theirs in LLAMA_SETTINGS.items()},
        max_position_embeddings=given["max_position_embeddings"],
        rope_base=base,
        rope_scaling=None if rope in ({}, {"rope_type": "default"}) else rope,
    )


def write_llama(config: LLAMA32Config) -> dict:
    rope = config.rope_scaling or {"rope_type": "default"}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA_SETTINGS.items()},
        "hidden_act": "silu",
        "attention_dropout": config.dropout,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "rope_theta": config.rope_base,  # what does not know rope_parameters yet would take the defaults, and be wrong
        "rope_scaling": config.rope_scaling,
        **dict.fromkeys(TOKEN_IDS),  # absent, transformers would take 1 and 2 for them
    }


def llama_misfit(config: LLAMA32Config) -> str:
    if config.hidden_size % config.n_heads:
        return f"hidden_size {config.hidden_size} is no multiple of {config.n_heads} heads, which transformers insists on"
    return unusual(config, HANDLED)


LAYOUTS = {
    "llama": prefix_layout(Llama3ForCausalLM, read_llama, write_llama, misfit=llama_misfit, modules={}),
    "llama_scratch": own_layout(Llama3ForCausalLM, LLAMA32Config),
}
