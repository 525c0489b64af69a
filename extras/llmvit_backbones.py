"""Language models as backbones of llmvit.py: cut to their first layers and to whole words, under LoRA, in 4 bits. And the
model of a finished run, written and read.

    backbone = get_classification_model("FOLDER", depth=2, num_classes=10, lora_config={"rank": 16, "alpha": 32}, qlora=True)
    model = LLMVIT(backbone, EncoderConfig(), EmbedderConfig())
    model, config = from_run("runs/llmvit-digits")       # lib.checkpoint.from_pretrained gives the model alone

FOLDER: any LLaMA-like, GPT-2, BERT or DistilBERT that lib/checkpoint.py reads; its head, for whatever task, is not used.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn

from extras.bert import Bert, BertConfig
from extras.llmvit import LLMVIT, EmbedderConfig, EncoderConfig
from gpt import GPT, GPTConfig
from lib.checkpoint import from_pretrained
from lib.files import naming, one_line, read_json, write_json
from lib.image_settings import write_classifier_settings
from lib.layouts.vit import read_labels
from lib.lora import check_rank
from lib.tokenizer import load_tokenizer
from lib.weights import read_safetensors, write_tensors
from model import Llama3ForCausalLM, Llama3Model, LLAMA32Config, convert_linears_to_lora
from vit_scratch import pair

MODEL_TYPE = "llmvit_scratch"
KINDS = {"llama": (Llama3ForCausalLM, LLAMA32Config), "gpt2": (GPT, GPTConfig), "bert": (Bert, BertConfig)}

# ---- a language model cut to size ----------------------------------------------------------------------------------------


class WordList:
    """The words that were kept, in their new order: what a tokenizer is to a whole vocabulary."""

    def __init__(self, words: list[str]):
        self.words = words

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids)


def whole_words(tokenizer, most: int, size: int) -> list[int]:
    """The first ids below `size`, `most` at most, that stand for a word of three letters or more. In byte-level BPE a space
    begins a word, and as merges are learned in the order of their frequency, these are common words and some beginnings of
    words. WordPiece marks what continues a word instead: ##ing."""
    texts = [tokenizer.decode([i]) for i in range(min(len(tokenizer), size))]
    space = " " if any(text.startswith(" ") and text[1:].isalpha() for text in texts) else ""
    words = [text.removeprefix(space) if text.startswith(space) else "" for text in texts]
    found = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 2][:most]
    if not found:
        raise ValueError(f"--words {most}: none of the {size:,} tokens is a whole word: take them all with --words 0")
    return found


def word_matrix(lm: nn.Module) -> nn.Parameter:
    return (lm.model.embed_tokens if isinstance(lm, Llama3ForCausalLM) else lm.token_embedding).weight


@torch.no_grad()
def cut(lm: nn.Module, layers: int | None, ids: list[int] | None) -> nn.Module:
    """The first layers of a language model with some rows of its word embedding, as a new model. Raises ValueError for more
    layers than there are."""
    llama = isinstance(lm, Llama3ForCausalLM)
    depth, rows = ("n_layers", "model.embed_tokens.weight") if llama else ("num_hidden_layers", "token_embedding.weight")
    have = getattr(lm.config, depth)
    if layers is not None and layers > have:
        raise ValueError(f"--lm-layers {layers}: the language model has {have}")
    changes = {depth: layers or have, "vocab_size": lm.config.vocab_size if ids is None else len(ids)}
    if llama:
        changes["tie_word_embeddings"] = True  # its own head is not used
    with torch.device("meta"):
        new = type(lm)(replace(lm.config, **changes))
    old = lm.state_dict()
    if ids is not None:
        old[rows] = old[rows][ids]
    new.load_state_dict({name: old[rows if name == "lm_head.weight" else name] for name in new.state_dict()}, assign=True)
    if hasattr(new, "tie_weights"):
        new.tie_weights()
    return new.requires_grad_(True)


def load_language_model(
    source: str | Path, layers: int | None = None, words: int | None = None
) -> tuple[nn.Module, list[str] | None]:
    """The first `layers` of a checkpoint (None: all) with the first so many whole words of its vocabulary, and how these are
    spelled. words 0: all tokens; None: all, and no tokenizer is read. Raises ValueError for a model of another kind."""
    with naming("--lm", source):
        lm = from_pretrained(source)
    if not isinstance(lm, tuple(model for model, _ in KINDS.values())):
        raise ValueError(f"--lm {source} is a {type(lm).__name__}: it must be a LLaMA, a GPT-2, a BERT or a DistilBERT")
    if words is None:
        return cut(lm, layers, None), None
    tokenizer, size = load_tokenizer(source), lm.config.vocab_size
    ids = whole_words(tokenizer, words, size) if words else None
    spelled = [tokenizer.decode([i]) if i < len(tokenizer) else f"#{i}" for i in ids or range(size)]
    return cut(lm, layers, ids), spelled


# ---- as a classifier -----------------------------------------------------------------------------------------------------


class LanguageClassifier(nn.Module):
    """A decoder of gpt.py or model.py, or a Bert, with a linear layer over classes in place of its word head, which it loses.

    pooling: what that layer reads, the "last" position (which alone has seen all others) or the "mean" of all.
    """

    def __init__(self, model: GPT | Llama3ForCausalLM | Bert, num_labels: int, pooling: str = "last"):
        super().__init__()
        if not isinstance(model, GPT | Llama3ForCausalLM | Bert):
            raise ValueError(f"a {type(model).__name__} is no language model here: it must be a GPT, Llama3ForCausalLM or Bert")
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling is {pooling!r}: it must be last or mean")
        self.config, self.pooling = model.config, pooling
        self.decoder = model.model if isinstance(model, Llama3ForCausalLM) else model
        if isinstance(model, GPT):
            model.lm_head = None  # the word embedding again
        self.score = nn.Linear(model.config.hidden_size, num_labels)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens if isinstance(self.decoder, Llama3Model) else self.decoder.token_embedding

    def forward(self, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, N, D] -> {"logits": [B, K]}."""
        llama = isinstance(self.decoder, Llama3Model)
        x = self.decoder(inputs_embeds) if llama else self.decoder.hidden_states(inputs_embeds)
        return {"logits": self.score(x[:, -1] if self.pooling == "last" else x.mean(dim=1))}


class NoLanguageModel(nn.Module):
    """What is left without one: a linear layer over the mean of the patches. The baseline, for a direct embedder."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.score = nn.Linear(width, num_labels)

    def get_input_embeddings(self) -> None:
        return None

    def forward(self, inputs_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.score(inputs_embeds.mean(dim=1))}


def get_classification_model(
    pretrained_model_name_or_path: str | Path, depth: int | None = None, num_classes: int = 10,
    lora_config: dict | None = None, qlora: bool = False, pooling: str = "mean",
) -> LanguageClassifier:  # fmt: skip
    """The function of this name in llmvit: the first `depth` layers (None: all) of a language model with a new head over
    classes. lora_config: arguments of convert_linears_to_lora, under which the layers are frozen; qlora: in 4 bits as well."""
    lm, _ = load_language_model(pretrained_model_name_or_path, depth)
    return frozen_under_lora(LanguageClassifier(lm, num_classes, pooling), lora_config, qlora)


def frozen_under_lora(backbone: LanguageClassifier, lora: dict | None, qlora: bool) -> LanguageClassifier:
    """The backbone itself, its language model frozen under LoRA, in 4 bits if so wished."""
    if lora is None:
        return backbone
    backbone.decoder.requires_grad_(False)
    if qlora:
        from lib.quant import Linear4bit, quantize_

        quantize_(backbone.decoder)
        lora = {**lora, "target_module_classes": (nn.Linear, Linear4bit)}
    check_rank(backbone.decoder, lora.get("rank", 4), lora.get("targets"), lora.get("target_module_classes", (nn.Linear,)))
    convert_linears_to_lora(backbone.decoder, **lora)
    return backbone


def make_backbone(settings: dict, lm: nn.Module | None = None, width: int | None = None) -> nn.Module:
    """From what config.json says; without lm, a model of that shape to load the weights into."""
    if settings["kind"] == "none":
        return NoLanguageModel(width or lm.config.hidden_size, settings["num_labels"])
    model, config = KINDS[settings["kind"]]
    lm = model(config(**settings["config"])) if lm is None else lm
    backbone = LanguageClassifier(lm, settings["num_labels"], settings["pooling"])
    return frozen_under_lora(backbone, settings["lora"], settings["qlora"])


# ---- a finished run --------------------------------------------------------------------------------------------------------


def save_run(folder: Path, model: LLMVIT, config: dict, classes: list[str], mean, std, settings: dict) -> None:
    """What from_run reads. The weights come last: config.json beside older weights is refused for what does not fit."""
    model.config.id2label = dict(enumerate(classes))
    write_json(folder / "settings.json", settings)
    write_classifier_settings(folder, pair(model.config.img_size), mean, std)
    write_json(folder / "config.json", {**config, "encoder": asdict(model.config)})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    from_run(folder)  # what was written can be read


def from_run(folder: str | Path) -> tuple[LLMVIT, dict]:
    """A finished run's model, in eval mode, and its config.json, with "words", which are None without a language model. Raises
    ValueError or FileNotFoundError for other folders."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: is it the folder of a finished run of train_llmvit.py?")
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder} has model_type {config.get('model_type')!r}: it is no run of train_llmvit.py")
    tensors = read_safetensors(folder)
    try:
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in config["encoder"].items()}
        encoder = EncoderConfig(**sizes)
        encoder.id2label = read_labels(encoder.id2label)
        backbone = make_backbone(config["backbone"], width=encoder.embed_dim)
        model = LLMVIT(backbone, encoder, EmbedderConfig(**config["embedder"]), **config["options"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {one_line(error):.200}"
        raise ValueError(f"{folder} is no run of today's train_llmvit.py ({reason}): train it again") from None
    return model.eval(), config
