"""Which tokens a model has rows for, and room for new ones in a trained model."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn as nn

from gpt import GPT, Decoder
from model import MllamaForConditionalGeneration


def check_rows(tokenizer, ids: Iterable[int], vocab_size: int, image_token_id: int | None = None) -> None:
    """Raises ValueError for an id that has no row in an embedding table of vocab_size. A tokenizer may have more tokens than
    its model has rows, as long as nobody says them; images overwrite image_token_id."""
    beyond = next((i for i in ids if i >= vocab_size and i != image_token_id), None)
    if beyond is not None:
        raise ValueError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(beyond)!r} with id {beyond}, the model has rows for "
            f"{vocab_size} tokens: leave it out, or give the tokenizer that belongs to the model"
        )


@torch.no_grad()
def resize_token_embeddings(model: Decoder | MllamaForConditionalGeneration, num_tokens: int) -> None:
    """Make room for a vocabulary of num_tokens, in place. New rows of embedding and head start as the mean of the old ones: a
    new word is an average one. Raises ValueError for fewer tokens than there are. Make optimisers afterwards."""
    decoder = model.language_model if isinstance(model, MllamaForConditionalGeneration) else model
    old = decoder.config.vocab_size
    if num_tokens < old:
        raise ValueError(f"the vocabulary has {old} tokens: {num_tokens} would cut off {old - num_tokens} of them")
    embedding = decoder.token_embedding if isinstance(decoder, GPT) else decoder.model.embed_tokens
    for part in (embedding, decoder.lm_head):
        weight = part.weight
        grown = torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(num_tokens - old, -1)])
        part.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
    embedding.num_embeddings = decoder.lm_head.out_features = num_tokens
    decoder.config = replace(decoder.config, vocab_size=num_tokens)
    if not isinstance(decoder, GPT):
        decoder.model.config = decoder.config
    if decoder is not model:
        model.config = replace(model.config, text_config=decoder.config)
    decoder.tie_weights()


def caption_ids(tokenizer, captions: list[str], config) -> torch.Tensor:
    """[captions, T], cut off or filled with padding to the T tokens that a text tower of this SiglipTextConfig reads, as the
    published ones were trained."""
    length = {"max_length": config.max_position_embeddings, "truncation": True}
    return tokenizer(captions, padding="max_length", return_tensors="pt", **length)["input_ids"]
