"""Toy folders as people publish them, one model a family, built with transformers' own classes and real kinds of tokenizers.

    make("llava", folder)               # as transformers 5 saves it: weights, config, tokenizer, processor, template
    as_version_4(folder)                # the same in the spelling of transformers 4, in place
    sharded(folder)                     # the same with its weights in several files, in place
    theirs("llava", folder, image)      # what AutoProcessor + generate make of it: an Outcome
    ours("llava", folder, image)        # what generate.py makes of it

as_version_4 was compared once with folders that transformers 4.57 wrote: files, keys and values, names of tensors. Where older
releases spelled otherwise, it does as they did: a template in tokenizer_config.json or chat_template.json, special tokens as
tables.
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import generate
from lib.conversation import Conversation
from lib.tokenizer import load_tokenizer
from model import MllamaForConditionalGeneration
from siglip import SiglipTwoTower
from vit_scratch import ViTModel

QUESTION = "  What color is the 2nd circle, é?\n"  # some templates trim it
CAPTIONS = ["A photo of \uff12 Cats.", "the dog jumped, over the fence!"]
NEW_TOKENS = 6
CORPUS = [
    "The dog jumped over the fence. What color is the circle? It is red, and 2 cats sit in a photo of 12 dogs.",
    "user\nassistant\nsystem\nUSER: ASSISTANT: You are a helpful assistant. Describe the image in a few words, please!\n",
    "Is the square left of the triangle? yes no 0 1 2 3 4 5 6 7 8 9 café naïve \u65e5\u672c \U0001f600",
] * 3  # fmt: skip

# ---- tokenizers: the kinds, trained small ----------------------------------------------------------------------------


def trained(tokenizer: Tokenizer, trainer) -> dict:
    """The vocabulary and merges (or scores) that it learns."""
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def byte_level(specials, digits=False, qwen=False) -> Tokenizer:
    """GPT-2's kind; SmolLM2's with single digits; Qwen2's or LLaMA-3's with a regex and NFC."""
    tokenizer = Tokenizer(models.BPE())
    if qwen:
        tf_qwen = tf.Qwen2Tokenizer(vocab={"a": 0}, merges=[])  # transformers holds the published regex
        tokenizer.pre_tokenizer = tf_qwen.backend_tokenizer.pre_tokenizer
        tokenizer.normalizer = normalizers.NFC()
    elif digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def fast(tokenizer: Tokenizer, **settings):
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings)


def smollm2(**settings):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    return fast(byte_level(specials, digits=True), **{**named, "chat_template": CHATML, **settings})


def smolvlm_tokenizer():
    tokenizer = smollm2(bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>")
    tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
    tokenizer.add_special_tokens({"extra_special_tokens": [
        "<fake_token_around_image>", "<global-img>", *tiles, "<image>", "<end_of_utterance>",
    ]})  # fmt: skip
    return tokenizer


def llama3(**settings):
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(specials, qwen=True)
    tokenizer.normalizer = None
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", bos)]
        ),
    ])  # fmt: skip
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return fast(tokenizer, **{**named, "chat_template": LLAMA3, **settings})


def qwen2(**settings):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return fast(byte_level(specials, qwen=True), **{**named, "chat_template": QWEN, **settings})


def gpt2(**settings):
    model = json.loads(byte_level(["<|endoftext|>"]).to_str())["model"]
    return tf.GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **settings)


def sentencepiece_bpe(unknown="<unk>", specials=("<unk>", "<s>", "</s>")) -> dict:
    """The vocabulary and merges of LLaMA-2's and Gemma's kind: pieces of text with \u2581 for a space, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False))


def llama2(**settings):
    model = sentencepiece_bpe()
    merges = [tuple(merge) for merge in model["merges"]]
    named = {"pad_token": "<pad>", "padding_side": "left", "extra_special_tokens": {"image_token": "<image>"}}
    return tf.LlamaTokenizer(vocab=model["vocab"], merges=merges, **{**named, **settings})


def mistral():
    return llama2(pad_token="</s>", extra_special_tokens=["[INST]", "[/INST]"], chat_template=MISTRAL, add_bos_token=True)


def gemma():
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    model = sentencepiece_bpe(specials=specials)
    merges = [tuple(merge) for merge in model["merges"]]
    return tf.Siglip2Tokenizer(
        vocab=model["vocab"], merges=merges, add_bos_token=False, add_eos_token=True, model_max_length=64, padding_side="right",
        model_input_names=["input_ids"],
    )  # fmt: skip


def unigram():
    """SigLIP's kind as its folders hold it: lower case, no punctuation, one end token, 1 for padding."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        normalizers.NFKC(),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=ends)
    return fast(
        tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=64, model_input_names=["input_ids"]
    )


def sentencepiece_file(folder: Path, **settings) -> Path:
    """The file alone, as SentencePiece's own training writes it."""
    import sentencepiece

    path = folder / "trained.model"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 10), model_writer=file, hard_vocab_limit=False, minloglevel=2, **settings
        )
    return path


def spiece(folder: Path):
    """SigLIP's tokenizer as transformers 5 has it: of spiece.model, which is all that it saves."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    path = sentencepiece_file(folder, vocab_size=120, model_type="unigram", normalization_rule_name="nmt_nfkc", **ids)
    tokenizer = tf.SiglipTokenizer(vocab_file=str(path), model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder)
    path.unlink()
    return tf.SiglipTokenizer.from_pretrained(folder)


def clip():
    tokenizer = tf.CLIPTokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    blank = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    blank.normalizer, blank.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    model = trained(blank, trainer)
    return tf.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], model_max_length=77)


# ---- chat templates: of the published shapes --------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\nYou are \"helpful\".<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = QWEN.replace("system\nYou are \"helpful\".<|im_end|>\n", "system\n{}<|im_end|>\n").replace(
    "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is "
    "false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
)  # fmt: skip
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INTERLEAVE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# ---- models ----------------------------------------------------------------------------------------------------------

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"max_position_embeddings": 2048}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7}


def lively(model):
    """Weights away from their starting values, so that everything shows in the answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def token_ids(tokenizer) -> dict:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def save(folder: Path, model, *companions, **generation) -> None:
    """generation: what its generation_config.json says beside the token ids."""
    model = lively(model)
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    for part in (model, *companions):
        part.save_pretrained(folder)


def save_decoder(folder: Path, config_class, model_class, tokenizer, **changes) -> None:
    ids = token_ids(tokenizer)
    model = model_class(config_class(**{**TEXT, "vocab_size": len(tokenizer), **ids, **changes}))
    save(folder, model, tokenizer, **ids)


def make_llama3(folder: Path) -> None:
    tokenizer = llama3()
    save_decoder(folder, tf.LlamaConfig, tf.LlamaForCausalLM, tokenizer, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 500000.0})  # fmt: skip


def make_smollm2(folder: Path) -> None:
    save_decoder(folder, tf.LlamaConfig, tf.LlamaForCausalLM, smollm2(), tie_word_embeddings=True)


def make_qwen2(folder: Path) -> None:
    save_decoder(folder, tf.Qwen2Config, tf.Qwen2ForCausalLM, qwen2(), tie_word_embeddings=True)


def make_qwen3(folder: Path) -> None:
    save_decoder(folder, tf.Qwen3Config, tf.Qwen3ForCausalLM, qwen2(chat_template=QWEN3), head_dim=16)


def make_mistral(folder: Path) -> None:
    save_decoder(folder, tf.MistralConfig, tf.MistralForCausalLM, mistral(), sliding_window=None)


def make_gpt2(folder: Path) -> None:
    tokenizer = gpt2()
    config = tf.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
                           bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    save(folder, tf.GPT2LMHeadModel(config), tokenizer)


def save_llava(folder: Path, vision, text_class, tokenizer, image_processor, template: str, strategy: str) -> None:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image, V = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer) + 7  # published tables are padded
    text = text_class(**TEXT, vocab_size=V, **token_ids(tokenizer))
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=16,
                            vision_feature_select_strategy=strategy)  # fmt: skip
    processor = tf.LlavaProcessor(image_processor, tokenizer, patch_size=7, vision_feature_select_strategy=strategy,
                                  chat_template=template, num_additional_image_tokens=int(strategy == "default"))  # fmt: skip
    save(folder, tf.LlavaForConditionalGeneration(config), processor, **token_ids(tokenizer))


def make_llava(folder: Path) -> None:
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    save_llava(folder, tf.CLIPVisionConfig(**VISION), tf.LlamaConfig, llama2(), images, LLAVA, "default")


def make_llava_siglip(folder: Path) -> None:
    images = tf.SiglipImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7])
    vision = tf.SiglipVisionConfig(**VISION, vision_use_head=False)
    save_llava(folder, vision, tf.LlamaConfig, llama3(pad_token="<|end_of_text|>"), images, LLAVA, "full")


def make_interleave(folder: Path) -> None:
    images = tf.SiglipImageProcessor(size={"height": 28, "width": 28})
    vision = tf.SiglipVisionConfig(**VISION, vision_use_head=False)
    save_llava(folder, vision, tf.Qwen2Config, qwen2(), images, INTERLEAVE, "full")


def save_idefics3(folder: Path, name: str, splits: bool) -> None:
    tokenizer = smolvlm_tokenizer()
    text = tf.LlamaConfig(**TEXT, vocab_size=len(tokenizer), **token_ids(tokenizer))
    config = getattr(tf, f"{name}Config")(
        vision_config=VISION, text_config=text, scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    images = tf.Idefics3ImageProcessor(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}, do_image_splitting=splits
    )
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM)
    model = getattr(tf, f"{name}ForConditionalGeneration")(config)
    save(folder, model, processor, **token_ids(tokenizer))


def make_idefics3(folder: Path) -> None:
    save_idefics3(folder, "Idefics3", True)


def make_idefics3_whole(folder: Path) -> None:
    save_idefics3(folder, "Idefics3", False)


def make_smolvlm(folder: Path) -> None:
    save_idefics3(folder, "SmolVLM", True)
    for path in folder.glob("*.json"):  # transformers' own class for it wants torchvision, for videos; this is what it writes
        path.write_text(path.read_text().replace("Idefics3Processor", "SmolVLMProcessor").replace("Idefics3Im", "SmolVLMIm"))


def save_towers(folder: Path, tokenizer, **images) -> None:
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 64, **token_ids(tokenizer)}  # fmt: skip
    model = tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=text))
    image_processor = tf.SiglipImageProcessor(size={"height": 28, "width": 28}, **images)
    save(folder, model, tf.SiglipProcessor(image_processor, tokenizer))


def make_siglip(folder: Path) -> None:
    save_towers(folder, unigram(), image_mean=[0.2, 0.3, 0.4])


def make_siglip_spiece(folder: Path) -> None:
    save_towers(folder, spiece(folder))


def make_siglip2(folder: Path) -> None:
    save_towers(folder, gemma(), resample=2)


def make_vit(folder: Path) -> None:
    names = {i: f"class {i}" for i in range(7)}
    config = tf.ViTConfig(**VISION, id2label=names, label2id={name: i for i, name in names.items()})
    save(folder, tf.ViTForImageClassification(config), tf.ViTImageProcessor(size={"height": 28, "width": 28}))


def make_clip(folder: Path) -> None:
    tokenizer = clip()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
            "num_attention_heads": 4, **token_ids(tokenizer)}  # fmt: skip
    model = tf.CLIPModel(tf.CLIPConfig(vision_config=VISION, text_config=text))
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    save(folder, model, tf.CLIPProcessor(images, tokenizer))


@dataclass(frozen=True)
class Family:
    make: Callable[[Path], None]
    kind: str  # what is done with it: "chat", "continue", "vlm", "zero-shot", "classes", "tower"


FAMILIES = {
    "llama3": Family(make_llama3, "chat"),
    "smollm2": Family(make_smollm2, "chat"),
    "qwen2": Family(make_qwen2, "chat"),
    "qwen3": Family(make_qwen3, "chat"),
    "mistral": Family(make_mistral, "chat"),
    "gpt2": Family(make_gpt2, "continue"),
    "llava": Family(make_llava, "vlm"),
    "llava_siglip": Family(make_llava_siglip, "vlm"),
    "interleave": Family(make_interleave, "vlm"),
    "idefics3": Family(make_idefics3, "vlm"),
    "idefics3_whole": Family(make_idefics3_whole, "vlm"),
    "smolvlm": Family(make_smolvlm, "vlm"),
    "siglip": Family(make_siglip, "zero-shot"),
    "siglip_spiece": Family(make_siglip_spiece, "zero-shot"),
    "siglip2": Family(make_siglip2, "zero-shot"),
    "vit": Family(make_vit, "classes"),
    "clip": Family(make_clip, "tower"),
}


def make(family: str, folder: Path) -> None:
    """The family's model and all that stands beside it, as transformers 5 saves them; the same each time. Two families end
    their answers at a token that only generation_config.json names."""
    torch.manual_seed(0)
    FAMILIES[family].make(folder)
    if family in ("llama3", "qwen3"):
        about = read(folder / "generation_config.json")
        answer = theirs(family, folder).answer
        write(folder / "generation_config.json", about | {"eos_token_id": [about["eos_token_id"], answer[3]]})


# ---- what is made of a folder ----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    pixel_values: torch.Tensor | None  # [I, 3, H, W], of all images or tiles
    input_ids: list  # of one prompt, or of each caption
    answer: object  # ids, probabilities or features


def auto_processor(folder: Path):
    """transformers' processor; SmolVLM's needs torchvision, for videos, and Idefics3's is the same for images."""
    path = folder / "processor_config.json"
    is_smolvlm = path.is_file() and "SmolVLMProcessor" in path.read_text()
    if not is_smolvlm:
        return tf.AutoProcessor.from_pretrained(folder)
    return tf.Idefics3Processor.from_pretrained(folder)


@torch.no_grad()
def theirs(family: str, folder: Path, image: Path | None = None) -> Outcome:
    kind = FAMILIES[family].kind
    picture = tf.image_utils.load_image(str(image)) if image else None
    if kind in ("chat", "continue"):
        tokenizer, model = tf.AutoTokenizer.from_pretrained(folder), tf.AutoModelForCausalLM.from_pretrained(folder)
        if kind == "chat":
            messages = [{"role": "user", "content": QUESTION}]
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(CAPTIONS[1], return_tensors="pt")
    elif kind == "vlm":
        processor, model = auto_processor(folder), tf.AutoModelForImageTextToText.from_pretrained(folder)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    elif kind == "zero-shot":
        processor, model = tf.AutoProcessor.from_pretrained(folder), tf.AutoModel.from_pretrained(folder)
        inputs = processor(
            text=CAPTIONS, images=[picture], padding="max_length", max_length=64, truncation=True, return_tensors="pt"
        )
        probabilities = model(**inputs).logits_per_image.sigmoid()
        return Outcome(inputs["pixel_values"], inputs["input_ids"].tolist(), probabilities)
    elif kind == "classes":
        inputs = tf.AutoImageProcessor.from_pretrained(folder)([picture], return_tensors="pt")
        model = tf.AutoModelForImageClassification.from_pretrained(folder)
        return Outcome(inputs["pixel_values"], [], model(**inputs).logits.softmax(dim=-1).sort(descending=True).values[0, :5])
    else:
        processor, model = tf.AutoProcessor.from_pretrained(folder), tf.AutoModel.from_pretrained(folder)
        inputs = processor(text=CAPTIONS, images=[picture])
        pixels = torch.tensor(inputs["pixel_values"][0])[None]
        tower = model.vision_model  # whose last norm transformers gives to the class token alone
        return Outcome(pixels, inputs["input_ids"], tower.post_layernorm(tower(pixels).last_hidden_state))
    answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    if answer[-1] in (stops if isinstance(stops, list) else [stops]):
        answer.pop()  # what ends an answer is no part of it
    pixels = inputs.get("pixel_values")
    pixels = pixels if pixels is None else pixels.reshape(-1, *pixels.shape[-3:])
    return Outcome(pixels, inputs["input_ids"][0].tolist(), answer)


@contextlib.contextmanager
def recorded(owner, name: str):
    """The arguments of each call of owner.name, while the block runs."""
    inner, calls = getattr(owner, name), []

    def outer(self, *args, **options):
        calls.append(args)
        return inner(self, *args, **options)

    setattr(owner, name, outer)
    try:
        yield calls
    finally:
        setattr(owner, name, inner)


def ours(family: str, folder: Path, image: Path) -> Outcome:
    """As the command line does it: the same functions, what they were given, what they answer."""
    kind = FAMILIES[family].kind
    if kind == "zero-shot":
        args = generate.parse_args([str(folder), "--image", str(image), "--zero-shot", *CAPTIONS])
        with recorded(SiglipTwoTower, "logits") as calls:
            probabilities = torch.tensor(generate.zero_shot(args))
        return Outcome(calls[0][0], calls[0][1].tolist(), probabilities)
    if kind == "tower":
        from lib.checkpoint import from_pretrained
        from lib.image_settings import read_image_settings
        from processing_mllama import process_images

        tokenizer, pixels = load_tokenizer(folder), process_images([str(image)], **read_image_settings(folder))
        with torch.no_grad():
            features = from_pretrained(folder)(pixels, output_hidden_states=True)
        return Outcome(pixels, [tokenizer.encode(caption) for caption in CAPTIONS], features)
    args = generate.parse_args([str(folder), *(["--image", str(image)] if kind in ("vlm", "classes") else [])])
    model, tokenizer, processor = generate.load(args)
    if kind == "classes":
        with recorded(ViTModel, "forward") as calls:
            rows = generate.likeliest_classes(args, model)
        return Outcome(calls[0][0], [], torch.tensor([p for p, _ in rows[0]]))
    if kind == "continue":
        ids = generate.encode(tokenizer, CAPTIONS[1])
        pieces = generate.stream_text(model, tokenizer, ids, max_new_tokens=NEW_TOKENS)
        return Outcome(None, ids, [token for _, token in pieces if token is not None])
    talk, pixels = Conversation(model, tokenizer, processor, max_new_tokens=NEW_TOKENS), None
    if processor is not None:
        with recorded(MllamaForConditionalGeneration, "image_features") as calls:
            talk.show(str(image))
        pixels = calls[0][0]
    for _ in talk.ask(QUESTION):
        pass
    return Outcome(pixels, talk.prompt_ids, talk.answer_ids)


# ---- other spellings of the same folder --------------------------------------------------------------------------------


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


CLASSES_OF_4 = {"TokenizersBackend": "PreTrainedTokenizerFast", "LlamaTokenizer": "LlamaTokenizerFast",
                "Siglip2Tokenizer": "GemmaTokenizerFast"}  # fmt: skip
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def as_version_4(folder: Path) -> None:
    """The folder as transformers 4 writes it: rope_theta, tokenizer and template in more files, image settings in a file of
    their own, CLIP's and SigLIP's towers inside LLaVA with one more prefix."""
    config = read(folder / "config.json")
    for part in (config, config.get("text_config", {})):
        rope = part.pop("rope_parameters", None)
        if rope:
            part["rope_theta"] = rope.pop("rope_theta")
            part["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
        for key in [key for key, value in part.items() if value is None and key != "rope_scaling"]:
            del part[key]
    write(folder / "config.json", config | {"transformers_version": "4.57.6"})
    if config["model_type"] == "llava":
        old = load_file(folder / "model.safetensors")
        new = {re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): old[name] for name in old}
        save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    processor = read(folder / "processor_config.json")
    if images := processor.pop("image_processor", None):
        write(folder / "preprocessor_config.json", images | {"processor_class": processor["processor_class"]})
        if set(processor) == {"processor_class"}:  # SigLIP's and CLIP's say nothing more
            (folder / "processor_config.json").unlink()
        else:
            write(folder / "processor_config.json", processor)
    if (folder / "tokenizer.json").is_file():
        tokenizer_as_version_4(folder, has_processor=bool(processor))


def tokenizer_as_version_4(folder: Path, has_processor: bool) -> None:
    spec, about = read(folder / "tokenizer.json"), read(folder / "tokenizer_config.json")
    about.pop("backend")
    about["tokenizer_class"] = CLASSES_OF_4.get(about["tokenizer_class"], about["tokenizer_class"])
    about["added_tokens_decoder"] = {str(t["id"]): {flag: t[flag] for flag in FLAGS} for t in spec["added_tokens"]}
    more = about.pop("extra_special_tokens", [])
    if more:
        about["additional_special_tokens"] = more
    about["extra_special_tokens"] = {key: about[key] for key in ("image_token",) if key in about}
    named = {key: about[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if about.get(key)}
    entries = {t["content"]: {flag: t[flag] for flag in FLAGS[:-1]} for t in spec["added_tokens"]}
    write(folder / "special_tokens_map.json", {key: entries[token] for key, token in named.items()} | {
        "additional_special_tokens": [entries[token] for token in more]})  # fmt: skip
    template = folder / "chat_template.jinja"
    if template.is_file():
        text = template.read_text()
        if has_processor:
            write(folder / "chat_template.json", {"chat_template": text})
        else:
            about["chat_template"] = text
        template.unlink()
    write(folder / "tokenizer_config.json", about)


def sharded(folder: Path) -> None:
    """Weights in three files with an index."""
    tensors, index = load_file(folder / "model.safetensors"), {}
    names = sorted(tensors)
    for number in range(3):
        part = names[number::3]
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    (folder / "model.safetensors").unlink()
