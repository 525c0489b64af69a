"""A conversation with a language model, word by word as it answers; with images, if it is a vision-language model.

    talk = Conversation(model, tokenizer, processor, max_new_tokens=100)
    talk.show("photo.jpg")
    for piece in talk.ask("What is this?"):
        print(piece, end="", flush=True)
"""

from collections.abc import Iterator, Mapping

import torch

from lib.beam_search import continue_prompts
from lib.chat import answer_prefix, encode_conversation
from lib.generation import LogitRules, most_new_tokens, stop_tokens
from lib.vocabulary import check_rows
from processing_mllama import IMAGE_TOKEN, MllamaImageProcessor, denormalize

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # settings of gpt.sample, which a search does without


def stream_text(
    model, tokenizer, ids: list[int], max_new_tokens: int | None = None, seed: int = 0, shown: Mapping[int, str] | None = None,
    prefix: str = "", beams: int = 1, length_penalty: float = 1.0, **options,
) -> Iterator[tuple[str, int | None]]:  # fmt: skip
    """How the model continues ids, as it comes: (text, token), and last (what text is left, None).

    max_new_tokens: unless given, what the model's folder says. shown: special tokens that are part of the text, by id; prefix:
    is removed from the start of the text; beams: of a search for the likeliest text, which comes when it is found
    (lib/beam_search.py), with its length_penalty; options: of `stream` (temperature, ..., step, image_features). Raises
    ValueError where the model's context has no room, or no row for a token.
    """
    text_config = getattr(model.config, "text_config", model.config)
    check_rows(tokenizer, ids, text_config.vocab_size, getattr(model.config, "image_token_id", None))
    limit = text_config.context_length
    room = limit - len(ids)
    if room < 1:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context is {limit}: shorten it or start afresh")
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    decoder = tokenizer.stream_decoder(skip_special_tokens=True)
    rules, whole = LogitRules.of(model, tokenizer), [*ids]
    options |= {"max_new_tokens": min(most_new_tokens(model, len(ids), max_new_tokens), room)}
    options |= {"stop_tokens": stop_tokens(model, tokenizer)}
    if beams > 1:
        options = {key: value for key, value in options.items() if key not in SAMPLING}
        ((best, *_),) = continue_prompts(model, [ids], beams, length_penalty=length_penalty, rules=rules, **options)
        steps = ([token] for token in best.ids)
    else:
        options |= {"adjust": lambda logits: rules(logits, [whole], [len(ids)])} if rules else {}
        steps = model.stream([ids], generator=generator, **options)
    for (token,) in steps:
        whole.append(token)
        word = (shown or {}).get(token) or decoder.push(token)
        yield word.removeprefix(prefix), token
        prefix = "" if word else prefix
    yield decoder.flush(), None


class Conversation:
    """What was said and shown so far. An image goes through the vision tower once, when it is shown, and never again.

    processor: of a vision-language model, else None; system: what the conversation begins with; settings: of stream_text.
    After an answer prompt_ids and answer_ids are its tokens.
    """

    def __init__(self, model, tokenizer, processor: MllamaImageProcessor | None = None, system: str | None = None, **settings):
        self.model, self.tokenizer, self.processor, self.settings = model, tokenizer, processor, settings
        self.messages = [{"role": "system", "content": system}] if system else []
        self.images: list[torch.Tensor] = []  # as the model sees them whole, uint8 [3, height, width]
        self.tilings: list[tuple[int, int]] = []  # of each, where images are cut into tiles
        self.features: torch.Tensor | None = None  # of all of them, tile by tile, [I, N', D]
        self.new_images = 0  # shown since the last question
        self.prompt_ids: list[int] = []
        self.answer_ids: list[int] = []

    @torch.no_grad()
    def show(self, image) -> None:
        """An image, or the path of one, for the next question. Raises ValueError or OSError where it cannot be read."""
        pixels = self.processor.pixel_values([image])
        weight = next(self.model.parameters())
        features = self.model.image_features(pixels.to(weight.device, weight.dtype))
        self.features = features if self.features is None else torch.cat([self.features, features])
        self.tilings += self.processor.tilings([image])
        self.images.append(denormalize(pixels[-1], self.processor.image_settings))
        self.new_images += 1

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; then the conversation holds both."""
        before = "" if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * self.new_images  # as LLaVA's data and ours have it
        messages = [*self.messages, {"role": "user", "content": before + question}]
        if self.processor is None:
            ids, images = encode_conversation(self.tokenizer, messages, add_generation_prompt=True)[0], {}
        else:
            ids, _ = self.processor.encode(messages, self.tilings, add_generation_prompt=True)
            images = {"image_features": self.features, "shown": self.processor.locations}
        text, answer = "", []
        settings = {**self.settings, **images, "prefix": answer_prefix(self.tokenizer)}
        for piece, token in stream_text(self.model, self.tokenizer, ids, **settings):
            text += piece
            answer += [] if token is None else [token]
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": text.replace(IMAGE_TOKEN, "")}]  # no answer shows an image
        self.prompt_ids, self.answer_ids, self.new_images = ids, answer, 0
