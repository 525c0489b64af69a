"""Talk to a checkpoint: continue a text, see the likeliest next tokens, chat, ask about pictures.

    python generate.py SOURCE "The dog jumped over the"            continue a text, token by token as they come
    python generate.py SOURCE "The dog jumped over the" --top 5    the five likeliest next tokens after each of its prefixes
    python generate.py SOURCE --chat "Why is the sky blue?"        one question, put in the model's own chat template
    python generate.py SOURCE                                      a conversation; an empty line ends it
    python generate.py SOURCE --image a.png "What is this?" --attention map.png
    python generate.py SOURCE --image a.png --image b.png          a conversation about them; "/image c.png" shows another one
    python generate.py SOURCE --image a.png --zero-shot "a red 3" "a blue 7"     how well captions fit it (SigLIP's two towers)
    python generate.py SOURCE --adapter FOLDER "..."               with another LoRA adapter, PEFT's or ours, than its own
    python generate.py SOURCE --int8 "..."                         the decoder in 8 bits: sooner on a CPU, in less memory

SOURCE: a run folder, a Hugging Face folder, a .gguf file, or a hub name. Without --temperature the likeliest token is taken.
What a vision-language model is asked is always a question, put in its chat template. Pictures stand before the question they
come with, or where it says <image>. --attention draws where the model looked for each word (attention_maps.py). The
probabilities of --zero-shot are each caption's own: they need not add up to one. What a published SigLIP's tokenizer is made
of (SentencePiece) is read by transformers, if that is installed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data.folders import one_line
from extras.attention_maps import group_into_words, where_it_looks
from lib.adapters import put_adapter
from lib.chat import stop_tokens
from lib.checkpoint import from_pretrained
from lib.fast_decode import fast_step
from lib.files import find_source, read_json
from lib.quant import quantize_8bit_
from lib.run import find_device, not_negative_float, not_negative_int, positive_float, positive_int, run_cli
from lib.tokenizer import BPETokenizer
from lib.weights import DTYPES
from model import MllamaForConditionalGeneration
from processing_mllama import IMAGE_TOKEN, LOCATION_TOKENS, MllamaImageProcessor, image_settings, process_images, to_bytes
from siglip import SiglipTwoTower
from vit_scratch import pair


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the checkpoint")
    add("prompt", nargs="?", help="the text to continue, or the question with --chat")
    add("--image", action="append", default=[], metavar="FILE", help="a picture to ask about; may be given several times")
    add(
        "--attention", metavar="FILE.png", help="draw where the model looked in the pictures for each word of its (last) answer"
    )
    add("--zero-shot", nargs="+", metavar="CAPTION", help="how well each of these captions fits each --image")
    add("--adapter", metavar="FOLDER", help="LoRA to use in place of the run's own, which is in its folder lora/")
    add("--chat", action="store_true", help="PROMPT is a question to answer, not a text to continue")
    add("--system", help="what a chat begins with; default: the template's own, if it has one")
    add("--top", type=positive_int, metavar="K", help="show the K likeliest tokens after each prefix of PROMPT")
    add("--max-new-tokens", type=positive_int, default=100)
    add("--temperature", type=not_negative_float, default=0.0, help="0: always the likeliest token (the default)")
    add("--top-k", type=positive_int)
    add("--top-p", type=positive_float)
    add("--min-p", type=not_negative_float)
    add("--seed", type=not_negative_int, default=0)
    add("--device", help="cpu, cuda, mps; default: the best there is")
    add("--dtype", choices=DTYPES, default="fp32")
    add(
        "--int8",
        action="store_true",
        help="the decoder's matrices in 8 bits: less memory, faster on a CPU, not exactly the published logits",
    )
    args = parser.parse_intermixed_args(argv)  # so that PROMPT may stand after the flags
    about_text = args.prompt or args.chat or args.top or args.attention or args.adapter or args.int8
    if args.zero_shot and (not args.image or about_text):
        parser.error("--zero-shot compares captions with pictures: give an --image, and only --device and --dtype beside it")
    if args.prompt is None and (args.top or args.chat):
        parser.error("--top and --chat need a PROMPT")
    if args.top and (args.image or args.attention):
        parser.error("--top is about texts: leave out --image and --attention")
    if args.attention and args.prompt is not None and not args.image:
        parser.error("--attention shows where a picture was looked at: give an --image")
    return args


def load_model(args) -> torch.nn.Module:
    return from_pretrained(args.source, dtype=DTYPES[args.dtype], device=find_device(args.device))


def check_vocabulary(source: str, needed: int, known: int) -> None:
    if needed > known:
        raise ValueError(f"the tokenizer in {source} has {needed} tokens, the model knows {known}: they do not belong together")


def load(args) -> tuple[torch.nn.Module, BPETokenizer]:
    """The model and its tokenizer, which must belong together."""
    if args.int8 and (device := find_device(args.device)).type != "cpu":
        raise ValueError(f"--int8 is for decoding on a CPU, not on {device}: leave it out, or give --device cpu")
    model = load_model(args)
    if not hasattr(model, "stream"):
        hint = ": ask how well captions fit a picture, with --zero-shot" if isinstance(model, SiglipTwoTower) else ""
        raise ValueError(f"{args.source} holds a {type(model).__name__}, which does not write text{hint}")
    if args.adapter:
        print(f"[{args.adapter}: {put_adapter(model, args.source, args.adapter)}]", file=sys.stderr)
    tokenizer = BPETokenizer.from_pretrained(args.source)
    decoder = model.language_model if isinstance(model, MllamaForConditionalGeneration) else model
    if decoder is model and (args.image or args.attention):
        raise ValueError(
            f"{args.source} holds a {type(model).__name__}, which sees no pictures: leave out --image, --attention"
        )
    needed, without_row = len(tokenizer), ()
    if decoder is not model:  # pictures overwrite <image>; location tokens matter only to a model that was made to say them
        without_row = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, *LOCATION_TOKENS])
    while needed - 1 in without_row:
        needed -= 1
    check_vocabulary(args.source, needed, decoder.config.vocab_size)
    if args.int8:
        quantize_8bit_(model)
    return model, tokenizer


def load_processor(source: str, model: MllamaForConditionalGeneration, tokenizer: BPETokenizer) -> MllamaImageProcessor:
    """What makes pictures and questions the model's input. Raises ValueError where the folder's files contradict each other."""
    processor = MllamaImageProcessor.from_pretrained(find_source(source), tokenizer, add_location_tokens=False)
    config = model.config
    if config.image_token_id is None:
        model.config = config = replace(config, image_token_id=processor.image_token_id)
    for what, has, wants in (
        ("pictures of (height, width)", processor.image_size, pair(config.vision_config.image_size)),
        ("image tokens a picture", processor.num_image_token, config.text_config.num_image_tokens),
        (f"the token id of {IMAGE_TOKEN}", processor.image_token_id, config.image_token_id),
    ):
        if has != wants:
            raise ValueError(f"{source} contradicts itself: {what}: {has} for its processor, {wants} for its model")
    return processor


@torch.no_grad()
def next_token_table(model, tokenizer: BPETokenizer, text: str, k: int) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each prefix of the text, token by token: its last token and the k likeliest next ones with their probabilities."""
    ids = encode(tokenizer, text)
    device = next(model.parameters()).device
    logits = model(torch.tensor([ids], device=device))["logits"][0].float()
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


# ---- captions ----


def caption_tokenizer(source: str):
    """The tokenizer of a two-tower checkpoint: ours where it is byte-level BPE, else transformers', if that is installed.
    Raises ValueError where neither can read it."""
    path = find_source(source)
    try:
        return BPETokenizer.from_pretrained(path)
    except (ValueError, FileNotFoundError) as error:
        ours = one_line(error)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(f"{ours}; `pip install transformers` reads other kinds") from None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # its errors are of many types, an ImportError for want of sentencepiece among them
        raise ValueError(f"{ours}; nor can transformers read it ({one_line(error)})") from None


def caption_ids(tokenizer, captions: list[str], config) -> torch.Tensor:
    """[captions, T], cut off or filled with padding to the T tokens that a text tower of this SiglipTextConfig reads: the
    published ones were trained so, and ours are. transformers' pipeline for zero-shot classification does the same."""
    length = {"max_length": config.max_position_embeddings, "truncation": True}
    return tokenizer(captions, padding="max_length", return_tensors="pt", **length)["input_ids"]


@torch.no_grad()
def fit(args) -> list[list[float]]:
    """For each --image the probability of each caption, by SigLIP's sigmoid, so that each is judged for itself. Raises
    ValueError for a checkpoint without two towers, and where its files contradict each other."""
    model = load_model(args)
    if not isinstance(model, SiglipTwoTower):
        raise ValueError(f"{args.source} holds a {type(model).__name__}: --zero-shot compares with SigLIP's two towers")
    tokenizer, config = caption_tokenizer(args.source), model.config
    check_vocabulary(args.source, len(tokenizer), config.text_config.vocab_size)
    file, size = find_source(args.source) / "preprocessor_config.json", pair(config.vision_config.image_size)
    about = image_settings(read_json(file)) if file.exists() else {"image_size": size}
    if pair(about["image_size"]) != size:
        sizes = f"{about['image_size']} for its processor, {size} for its model"
        raise ValueError(f"{args.source} contradicts itself: pictures of (height, width): {sizes}")
    names = {"image_mean": "mean", "image_std": "std", "resample": "resample", "do_pad_square": "do_pad_square"}
    pixels = process_images(args.image, size, **{names[key]: value for key, value in about.items() if key in names})
    device = next(model.parameters()).device
    logits = model.logits(pixels.to(device), caption_ids(tokenizer, args.zero_shot, config.text_config).to(device))
    return logits.float().sigmoid().tolist()


def print_fit(args) -> None:
    """A block for each picture, its likeliest caption first."""
    for file, row in zip(args.image, fit(args), strict=True):
        print(file)
        for p, caption in sorted(zip(row, args.zero_shot, strict=True), key=lambda found: -found[0]):
            print(f"{100 * p:11.4g} %  {caption}")


# ---- words ----


def encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: give at least one word")
    return ids


def speak(
    model, tokenizer: BPETokenizer, ids: list[int], args, image_features=None, shown=None, blank=""
) -> Iterator[tuple[str, int | None]]:
    """The continuation as it comes: (text, token), and last (what text is left, None). shown: special tokens that are part
    of the text, by id; blank: what is taken from its beginning. Raises ValueError where the model's context has no room."""
    stop = stop_tokens(tokenizer)
    options = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    options["generator"] = torch.Generator(device=next(model.parameters()).device).manual_seed(args.seed)
    if image_features is not None:
        options["image_features"] = image_features
    limit = getattr(model.config, "text_config", model.config).context_length
    room = limit - len(ids)
    if room < 1:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context is {limit}: shorten it or start afresh")
    decoder = tokenizer.stream_decoder(skip_special_tokens=True)
    options["step"] = fast_step(getattr(model, "language_model", model))
    for (token,) in model.stream([ids], max_new_tokens=min(args.max_new_tokens, room), stop_tokens=stop, **options):
        word = (shown or {}).get(token) or decoder.push(token)
        yield word.removeprefix(blank), token
        blank = "" if word else blank
    yield decoder.flush(), None


def say(*args, **kwargs) -> tuple[str, list[int]]:
    """Stream what speak says to stdout; returns its text and ids."""
    words, answer, start = [], [], time.perf_counter()
    for word, token in speak(*args, **kwargs):
        words.append(word)
        answer += [] if token is None else [token]
        print(word, end="" if token is not None else "\n", flush=True)
    if sys.stderr.isatty():
        print(f"[{len(answer)} tokens, {len(answer) / (time.perf_counter() - start):.1f} a second]", file=sys.stderr)
    return "".join(words), answer


class Conversation:
    """What was said and shown so far. A picture goes through the vision tower once, when it is shown, and never again."""

    def __init__(self, model, tokenizer: BPETokenizer, processor: MllamaImageProcessor | None, args):
        self.model, self.tokenizer, self.processor, self.args = model, tokenizer, processor, args
        self.messages = [{"role": "system", "content": args.system}] if args.system else []
        self.pictures: list[torch.Tensor] = []  # as the model sees them, uint8 [3, height, width]
        self.features: torch.Tensor | None = None  # of all of them, [I, N', D]
        self.unasked = 0  # how many the next question is the first to be about

    @torch.no_grad()
    def show(self, file: str) -> None:
        """A picture for the next question. Raises ValueError or OSError where it cannot be read."""
        pixels = self.processor([IMAGE_TOKEN], [file])["pixel_values"]
        features = self.model.image_features(pixels.to(next(self.model.parameters()).device))
        self.features = features if self.features is None else torch.cat([self.features, features])
        self.pictures.append(to_bytes(pixels[0], self.processor.image_mean, self.processor.image_std))
        self.unasked += 1

    def answer(self, question: str) -> None:
        """Say the answer, and remember both."""
        before = "" if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * self.unasked  # as LLaVA's data and ours have it
        self.messages.append({"role": "user", "content": before + question})
        ids = self._ids()
        self.unasked, shown = 0, self.processor and self.processor.locations
        blank = self.tokenizer.answer_prefix
        text, answer = say(self.model, self.tokenizer, ids, self.args, self.features, shown, blank)
        self.messages.append({"role": "assistant", "content": text.replace(IMAGE_TOKEN, "")})  # no answer shows a picture
        if self.args.attention and self.pictures:
            self._draw(question, ids, answer)

    def _ids(self) -> list[int]:
        if self.processor is None:
            return self.tokenizer.encode_chat(self.messages, add_generation_prompt=True)
        return self.processor.encode(self.messages, len(self.pictures), add_generation_prompt=True)[0]

    def _draw(self, question: str, ids: list[int], answer: list[int]) -> None:
        if not answer:
            print("the answer is empty: no attention to draw", file=sys.stderr)
            return
        from lib.figures import attention_overlay  # matplotlib takes longer to import than a small model to answer

        maps = where_it_looks(self.model, answer, [ids], image_features=self.features)
        words, maps = group_into_words(answer, maps, self.processor.decode)
        attention_overlay(self.pictures, words, maps, self.args.attention, title=question.replace(IMAGE_TOKEN, "").strip())


def chat(conversation: Conversation) -> None:
    """Read a line, answer it; "/image FILE" shows a picture for the next one."""
    if sys.stdin.isatty():
        print("An empty line ends the conversation." + (" /image FILE shows a picture." if conversation.processor else ""))
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        command, _, file = line.partition(" ")
        if command != "/image" or conversation.processor is None:
            conversation.answer(line)
            continue
        try:
            conversation.show(file.strip())
        except (ValueError, OSError) as error:  # a slip of the pen does not end a conversation
            print(f"error: {error}", file=sys.stderr)


def check_writable(path: str) -> None:
    """Raise an OSError now, not after the answer, for a file that cannot be written."""
    target = Path(path)
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise OSError(f"--attention {path} cannot be written: give a file in a folder that is there and may be written to")


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.attention:
        check_writable(args.attention)
    if args.zero_shot:
        print_fit(args)
        return
    model, tokenizer = load(args)
    sees = isinstance(model, MllamaForConditionalGeneration)
    if args.top:
        print_table(next_token_table(model, tokenizer, args.prompt, args.top))
    elif args.prompt is not None and not (args.chat or sees):
        print(args.prompt, end="", flush=True)
        say(model, tokenizer, encode(tokenizer, args.prompt), args)
    else:
        conversation = Conversation(model, tokenizer, load_processor(args.source, model, tokenizer) if sees else None, args)
        for file in args.image:
            conversation.show(file)
        if args.prompt is None:
            chat(conversation)
        else:
            conversation.answer(args.prompt)


if __name__ == "__main__":
    run_cli(main)
