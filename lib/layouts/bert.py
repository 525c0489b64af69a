"""BERT and DistilBERT, read for their body: extras/bert.py's parameters under the published names. Heads and poolers of any
task are left out. They are not written: what is made of them here is a classifier of images (extras/llmvit_backbones.py)."""

from functools import partial

from extras.bert import Bert, BertConfig
from lib.checks import checked
from lib.layouts.common import Layout, Name, activation, block_names, respell, with_defaults
from lib.layouts.settings import check_settings

COMMON = {"vocab_size": 30522, "max_position_embeddings": 512}
DEFAULTS = {  # what an absent setting means
    "bert": {
        **{**COMMON, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-12},
    },
    "distilbert": {**COMMON, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "activation": "gelu"},
}
SETTINGS = {  # ours: theirs
    "bert": {key: key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "distilbert": {
        **{"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
        **{"intermediate_size": "hidden_dim"},
    },
}
NEUTRAL = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "is_causal": (False,)}
# How many token types there are (all tokens here are of the first), how positions began, what heads do and how they drop out.
HARMLESS = "type_vocab_size sinusoidal_pos_embds classifier_dropout seq_classif_dropout qa_dropout tie_word_embeddings"


def read_bert(published: dict, kind: str) -> BertConfig:
    check_settings(published, kind, DEFAULTS[kind], NEUTRAL, HARMLESS)
    given = with_defaults(published, DEFAULTS[kind])
    return checked(
        BertConfig,
        vocab_size=given["vocab_size"],
        context_length=given["max_position_embeddings"],
        **{ours: given[theirs] for ours, theirs in SETTINGS[kind].items()},
        hidden_act=activation(given["hidden_act" if kind == "bert" else "activation"]),
        layer_norm_eps=given.get("layer_norm_eps", 1e-12),
    )


BLOCKS = {  # where a block is, and its parts
    "bert": ("encoder.layer", {
        "attn.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attn.proj": "attention.output.dense",
        "norm_1": "attention.output.LayerNorm",
        "mlp.fc": "intermediate.dense",
        "mlp.proj": "output.dense",
        "norm_2": "output.LayerNorm",
    }),
    "distilbert": ("transformer.layer", {
        "attn.qkv": tuple(f"attention.{part}_lin" for part in "qkv"),
        "attn.proj": "attention.out_lin",
        "norm_1": "sa_layer_norm",
        "mlp.fc": "ffn.lin1",
        "mlp.proj": "ffn.lin2",
        "norm_2": "output_layer_norm",
    }),
}  # fmt: skip
SPELLINGS = {r"^(bert|distilbert)\.": "", r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
NO_PARAMETER = r"^(pooler|cls|classifier|pre_classifier|qa_outputs|vocab_(transform|layer_norm|projector))\.|position_ids$"


def bert_names(model: Bert, kind: str) -> list[Name]:
    names = [Name(f"{part}_embedding.weight", (f"embeddings.{theirs}.weight",))
             for part, theirs in (("token", "word_embeddings"), ("position", "position_embeddings"))]  # fmt: skip
    names += [Name(f"norm.{which}", (f"embeddings.LayerNorm.{which}",)) for which in ("weight", "bias")]
    layers, parts = BLOCKS[kind]
    for i in range(model.config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"{layers}.{i}", parts)
    return names


def clean_bert(tensors: dict) -> dict:
    """BERT's token type 0 added to its positions: every token is of it."""
    tensors = respell(tensors, SPELLINGS, NO_PARAMETER)
    types, positions = tensors.pop("embeddings.token_type_embeddings.weight", None), "embeddings.position_embeddings.weight"
    return tensors if types is None else {**tensors, positions: tensors[positions] + types[0]}


LAYOUTS = {
    kind: Layout(Bert, partial(read_bert, kind=kind), None, partial(bert_names, kind=kind), clean_bert) for kind in DEFAULTS
}
