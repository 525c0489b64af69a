"""A vision-language model from its parts, each trained before or new, with the processor that belongs to it.

    tokenizer = train_tokenizer(texts, vocab_size=450)
    model, processor = assemble(SiglipVisionConfig(...), LLAMA32Config(...), tokenizer, {"image_mean": ..., "image_std": ...})
    model, processor = assemble(find_part("runs/siglip", "vision"), find_part("model.gguf", "lm"), tokenizer, {})
    model, processor = whole_model("runs/vlm-scenes")
"""

from dataclasses import fields, replace

import torch
import torch.nn as nn

from gpt import GPT, GPTConfig
from lib.chat import with_end_of_turn, writes_end
from lib.chat_template import OURS
from lib.files import find_source, naming
from lib.image_settings import for_size, read_image_settings
from lib.positions import resized_tower
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import IMAGE_TOKEN, TILE_TOKENS, MllamaImageProcessor, text_around_images
from siglip import SiglipModel, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import ViTModel, pair, sincos_positions

# The one dial of the recipes: (vision tower, language model, vocabulary of a tokenizer that is trained).
SIZES = {
    "tiny": (  # for tests: it learns next to nothing
        {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64, "rope_base": 10000.0,
         "max_position_embeddings": 384, "tie_word_embeddings": True},
        400,
    ),
    "small": (
        {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
        {"hidden_size": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384, "rope_base": 10000.0,
         "max_position_embeddings": 512, "tie_word_embeddings": True},
        450,
    ),
    "medium": (  # for captions of photos by a tower that comes trained
        {"image_size": 128, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        {"hidden_size": 256, "n_heads": 4, "n_kv_groups": 4, "n_layers": 4, "hidden_dim": 704, "rope_base": 10000.0,
         "max_position_embeddings": 1024, "tie_word_embeddings": True},
        4096,
    ),
    "smol": (SiglipVisionConfig.PRESETS["base-p16-224"], LLAMA32Config.PRESETS["smollm2-135m"], 8192),
}  # fmt: skip


def train_tokenizer(texts: list[str], vocab_size: int) -> BPETokenizer:
    """A tokenizer with a chat template, as large as the texts allow, up to vocab_size."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    roles = ["user\n", "assistant\n", "system\n"] * 100  # what the chat template writes, in few tokens
    return BPETokenizer.train([*texts, *roles], vocab_size, special, at_most=True)


def with_chat_template(tokenizer, source: str):
    """The tokenizer that came from `source`; one that has no chat template, such as a base model's, gets ours, in place."""
    if not tokenizer.chat_template:
        print(f"{source} has no chat template: it learns ours, chatml_spaced, with <|im_start|> and <|im_end|>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = OURS["chatml_spaced"]
    if not writes_end(tokenizer):
        print(f"{source}: its chat template writes no token behind an answer: training ends each with {tokenizer.eos_token}")
    return tokenizer


def find_part(source: str, part: str, image_size: int | None = None, layers: int | None = None) -> nn.Module:
    """The vision tower ("vision") or the language model ("lm") of any checkpoint that has one. image_size: pixels that the
    tower is to read; its positions are resized. layers: of its blocks, the first so many. Raises ValueError for other
    checkpoints."""
    from lib.checkpoint import from_pretrained

    with naming(f"--{part}", source):
        found = from_pretrained(source)
    if isinstance(found, MllamaForConditionalGeneration):
        found.language_model.generation_config = found.generation_config
        found = found.vision_tower if part == "vision" else found.language_model
    elif part == "vision" and hasattr(found, "vision_tower"):  # extras/tower_pairs.py
        found = found.vision_tower
    elif part == "vision" and isinstance(found, SiglipTwoTower):
        towers, found = found, SiglipModel(found.config.vision_config)
        found.vision_model = towers.vision_model
    elif part == "vision" and isinstance(found, ViTModel):
        found = as_tower(found)
    if not isinstance(found, SiglipModel | ViTModel if part == "vision" else Llama3ForCausalLM | GPT):
        wanted = "a vision tower (SigLIP, ViT, CLIP, DINOv2)" if part == "vision" else "a decoder (LLaMA, Mistral, Qwen, GPT-2)"
        raise ValueError(f"--{part} {source} holds a {type(found).__name__}: it must be {wanted}, or a model that has one")
    if part == "vision" and found.config.num_channels != 3:
        raise ValueError(f"--vision {source} reads images of {found.config.num_channels} channels: it must be 3, RGB")
    if layers:
        found = first_blocks(found, layers)
    if not image_size:
        return found
    try:
        return resized_tower(found, image_size)
    except ValueError as error:
        raise ValueError(f"--image-size {image_size}: {error}") from None


def as_tower(vit: ViTModel) -> ViTModel:
    """A ViT as the tower of a vision-language model: without its classifier, and for RGB. Of a ViT for grey images each filter
    becomes three, a third for each channel, which is the same for grey. Any other number of channels stays."""
    config = replace(vit.config, num_labels=0, id2label=None, pooling="cls")  # how it pooled is of no use to a tower
    state = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("classifier.")}
    if vit.config.num_channels == 1:
        filters = state["embeddings.projection.weight"]
        state["embeddings.projection.weight"] = filters.expand(-1, 3, -1, -1) / 3
        config = replace(config, num_channels=3)
    tower = ViTModel(config).eval()
    tower.load_state_dict(state)
    return tower


def first_blocks(tower: SiglipModel | ViTModel, count: int) -> SiglipModel | ViTModel:
    """The tower without its later blocks, its last norm after those that stay. The last blocks of a tower are bent to what it
    was trained for last. Raises ValueError unless it has so many."""
    depth = tower.config.num_hidden_layers
    if count > depth:
        raise ValueError(f"--vision-layers {count}: the tower has {depth}")
    del (tower.blocks if isinstance(tower, ViTModel) else tower.vision_model.encoder.layers)[count:]
    tower.config = replace(tower.config, num_hidden_layers=count)
    return tower


def parts_after(tower: SiglipModel | ViTModel, layer: int | None) -> list[nn.Module]:
    """What of a tower comes after the features of a layer, counted as in its `features`: it has no gradient."""
    if layer is None:
        return []
    vit = isinstance(tower, ViTModel)
    blocks, norm = (tower.blocks, tower.norm) if vit else (tower.vision_model.encoder.layers, tower.vision_model.post_layernorm)
    return [norm, *blocks[range(len(blocks) + 1)[layer] :]]


def tower_image_settings(source: str, tower: nn.Module) -> dict:
    """How a tower's folder wants images scaled and resized, at the size that the tower reads now; without tiles, which are not
    the tower's."""
    with naming("--vision", source):
        settings = read_image_settings(find_source(source))
    tiled = "longest_edge" in (settings.get("size") or {}) or settings.get("fit") == "tiles"
    settings = {key: value for key, value in settings.items() if not (tiled and key in ("size", "fit"))}
    return for_size(settings, pair(tower.config.image_size))


def assemble(
    vision: SiglipVisionConfig | nn.Module, text: LLAMA32Config | nn.Module, tokenizer, image_settings: dict, seed: int = 0,
    fusion: str = "early", split_images: bool = False, **join,
) -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor]:  # fmt: skip
    """The model and its processor. vision, text: a config for a new part, or a trained module whose weights are taken over; the
    tokenizer gains <image>. fusion "cross": extras/cross_attention.py. split_images: into tiles, whose tokens the tokenizer
    gains, too. join: further settings of MLLAMAConfig."""
    tower, decoder = (part if isinstance(part, nn.Module) else None for part in (vision, text))
    vision = tower.config if tower else vision
    if isinstance(vision, SiglipVisionConfig):
        vision = replace(vision, vision_use_head=False)
    config_class, model_class = MLLAMAConfig, MllamaForConditionalGeneration
    if fusion == "cross":
        from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM

        config_class, model_class = CrossAttentionConfig, CrossAttentionVLM
    text = decoder.config if decoder else text
    plain = GPTConfig if isinstance(text, GPTConfig) else LLAMA32Config  # without what one with cross-attention has beside it
    text = plain(**{field.name: getattr(text, field.name) for field in fields(plain)})
    config = config_class(vision, text, **join)
    places, context = config.text_config.num_image_tokens, config.text_config.context_length
    if places >= context:
        raise ValueError(f"an image is {places} tokens, the language model reads {context}: finetune_vlm.py has --image-size")
    settings = image_settings | {"around_image": text_around_images(config), "image_size": pair(vision.image_size)}
    if split_images:
        tokenizer.add_special_tokens([IMAGE_TOKEN, *TILE_TOKENS])
    processor = MllamaImageProcessor(tokenizer, places, add_location_tokens=False, **settings)
    processor.split_images(split_images)
    vocabulary = max(len(tokenizer), decoder.config.vocab_size if decoder else 0)
    text = replace(config.text_config, vocab_size=vocabulary)
    config = replace(config, text_config=text, image_token_id=processor.image_token_id)
    torch.manual_seed(seed)
    model = model_class(config)
    if tower:
        state = {k: v for k, v in tower.state_dict().items() if not k.startswith("vision_model.head.")}
        model.vision_tower.load_state_dict(state)
    else:  # positions that say from the first step what is near what
        positions = model.vision_tower.vision_model.embeddings.position_embedding.weight
        positions.data.copy_(sincos_positions(vision.grid, vision.hidden_size))
    if decoder:
        take_over(model.language_model, decoder, vocabulary)
    model.generation_config = with_end_of_turn(getattr(decoder, "generation_config", {}), tokenizer)
    return model, processor


def take_over(new: nn.Module, decoder: nn.Module, vocabulary: int) -> None:
    """The weights of a decoder, its vocabulary grown. Cross-attention layers that only one of the two has stay out of it."""
    from lib.vocabulary import resize_token_embeddings

    resize_token_embeddings(decoder, vocabulary)
    own = new.state_dict()
    known = {k: v for k, v in decoder.state_dict().items() if k in own or "cross_layers" not in k}
    new.load_state_dict({**own, **known})


def whole_model(
    source: str, seed: int = 0, split_images: bool | None = None
) -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor]:
    """A vision-language model that is to learn more, and its processor. split_images: see load_processor."""
    from lib.checkpoint import load_vlm
    from lib.vocabulary import resize_token_embeddings

    with naming("--model", source):
        model, processor = load_vlm(source, split_images=split_images)
    with_chat_template(processor.tokenizer, source)
    model.generation_config = with_end_of_turn(model.generation_config, processor.tokenizer)
    resize_token_embeddings(model, max(len(processor.tokenizer), model.config.text_config.vocab_size))
    model.config = replace(model.config, image_token_id=processor.image_token_id)
    torch.manual_seed(seed)
    return model, processor
