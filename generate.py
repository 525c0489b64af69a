"""Talk to a checkpoint: continue a text, see the likeliest next tokens, chat, ask about images.

    python generate.py SOURCE "The dog jumped over the"            continue a text, token by token as they come
    python generate.py SOURCE "The dog jumped over the" --top 5    the five likeliest next tokens after each of its prefixes
    python generate.py SOURCE --chat "Why is the sky blue?"        one question, put in the model's own chat template
    python generate.py SOURCE                                      a conversation; an empty line ends it
    python generate.py SOURCE --image a.png "What is this?" --attention map.png
    python generate.py SOURCE --image a.png b.png                  a conversation about them; "/image c.png" shows another one
    python generate.py SOURCE --image a.png --zero-shot "a red 3" "a blue 7"     how well captions fit it (SigLIP's two towers)
    python generate.py SOURCE --image a.png b.png                  of a classifier: the five likeliest classes of each
    python generate.py SOURCE --adapter FOLDER "..."               with another LoRA adapter, PEFT's or ours, than its own
    python generate.py SOURCE --image a.png "What is this?" --beams 3            the likeliest answer that a beam search finds
    python generate.py SOURCE --int8 "..."                         the decoder in 8 bits: faster on a CPU, in less memory

SOURCE: a run folder, a Hugging Face folder, a .gguf file, or a hub name. Without --temperature the likeliest token is taken.
What a vision-language model is asked is always a question, put in its chat template. Images stand before the question they
come with, or where it says <image>. --attention draws what the model attended to for each word (extras/attention_maps.py). The
probabilities of --zero-shot are each caption's own: they need not add up to one. A tokenizer that is not
byte-level BPE, such as a published SigLIP's, is read by the library tokenizers, if that is installed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import torch

from data.image_settings import ImageSettings
from data.tiles import global_tiles
from extras.llmvit import LLMVIT
from lib.checkpoint import from_pretrained, load_processor
from lib.cli import Parser, not_negative_float, not_negative_int, number, png_file, positive_float, positive_int, run_cli
from lib.conversation import Conversation, stream_text
from lib.devices import DTYPES, find_device
from lib.fast_decode import fast_step
from lib.files import check_output, find_source, naming, words_of
from lib.generation import say_unlike
from lib.image_settings import read_image_settings
from lib.tokenizer import BPETokenizer, load_tokenizer
from lib.vocabulary import caption_ids, check_rows
from model import MllamaForConditionalGeneration
from processing_mllama import IMAGE_TOKEN, MllamaImageProcessor, process_images
from siglip import SiglipTwoTower
from vit_scratch import ViTModel, pair

# ---- settings ----------------------------------------------------------------------------------------------------------

ABOUT_IMAGES = ("--image", "--device", "--dtype")  # the flags that make sense without a text
ABOUT_TOKENS = ("--top", "--adapter", "--device", "--dtype", "--int8")
SAMPLING = ("--temperature", "--top-k", "--top-p", "--min-p")
temperature = number(float, lambda v: v == 0 or 1e-3 <= v <= 1e6, "0, for the likeliest token, or from 0.001 to a million")
exponent = number(float, lambda v: -10 <= v <= 10, "a number from -10 to 10")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the checkpoint")
    add("prompt", nargs="?", type=str, help="the text to continue, or the question with --chat")
    add("--image", action="append", default=[], metavar="FILE", help="an image to ask about, or several: --image a.png b.png")
    add("--attention", type=png_file, metavar="FILE.png", help="draw what it attended to in the images for each "
        "word of its last answer")  # fmt: skip
    add("--zero-shot", nargs="+", metavar="CAPTION", help="how well each of these captions fits each --image")
    add("--split-images", action=argparse.BooleanOptionalAction, help="cut images into tiles, as Idefics3 and SmolVLM do, or "
        "take them whole; default: as the checkpoint says")  # fmt: skip
    add("--adapter", metavar="FOLDER", help="LoRA to use in place of the run's own, which is in its folder lora/")
    add("--chat", action="store_true", help="PROMPT is a question to answer, not a text to continue")
    add("--system", type=str, help="what a chat begins with; default: the template's own, if it has one")
    add("--top", type=positive_int, metavar="K", help="show the K likeliest tokens after each prefix of PROMPT")
    add("--max-new-tokens", type=positive_int, help="default: what the folder's generation_config.json says, else 100")
    add("--temperature", type=temperature, default=0.0, help="0: always the likeliest token (the default)")
    add("--top-k", type=positive_int)
    add("--top-p", type=positive_float)
    add("--min-p", type=not_negative_float)
    add("--beams", type=positive_int, default=1, help="follow so many continuations at once, and answer with the likeliest")
    add("--length-penalty", type=exponent, default=1.0, help="of --beams: above 1 longer answers win, below 1 shorter ones")
    add("--seed", type=not_negative_int, default=0)
    add("--device", help="cpu, cuda, mps; default: the best there is")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--int8", action="store_true", help="the decoder's matrices in 8 bits: less memory, faster on a CPU, other logits")
    argv = one_image_a_flag(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_intermixed_args(argv)  # so that PROMPT may stand after the flags
    chosen = {key for key, value in vars(args).items() if value != parser.get_default(key)} - {"source", "prompt"}
    args.given = sorted(f"--{key.replace('_', '-')}" for key in chosen)
    if args.zero_shot and (not args.image or args.prompt or {*args.given} - {"--zero-shot", *ABOUT_IMAGES}):
        parser.error("--zero-shot compares captions with images: give an --image, and only --device and --dtype beside it")
    for file in args.image:
        if not os.path.exists(file):
            parser.error(f"--image: there is no file {file}")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty: leave it out for a chat")
    if args.prompt is None and (args.top or args.chat):
        parser.error("--top and --chat need a PROMPT")
    if args.top and (others := [flag for flag in args.given if flag not in ABOUT_TOKENS]):
        parser.error(f"--top is about the next tokens of a text: leave out {', '.join(others)}")
    sampled = [flag for flag in args.given if flag in SAMPLING]
    if sampled and args.beams == 1 and not args.temperature:
        parser.error(f"{', '.join(sampled)}: without --temperature above 0 the likeliest token is taken, and nothing is drawn")
    if args.beams > 1 and sampled:
        parser.error(f"--beams looks for the likeliest text, which draws nothing: leave out {', '.join(sampled)}")
    for flag, share in (("--top-p", args.top_p), ("--min-p", args.min_p)):
        if share is not None and share > 1:
            parser.error(f"{flag} is {share}: it must be at most 1")
    if args.length_penalty != 1 and args.beams == 1:
        parser.error("--length-penalty is of --beams: it chooses between the texts that these find")
    if args.attention and args.prompt is not None and not args.image:
        parser.error("--attention shows what of an image was attended to: give an --image")
    return args


def one_image_a_flag(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """`--image a.png b.png` as `--image a.png --image b.png`. What stands after an image is one more if it is a file; if it is
    not but is called like one, nobody knows whether it is mistyped or the PROMPT: an error."""
    spread, after = [], False  # after: an image, with nothing else between
    for last, word in pairwise(["", *argv]):
        if last == "--image":
            after = True
        elif after and not word.startswith("-"):
            after = os.path.isfile(word)
            if not after and word.lower().endswith(IMAGE_SUFFIXES):
                parser.error(f"--image: there is no file {word} (if it is the PROMPT, put it before --image)")
            spread += ["--image"] * after
        else:
            after = word.startswith("--image=")
        spread.append(word)
    return spread


def stream_settings(args) -> dict:
    """What stream_text and Conversation take."""
    keys = ("max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "beams", "length_penalty")
    return {key: getattr(args, key) for key in keys}


# ---- model -------------------------------------------------------------------------------------------------------------


def load(args) -> tuple[torch.nn.Module, BPETokenizer, MllamaImageProcessor | None]:
    """The model, its tokenizer, and the processor of a vision-language model. Raises ValueError where files do not belong
    together, or the model is of another kind than the flags say."""
    device = find_device(args.device)
    if args.int8 and device.type != "cpu":
        raise ValueError(f"--int8 is for decoding on a CPU, not on {device}: leave it out, or give --device cpu")
    model = from_pretrained(args.source, DTYPES[args.dtype], device)
    if isinstance(model, LLMVIT) or (isinstance(model, ViTModel) and model.config.num_labels):
        return model, None, None
    if not hasattr(model, "stream"):
        hint = ": ask how well captions fit an image, with --zero-shot" if isinstance(model, SiglipTwoTower) else ""
        raise ValueError(f"{args.source} holds a {type(model).__name__}, which does not write text{hint}")
    if args.adapter:
        from lib.adapters import put_adapter

        with naming("--adapter", args.adapter):
            print(f"[{args.adapter}: {put_adapter(model, args.source, args.adapter)}]", file=sys.stderr)
    if isinstance(model, MllamaForConditionalGeneration):
        processor = load_processor(args.source, model, args.split_images)
        tokenizer = processor.tokenizer
    else:
        if about_images := [flag for flag in args.given if flag in ("--image", "--attention", "--split-images")]:
            name = type(model).__name__
            raise ValueError(f"{args.source} holds a {name}, which reads no images: leave out {', '.join(about_images)}")
        processor, tokenizer = None, load_tokenizer(args.source)
    if not args.temperature:
        say_unlike(model, tokenizer)
    if args.int8:
        from lib.int8 import quantize_8bit_

        quantize_8bit_(model)
    return model, tokenizer, processor


# ---- one text ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: give at least one word")
    return ids


@torch.no_grad()
def next_token_table(model, tokenizer: BPETokenizer, text: str, k: int) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each prefix of the text, token by token: its last token and the k likeliest next ones with their probabilities."""
    ids = encode(tokenizer, text)
    check_rows(tokenizer, ids, model.config.vocab_size)
    logits = model(torch.tensor([ids], device=next(model.parameters()).device))["logits"][0].float()
    top = logits.softmax(dim=-1).topk(min(k, logits.shape[-1]))
    return [
        (tokenizer.decode([token]), [(tokenizer.decode([i]), p) for i, p in zip(row, values, strict=True)])
        for token, row, values in zip(ids, top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def print_table(rows) -> None:
    cells = [[repr(token)[1:-1], *(f"{repr(t)[1:-1]} {p:.1%}" for t, p in choices)] for token, choices in rows]
    header = ["after", *(f"{i + 1}." for i in range(len(cells[0]) - 1))]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, *cells]:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_stream(pieces: Iterator[str]) -> None:
    """Print a text as it comes; on a terminal, its speed afterwards."""
    count, start = -1, time.perf_counter()  # the last piece is what is left after the last token
    for piece in pieces:
        count += 1
        print(piece, end="", flush=True)
    print()
    if sys.stderr.isatty():
        print(f"[{count} tokens, {count / (time.perf_counter() - start):.1f} a second]", file=sys.stderr)


# ---- a conversation ----------------------------------------------------------------------------------------------------


def answer(talk: Conversation, question: str, attention: str | None = None) -> None:
    """Print the answer; attention: the file to draw where the model looked for it."""
    print_stream(talk.ask(question))
    if attention and talk.images and not talk.answer_ids:
        print("the answer is empty: no attention to draw", file=sys.stderr)
    elif attention and talk.images:
        from extras.attention_maps import attention_over_image_tokens, group_into_words
        from lib.figures import attention_overlay

        maps = attention_over_image_tokens(talk.model, talk.answer_ids, [talk.prompt_ids], image_features=talk.features)
        words, maps = group_into_words(talk.answer_ids, maps[:, global_tiles(talk.tilings)], talk.processor.decode)
        attention_overlay(talk.images, words, maps, attention, title=question.replace(IMAGE_TOKEN, "").strip())


def chat(talk: Conversation, attention: str | None = None) -> None:
    """Read a line, answer it; "/image FILE" shows an image for the next one."""
    if sys.stdin.isatty():
        print("An empty line ends the conversation." + (" /image FILE shows an image." if talk.processor else ""))
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        command, _, file = line.partition(" ")
        if command != "/image" or talk.processor is None:
            answer(talk, line, attention)
            continue
        try:
            if attention:
                check_output("--attention", attention, [file.strip()])
            talk.show(file.strip())
        except (ValueError, OSError) as error:  # a mistyped name does not end a conversation
            print(f"error: {words_of(error)}", file=sys.stderr)


def check_image_size(source, made: tuple[int, int], read: tuple[int, int]) -> None:
    """Raise a ValueError unless the images that a folder's processor makes are those that its model reads."""
    if made != read:
        raise ValueError(
            f"{source} contradicts itself: images of (height, width): {made} for its processor, {read} for its model"
        )


# ---- classes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def likeliest_classes(args, model: ViTModel | LLMVIT, k: int = 5) -> list[list[tuple[float, str]]]:
    """For each --image the k likeliest classes, (probability, name), by the names and image settings of the folder."""
    config = model.config
    settings = ImageSettings(**{"image_size": pair(config.image_size), **read_image_settings(find_source(args.source))})
    check_image_size(args.source, settings.image_size, pair(config.image_size))
    pixels = process_images(args.image, settings).to(next(model.parameters()).device)
    if config.num_channels == 1:
        pixels = pixels.mean(dim=1, keepdim=True)  # grey
    logits = model(pixels)["logits"] if isinstance(model, LLMVIT) else model(pixels)
    if not logits.isfinite().all():
        raise ValueError(f"{args.source}: its outputs are not finite: was it trained at too high a --lr?")
    top = logits.float().softmax(dim=-1).topk(min(k, logits.shape[-1]))
    names = config.id2label or {i: f"class {i}" for i in range(logits.shape[-1])}
    rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return [[(p, names[i]) for p, i in zip(*row, strict=True)] for row in rows]


def print_classes(args, model: ViTModel | LLMVIT) -> None:
    """A block for each image, its likeliest class first."""
    if not args.image or args.prompt:
        raise ValueError(f"{args.source} is a classifier: give it images with --image, and no text")
    if others := [flag for flag in args.given if flag not in ABOUT_IMAGES]:
        raise ValueError(f"{args.source} is a classifier: it takes {', '.join(ABOUT_IMAGES)}; leave out {', '.join(others)}")
    for file, row in zip(args.image, likeliest_classes(args, model), strict=True):
        print(file)
        for p, name in row:
            print(f"{100 * p:11.4g} %  {name}")


# ---- captions ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def zero_shot(args) -> list[list[float]]:
    """For each --image the probability of each caption, by SigLIP's sigmoid, so that each is judged for itself. Raises
    ValueError for a checkpoint without two towers, and where its files contradict each other."""
    device = find_device(args.device)
    model = from_pretrained(args.source, DTYPES[args.dtype], device)
    if not isinstance(model, SiglipTwoTower):
        raise ValueError(f"{args.source} holds a {type(model).__name__}: --zero-shot compares with SigLIP's two towers")
    tokenizer, text = load_tokenizer(args.source), model.config.text_config
    if "attention_mask" in tokenizer.model_input_names:
        raise ValueError(
            f"{args.source}: by its tokenizer_config.json the padding of captions is masked, which the text tower here reads: "
            'published SigLIPs have "model_input_names": ["input_ids"] there'
        )
    captions = caption_ids(tokenizer, args.zero_shot, text)
    check_rows(tokenizer, captions.flatten().tolist(), text.vocab_size)
    processor = MllamaImageProcessor.from_pretrained(find_source(args.source), tokenizer, num_image_token=1)
    check_image_size(args.source, processor.image_size, pair(model.config.vision_config.image_size))
    return model.logits(processor.pixel_values(args.image).to(device), captions.to(device)).float().sigmoid().tolist()


def print_zero_shot(args) -> None:
    """A block for each image, its likeliest caption first."""
    for file, row in zip(args.image, zero_shot(args), strict=True):
        print(file)
        for p, caption in sorted(zip(row, args.zero_shot, strict=True), key=lambda found: -found[0]):
            print(f"{100 * p:11.4g} %  {caption}")


# ---- what is asked for -------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.attention:
        check_output("--attention", args.attention, args.image)
    if args.zero_shot:
        print_zero_shot(args)
        return
    model, tokenizer, processor = load(args)
    if tokenizer is None:
        print_classes(args, model)
        return
    if args.top:
        print_table(next_token_table(getattr(model, "language_model", model), tokenizer, args.prompt, args.top))
        return
    # The prompt, images and all, goes through model.py; on a CPU each later token through its weights in lib/fast_decode.py.
    settings = stream_settings(args) | {"step": fast_step(getattr(model, "language_model", model))}
    if args.prompt is not None and not (args.chat or processor):
        if args.system:
            raise ValueError("--system begins a chat, and PROMPT is a text to continue: add --chat")
        print(args.prompt, end="", flush=True)
        pieces = stream_text(model, tokenizer, encode(tokenizer, args.prompt), **settings)
        print_stream(piece for piece, _ in pieces)
        return
    talk = Conversation(model, tokenizer, processor, args.system, **settings)
    for file in args.image:
        talk.show(file)
    if args.prompt is None:
        chat(talk, args.attention)
    else:
        answer(talk, args.prompt, args.attention)


if __name__ == "__main__":
    run_cli(main)
