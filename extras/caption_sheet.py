"""Photos with what a model says of them, and where it looked for some of its words.

    python -m extras.caption_sheet RUN --images a.jpg b.jpg --words dog man ball --beams 3 --out captions.png

Each photo stands beside its caption; for each of its words that --words names, or that is none of COMMON, stands the photo once
more, as lit as it was attended to (extras/attention_maps.py). Prints the captions, a line each.
"""

import argparse
from pathlib import Path

from data.images import decode_image
from data.spellings import DESCRIBE
from extras.attention_maps import attention_over_image_tokens, group_into_words
from lib.checkpoint import load_vlm
from lib.cli import Parser, png_file, positive_int, run_cli
from lib.conversation import Conversation
from lib.devices import find_device
from lib.figures import caption_sheet
from lib.files import check_output, naming

COMMON = frozenset(
    "a an the and or but as at by for from in into of off on onto out over to up with while is are be being it its he she his "
    "her their they one two three four some several many other another there that this who which".split()
)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a vision-language model")
    add("--images", metavar="FILE", nargs="+", required=True, help="photos, in this order")
    add("--prompt", default=DESCRIBE, help="what is asked")
    add("--words", metavar="WORD", nargs="+", help="to look up in the image; default: all but the commonest")
    add("--most-words", type=positive_int, default=3, help="of a caption")
    add("--beams", type=positive_int, default=1, help="search for the likeliest caption with so many beams; 1: greedy")
    add("--max-new-tokens", type=positive_int, default=40)
    add("--device", help="cpu, cuda, mps; default: the best there is")
    add("--out", type=png_file, metavar="FILE.png", default="captions.png")
    return parser.parse_args(argv)


def bare(word: str) -> str:
    return word.strip(".,;:!?\"'").lower()


def caption(model, processor, image: str, args) -> tuple:
    """(the image as the model sees it, uint8 [3, h, w]; its caption; the words that are looked up; where, [words, gh, gw])."""
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": 0, "beams": args.beams}
    talk = Conversation(model, processor.tokenizer, processor, **settings)
    talk.show(image)
    text = "".join(talk.ask(args.prompt)).strip()
    if not talk.answer_ids:
        return talk.images[0], text, [], None
    maps = attention_over_image_tokens(model, talk.answer_ids, [talk.prompt_ids], image_features=talk.features)
    words, maps = group_into_words(talk.answer_ids, maps[:, -1], processor.decode)  # of tiles the last is the whole image
    wanted = {bare(word) for word in args.words} if args.words else None
    places = {}  # a word that comes again is looked up once
    for k, word in enumerate(map(bare, words)):
        if word and (word in wanted if wanted else word not in COMMON):
            places.setdefault(word, k)
    places = dict(list(places.items())[: args.most_words])
    return talk.images[0], text, list(places), maps[list(places.values())]


def main(argv=None) -> None:
    args = parse_args(argv)
    check_output("--out", args.out, args.images)
    for image in args.images:  # before the first caption, which takes its time
        with naming("--images", image):
            decode_image(image)
    model, processor = load_vlm(args.run, find_device(args.device))
    found = [caption(model, processor, image, args) for image in args.images]
    for image, (_, text, *_) in zip(args.images, found, strict=True):
        print(f"{image}: {text}")
    images, texts, words, maps = zip(*found, strict=True)
    caption_sheet(images, texts, words, maps, args.out)
    print(args.out)


if __name__ == "__main__":
    run_cli(main)
