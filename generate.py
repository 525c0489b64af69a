"""Talk to a checkpoint: continue a text, see the likeliest next tokens, or chat.

    python generate.py SOURCE "The dog jumped over the"            continue a text, token by token as they come
    python generate.py SOURCE "The dog jumped over the" --top 5    the five likeliest next tokens after each of its prefixes
    python generate.py SOURCE --chat "Why is the sky blue?"        one question, put in the model's own chat template
    python generate.py SOURCE                                      a conversation; an empty line ends it

SOURCE: a run folder, a Hugging Face folder, a .gguf file, or a hub name. Without --temperature the likeliest token is taken.
"""

import argparse
import sys
import time

import torch

from checkpoint import from_pretrained
from model import Llama3ForCausalLM, arrange_for_decoding
from tokenizer import BPETokenizer
from training import find_device, not_negative_float, positive_float, positive_int, run_cli

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the checkpoint")
    add("prompt", nargs="?", help="the text to continue, or the question with --chat")
    add("--chat", action="store_true", help="PROMPT is a question to answer, not a text to continue")
    add("--system", help="what a chat begins with; default: the template's own, if it has one")
    add("--top", type=positive_int, metavar="K", help="show the K likeliest tokens after each prefix of PROMPT")
    add("--max-new-tokens", type=positive_int, default=100)
    add("--temperature", type=not_negative_float, default=0.0, help="0: always the likeliest token (the default)")
    add("--top-k", type=positive_int)
    add("--top-p", type=positive_float)
    add("--min-p", type=not_negative_float)
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, mps; default: the best there is")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    args = parser.parse_intermixed_args(argv)  # so that PROMPT may stand after the flags
    if args.prompt is None and (args.top or args.chat):
        parser.error("--top and --chat need a PROMPT")
    return args


def load(args) -> tuple[torch.nn.Module, BPETokenizer]:
    """The model and its tokenizer, which must belong together."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    model = from_pretrained(args.source, dtype=dtype, device=find_device(args.device))
    if not hasattr(model, "stream"):
        raise ValueError(f"{args.source} holds a {type(model).__name__}, which does not write text")
    tokenizer = BPETokenizer.from_pretrained(args.source)
    vocabulary = model.config.vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer in {args.source} has {len(tokenizer)} tokens, the model knows {vocabulary}: "
            "they do not belong together"
        )
    if isinstance(model, Llama3ForCausalLM) and next(model.parameters()).device.type == "cpu":
        arrange_for_decoding(model)
    return model, tokenizer


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


def encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: give at least one word")
    return ids


def say(model, tokenizer: BPETokenizer, ids: list[int], args) -> str:
    """Stream the continuation to stdout; returns it."""
    stop = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, END_OF_TURN)} - {None}
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(args.seed)
    sampling = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    room = model.config.context_length - len(ids)
    if room < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, the model's context is {model.config.context_length}: shorten it or start afresh"
        )
    decoder, words, start = tokenizer.stream_decoder(skip_special_tokens=True), [], time.perf_counter()
    count = 0
    steps = model.stream([ids], min(args.max_new_tokens, room), stop_tokens=stop, generator=generator, **sampling)
    for (token,) in steps:
        words.append(decoder.push(token))
        print(words[-1], end="", flush=True)
        count += 1
    words.append(decoder.flush())
    print(words[-1], flush=True)
    if sys.stderr.isatty():
        print(f"[{count} tokens, {count / (time.perf_counter() - start):.1f} a second]", file=sys.stderr)
    return "".join(words)


def chat(model, tokenizer: BPETokenizer, args) -> None:
    """Read a line, answer it, remember both."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if sys.stdin.isatty():
        print("An empty line ends the conversation.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = say(model, tokenizer, tokenizer.encode_chat(messages, add_generation_prompt=True), args)
        messages.append({"role": "assistant", "content": answer})


def main(argv=None) -> None:
    args = parse_args(argv)
    model, tokenizer = load(args)
    if args.top:
        print_table(next_token_table(model, tokenizer, args.prompt, args.top))
    elif args.prompt is None:
        chat(model, tokenizer, args)
    elif args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": args.prompt})
        say(model, tokenizer, tokenizer.encode_chat(messages, add_generation_prompt=True), args)
    else:
        print(args.prompt, end="", flush=True)
        say(model, tokenizer, encode(tokenizer, args.prompt), args)


if __name__ == "__main__":
    run_cli(main)
