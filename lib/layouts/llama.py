"""LLaMA, and the decoders that differ from it in a setting or two, Mistral, Qwen2 and Qwen3: as transformers 4 and 5 write."""

from functools import partial

from lib.checks import checked
from lib.layouts.common import TOKEN_IDS, own_layout, prefix_layout, unusual, with_defaults
from lib.layouts.settings import check_settings
from model import Llama3ForCausalLM, LLAMA32Config

LLAMA = {
    **{"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None},
    **{"num_hidden_layers": 32, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02},
}
QWEN = {**LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
DEFAULTS = {  # what an absent setting means, by model_type
    "llama": LLAMA,
    "mistral": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
ALWAYS = {  # what a kind of decoder always is, whatever its file says
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "output_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
}
CLASS_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA_SETTINGS = {  # ours: theirs
    **{"vocab_size": "vocab_size", "hidden_size": "hidden_size", "n_heads": "num_attention_heads", "head_dim": "head_dim"},
    **{"n_kv_groups": "num_key_value_heads", "n_layers": "num_hidden_layers", "hidden_dim": "intermediate_size"},
    **{"context_length": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps", "mlp_bias": "mlp_bias"},
    **{key: key for key in ("tie_word_embeddings", "attention_bias", "initializer_range")},
}
HANDLED = (*LLAMA_SETTINGS, "max_position_embeddings", "rope_base", "rope_scaling", "dropout", "attention", "num_image_tokens")

READ = (*LLAMA_SETTINGS.values(), "hidden_act", "rope_parameters", "rope_scaling", "rope_theta")
READ += ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
NEUTRAL = {"is_causal": (True,), "partial_rotary_factor": (1, None), "use_mrope": (False,)}
# What SmolLM's training code and the text models of Idefics3 leave there; transformers does not look at it either.
HARMLESS = "is_llama_config rope_interleaved qk_layer_norms use_resampler perceiver_config pixel_shuffle_factor"


def read_llama(published: dict, kind: str = "llama") -> LLAMA32Config:
    check_settings(published, kind, READ, NEUTRAL, HARMLESS)
    given = with_defaults(published, DEFAULTS[kind])
    if given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the activation {given['hidden_act']!r} is not implemented for a {kind}, only silu is")
    check_window(published, kind, given["max_position_embeddings"])
    # transformers 5 has it all in rope_parameters; 4.x the base as rope_theta and the rest, if any, in rope_scaling
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    base = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    settings = {ours: given[theirs] for ours, theirs in LLAMA_SETTINGS.items()} | ALWAYS[kind]
    return checked(
        LLAMA32Config,
        **settings,
        max_position_embeddings=given["max_position_embeddings"],
        rope_base=base,
        rope_scaling=None if rope in ({}, {"rope_type": "default"}) else rope,
    )


def check_window(published: dict, kind: str, context: int) -> None:
    """Raises ValueError where tokens attend to a window shorter than the context, which is not implemented."""
    window = published.get("sliding_window", 4096 if kind == "mistral" else None)
    used = kind == "mistral" or published.get("use_sliding_window", False)
    if any(layer != "full_attention" for layer in published.get("layer_types") or ()):
        raise ValueError(f"layer_types is {published['layer_types']!r:.80}: only full_attention is implemented")
    if used and window is not None and window < context:
        raise ValueError(f"sliding_window is {window}, shorter than the context of {context}: only full attention is here")


def write_llama(config: LLAMA32Config, kind: str = "llama") -> dict:
    rope = config.rope_scaling or {"rope_type": "default"}
    return {
        "model_type": kind,
        "architectures": [f"{CLASS_NAMES[kind]}ForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA_SETTINGS.items()},
        "hidden_act": "silu",
        "attention_dropout": config.dropout,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "rope_theta": config.rope_base,  # what does not know rope_parameters yet would take the defaults, and be wrong
        "rope_scaling": config.rope_scaling,
        **({} if kind == "llama" else {"sliding_window": None, "use_sliding_window": False}),
        **dict.fromkeys(TOKEN_IDS),  # absent, transformers would take 1 and 2 for them
    }


def llama_misfit(config: LLAMA32Config, kind: str = "llama") -> str:
    """Why a decoder of this kind is not one of this config."""
    if kind == "llama" and config.hidden_size % config.n_heads:
        return f"hidden_size {config.hidden_size} is no multiple of {config.n_heads} heads, which transformers insists on"
    always = {"output_bias": config.attention_bias, "qk_norm": False, **ALWAYS[kind]}
    for name, value in always.items():
        if getattr(config, name) != value:
            return f"its {name} is always {value}"
    return unusual(config, (*HANDLED, *always))


LAYOUTS = {
    **{
        kind: prefix_layout(
            Llama3ForCausalLM, partial(read_llama, kind=kind), partial(write_llama, kind=kind),
            spellings={r"^(?=(embed_tokens|layers|norm)\.)": "model."},  # of a base model, saved without its head
            misfit=partial(llama_misfit, kind=kind), modules={},
        )
        for kind in DEFAULTS
    },
    "llama_scratch": own_layout(Llama3ForCausalLM, LLAMA32Config),
}  # fmt: skip
