"""What a vision-language model attends to while it answers: how much each generated token attends to each part of an image.

The model reads prompt and answer once more, and lib/trace.py records its attention weights. The position that
produced a token, the one before it, has a row of weights over all that stands before it; those of the image tokens are laid
back on the image's grid. Heads are averaged, and then layers, in one of two ways:

    mean      over all layers: the share of the attention, 0 to 1, that goes straight to each image token
    rollout   attention rollout (Abnar and Zuidema 2020): how much of each token has arrived there by way of all layers, each
              taken as half attention, half residual stream

The mean is the default since it tells more: in a model of four layers, taught on the CPU to name the colour and shape in one
of four corners, the hottest image token for the colour lay in the corner asked about in 100 of 100 images; by rollout in
37, where 25 is chance: the broad attention of the lower layers outweighs the narrow one of the later layers.

In a model with cross-attention the weights are those of the cross-attention layers, whose rows sum to 1 over the images.

    maps = attention_over_image_tokens(model, answer_ids, **processor(["What is this? <image>"], ["photo.jpg"]))
    words, maps = group_into_words(answer_ids, maps, tokenizer.decode)
    figures.attention_overlay([image], words, maps, "attention.png")

Attention is where information may come from, not why an answer was given (Jain and Wallace 2019).
Axes: A answer tokens, S all tokens, I images, h and w the image's grid of image tokens (after pixel shuffle), or 1 and their
number for a projector whose tokens are no places in the image.
"""

from collections.abc import Callable, Sequence

import torch

from extras.cross_attention import CrossAttentionVLM
from gpt import GPT
from lib.trace import record
from model import MllamaForConditionalGeneration

METHODS = ("mean", "rollout")


@torch.no_grad()
def attention_over_image_tokens(
    model: MllamaForConditionalGeneration,
    answer_ids: Sequence[int],
    input_ids,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_features: torch.Tensor | None = None,
    method: str = "mean",
    image_token_id: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention of each answer token to each part of each image, [A, I, h, w], on the CPU.

    input_ids [1, T]: the prompt, without padding; pixel_values [I, 3, height, width] or image_features [I, N', D]: its images;
    image_token_id: unless the config has it; method: see above. Raises ValueError for more than one row, no image, no answer,
    or a model in training mode.
    """
    device = next(model.parameters()).device
    prompt, answer = torch.as_tensor(input_ids), torch.as_tensor(answer_ids, dtype=torch.long)
    if prompt.ndim != 2 or len(prompt) != 1 or (attention_mask is not None and not attention_mask.all()):
        raise ValueError(f"input_ids is {list(prompt.shape)}: it must be one row [1, T] without padding")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be {' or '.join(METHODS)}")
    if answer.ndim != 1 or not len(answer):
        raise ValueError(f"answer_ids is {list(answer.shape)}: it must be a list of at least one token")
    if model.training:
        raise ValueError("the model is in training mode, where dropout blurs attention: call model.eval() first")
    if image_features is None and pixel_values is None:
        raise ValueError("there is no image to attend to: give pixel_values or image_features")
    if image_features is None:
        image_features = model.image_features(pixel_values.to(device))
    I, N = image_features.shape[:2]
    grid = tuple(side // model.config.pixel_shuffle for side in model.vision_tower.grid)
    if N != grid[0] * grid[1]:  # a projector whose tokens are no places: a strip of them
        grid = 1, N

    # The last token of the answer asks nothing any more: what it would produce is not there.
    ids = torch.cat([prompt, answer[None, :-1]], dim=1).to(device)
    cross, first = isinstance(model, CrossAttentionVLM), prompt.shape[1] - 1
    rollout = method == "rollout" and not cross  # images enter beside the text's own layers there: one step, no path
    blocks, between = "model.layers.*.self_attn.weights", "model.cross_layers.*.weights"
    if isinstance(model.language_model, GPT):
        blocks, between = "blocks.*.attn.weights", "cross_layers.*.weights"
    names = f"language_model.{between if cross else blocks}"
    begin = 0 if rollout else first  # all layers in full would be gigabytes for a long text
    with record(model, names, reduce=lambda weights: weights[0].float().mean(dim=0)[begin:]) as seen:
        model(ids, image_features=image_features.to(device), logits_to_keep=1, image_token_id=image_token_id)
    layers = list(seen.values())
    rows = roll_out(layers)[first:] if rollout else torch.stack(layers).mean(dim=0)  # [A, S], or [A, I * N] under cross
    if not cross:
        rows = rows[:, model.find_placeholders(image_features, ids, image_token_id=image_token_id)[0]]
    return rows.reshape(len(answer), I, *grid).cpu()


def roll_out(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention rollout of layers [S, S], lowest first: the product of (A + 1) / 2, whose rows sum to 1 as theirs do."""
    result = torch.eye(len(layers[0]), device=layers[0].device)
    for weights in layers:
        result = (weights @ result + result) / 2
    return result


def group_into_words(
    token_ids: Sequence[int], maps: torch.Tensor, decode: Callable[[list[int]], str]
) -> tuple[list[str], torch.Tensor]:
    """Tokens as words, parted where there is a space; a word's map is the mean of its tokens'. maps [A, I, h, w] -> the words
    and [words, I, h, w]. decode: ids to text; special tokens it leaves out go with the word before."""
    groups: list[list[int]] = []  # of places in the answer
    text = ""
    for place, token in enumerate(token_ids):
        piece = decode([int(token)])
        if not groups or (text.strip() and piece and (piece[0].isspace() or text[-1].isspace())):
            groups.append([])
            text = ""
        groups[-1].append(place)
        text += piece
    if len(groups) > 1 and not text.strip():  # a line break at the end
        groups[-2:] = [groups[-2] + groups[-1]]
    words = [decode([int(token_ids[place]) for place in group]).strip() for group in groups]
    return words, torch.stack([maps[group].mean(dim=0) for group in groups])
