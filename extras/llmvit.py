"""A language model as an image classifier: patches become vectors among its word embeddings, and it reads them like a text.

Mirrors: llmvit (B. J. Bodner, 2024), whose calls it takes. An encoder makes a vector of each patch; an embedder brings the
vectors to, or near, the embeddings of words; the language model's blocks and a classification head do the rest. Read
vit_scratch.py and model.py first. `python -m extras.train_llmvit` trains one, and draws which words the patches became.

    model = LLMVIT(AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=10),
                   EncoderConfig(img_size=28, patch_size=7, in_channels=1), EmbedderConfig("knn", k=4))
    model = LLMVIT(llmvit_backbones.LanguageClassifier(checkpoint.from_pretrained("model.gguf"), num_labels=10))  # or our own
    model(images, labels)                                # {"logits": [B, K], "loss"}; without labels the logits alone
    model.words(images, tokenizer)["words"]              # for each image, row and column of the grid: the nearest words

Axes: B batch, N patches, D width of the language model, V words, M vectors (all patches of a batch), K classes.
"""

import copy
import math
import re
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import Output
from vit_scratch import ViTConfig, ViTModel, pair, sincos_positions

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class EncoderConfig:
    type: str = "vit"  # or "patch_embed": a single linear layer for each patch
    img_size: int | tuple[int, int] = 28  # pixels: one number for a square, or (height, width)
    patch_size: int | tuple[int, int] = 7
    in_channels: int = 3
    hidden_dim: int = 256  # width inside the ViT
    embed_dim: int | None = None  # the language model's width, which LLMVIT fills in
    num_encoder_layers: int = 2  # of the ViT
    dropout: float = 0.0
    nhead: int = 8
    id2label: dict | None = None  # {number: name} of what the whole model tells apart

    def __post_init__(self):
        if self.type not in ENCODERS:
            raise ValueError(f"the encoder's type is {self.type!r}: it must be {' or '.join(ENCODERS)}")
        for name, value in (("img_size", self.img_size), ("patch_size", self.patch_size), ("in_channels", self.in_channels)):
            if min(pair(value)) < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")

    @property
    def image_size(self) -> int | tuple[int, int]:  # by the names of ViTConfig
        return self.img_size

    @property
    def num_channels(self) -> int:
        return self.in_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; the last ones may reach over the image's edge."""
        return tuple(-(-side // patch) for side, patch in zip(pair(self.img_size), pair(self.patch_size), strict=True))

    @property
    def padding(self) -> tuple[int, int]:
        """Rows at the bottom and columns at the right that are added, as zeros, so that the patches cover the image."""
        sides = zip(self.grid, pair(self.patch_size), pair(self.img_size), strict=True)
        return tuple(count * patch - side for count, patch, side in sides)


@dataclass
class EmbedderConfig:
    type: str = "knn"  # or "max", "direct"
    k: int = 4  # knn: how many words are mixed
    temperature: float = 0.1  # knn: in the unit of the words' distances; the lower, the more the nearest word counts
    similarity_metric: str = "cosine_similarity"  # max: or "cdist", the distance

    def __post_init__(self):
        known = (("type", EMBEDDERS), ("similarity_metric", METRICS))
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise ValueError(f"the embedder's {name} is {getattr(self, name)!r}: it must be {' or '.join(choices)}")
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(f"k is {self.k}, temperature {self.temperature}: k starts at 1, the temperature above 0")


# ---- encoders: images to vectors -----------------------------------------------------------------------------------


class PatchEncoder(nn.Module):
    """One linear layer, the same for each patch, and a place for each: [B, C, H, W] -> [B, N, D]."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, D = config, config.embed_dim
        self.build()
        self.norm = nn.LayerNorm(D)
        if any(config.padding):
            (H, W), (rows, columns) = pair(config.img_size), config.padding
            warnings.warn(
                f"patches of {config.patch_size} do not divide a {H}x{W} image: {rows} rows below and {columns} columns at "
                "the right are added as zeros",
                stacklevel=3,
            )

    def build(self) -> None:
        config, D = self.config, self.config.embed_dim
        self.projection = nn.Conv2d(config.in_channels, D, pair(config.patch_size), pair(config.patch_size))
        places = sincos_positions(config.grid, D) if D % 4 == 0 else 0.02 * torch.randn(math.prod(config.grid), D)
        self.position_embedding = nn.Parameter(places[None])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.projection(images).flatten(2).transpose(1, 2) + self.position_embedding

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for images of another shape than the configured one."""
        expected = (self.config.in_channels, *pair(self.config.img_size))
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images is {list(images.shape)}: it must be [batch, {', '.join(map(str, expected))}]")
        rows, columns = self.config.padding
        return self.norm(self.encode(F.pad(images, (0, columns, 0, rows))))


class ViTEncoder(PatchEncoder):
    """The blocks of vit_scratch.py: patches see each other before the language model sees them. What classifies an image
    there is asked at each patch here, and its classes are the D numbers of a word."""

    def build(self) -> None:
        c = self.config
        size = tuple(side + added for side, added in zip(pair(c.img_size), c.padding, strict=True))
        self.vit = ViTModel(
            ViTConfig(
                size, c.patch_size, c.in_channels, c.embed_dim, c.hidden_dim, c.num_encoder_layers, c.nhead,
                dropout=c.dropout, position_init="sincos" if c.hidden_dim % 4 == 0 else "normal",
            )
        )  # fmt: skip

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit.classifier(self.vit.features(images))


ENCODERS = {"vit": ViTEncoder, "patch_embed": PatchEncoder}

# ---- embedders: vectors to words -------------------------------------------------------------------------------------

METRICS = ("cosine_similarity", "cdist")
SEARCH_FLOATS = 2**22  # similarities that exist at any moment of a search: 16 MiB


@torch.no_grad()
def nearest_words(x: torch.Tensor, words: torch.Tensor, k: int = 1, metric: str = "cdist") -> torch.Tensor:
    """x [M, D] and words [V, D] -> ids [M, k] of the k nearest words, nearest first, exactly (to fp32 rounding).

    The words are gone through in chunks, each of which keeps its best k: memory does not grow with V. cdist: |x - w|^2 =
    |x|^2 - 2 (x w - |w|^2 / 2), so the nearest word has the largest x w - |w|^2 / 2. Raises ValueError for k > V.
    """
    M, V = len(x), len(words)
    if k > V:
        raise ValueError(f"k is {k}, but there are {V} words to choose from")
    chunk = max(k, SEARCH_FLOATS // max(1, M))
    values = x.new_empty(M, 0, dtype=torch.float32)
    ids = torch.empty(M, 0, dtype=torch.long, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        for start in range(0, V, chunk):
            part = words[start : start + chunk].float()
            if metric == "cdist":
                likeness = torch.addmm(part.square().sum(dim=1), x, part.T, beta=-0.5)
            else:
                likeness = x @ F.normalize(part, dim=1).T
            best = likeness.topk(min(k, len(part)), dim=1)
            values, ids = torch.cat([values, best.values], 1), torch.cat([ids, best.indices + start], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            ids = ids.gather(1, order)
    return ids


class DirectEmbedder(nn.Module):
    """The vectors as they are: the language model sees what no word says."""

    metric = "cdist"  # by which the words near a vector are named

    def __init__(self, config: EmbedderConfig):
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Vectors x [M, D], words [V, D] -> what the language model is to read, [M, D]."""
        return x


class KNNEmbedder(DirectEmbedder):
    """The k nearest words, mixed by softmax(-distance / temperature). The gradient says which of the k should count more;
    with k = 1, where nothing is left to say, it passes straight through as in MaxEmbedder."""

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        ids = nearest_words(x, words, self.config.k)
        chosen = F.embedding(ids, words)  # [M, k, D]
        if self.config.k == 1:
            return straight_through(chosen[:, 0], x)
        distance = torch.linalg.vector_norm(x[:, None].float() - chosen.float(), dim=-1)
        share = (-distance / self.config.temperature).softmax(dim=-1)
        return torch.einsum("mk,mkd->md", share.to(chosen.dtype), chosen)


class MaxEmbedder(DirectEmbedder):
    """The most similar word itself. What should change in it is told to the vector (Bengio et al. 2013)."""

    @property
    def metric(self) -> str:
        return self.config.similarity_metric

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return straight_through(F.embedding(nearest_words(x, words, 1, self.metric)[:, 0], words), x)


def straight_through(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The value, with x's gradient as if it were x."""
    return value + (x - x.detach())


EMBEDDERS = {"knn": KNNEmbedder, "max": MaxEmbedder, "direct": DirectEmbedder}


def gaussian_kl(mean: torch.Tensor, var: torch.Tensor, target_mean: torch.Tensor, target_var: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, var) || N(target_mean, target_var)), the mean over independent dimensions [D], in nats:
    (var / target_var + (mean - target_mean)^2 / target_var - 1 - log(var / target_var)) / 2."""
    var, target_var = var.clamp_min(1e-8), target_var.clamp_min(1e-8)
    return 0.5 * ((var + (mean - target_mean).square()) / target_var - 1 - (var / target_var).log()).mean()


# ---- all together ----------------------------------------------------------------------------------------------------

HEAD = re.compile(r"(^|\.)(score|classifier|pre_classifier|classification_head|logits_proj)(\.|$)")


def longest_input(model: nn.Module) -> float:
    """How many vectors the model can read, as far as its config says."""
    config = getattr(model, "config", None)
    for name in ("context_length", "n_positions", "max_position_embeddings"):
        if getattr(config, name, None):
            offset = config.pad_token_id + 1 if "roberta" in getattr(config, "model_type", "") else 0  # its first position
            return getattr(config, name) - offset
    return math.inf


class LLMVIT(nn.Module):
    """Images through a language model.

    model: what maps inputs_embeds [B, N, D] to something with "logits" [B, K] and has get_input_embeddings(): any Hugging
    Face ...ForSequenceClassification, or LanguageClassifier. A decoder of theirs without a pad token gets one, in a config
    of its own: with vectors for words it means nothing, but without it they refuse more than one image.
    frozen_backbone_steps: for so many training passes all but the classification head keeps its weights, and drops
    nothing out, while the encoder learns; always_freeze_backbone: for ever. What did not train before never will.
    embedding_loss_weight: of the Gaussian KL divergence from the batch's vectors to the word embeddings.
    criterion: (logits, labels) -> loss; cross-entropy unless given.
    Raises ValueError for sizes that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        img_processor_config: EncoderConfig | None = None,
        embedder_config: EmbedderConfig | None = None,
        frozen_backbone_steps: int = 0,
        always_freeze_backbone: bool = False,
        embedding_loss_weight: float = 0.0,
        criterion: nn.Module | None = None,
    ):
        super().__init__()
        config, embedder_config = img_processor_config or EncoderConfig(), embedder_config or EmbedderConfig()
        words = self._words_of(model)
        width = config.embed_dim if words is None else words.shape[1]
        if width is None or config.embed_dim not in (None, width):
            raise ValueError(f"embed_dim is {config.embed_dim}, the language model's width {width}: leave it out")
        if math.prod(config.grid) > longest_input(model):
            raise ValueError(
                f"a grid of {config.grid[0]}x{config.grid[1]} patches is {math.prod(config.grid)} words, the language model "
                f"reads at most {longest_input(model)}: use larger patches (--patch-size)"
            )
        if words is None and embedder_config.type != "direct":
            raise ValueError(f"a {embedder_config.type} embedder needs word embeddings, this model has none: use direct")
        self.model = model
        if getattr(getattr(model, "config", None), "pad_token_id", 0) is None:
            model.config = copy.copy(model.config)
            model.config.pad_token_id = 0
        self.config = replace(config, embed_dim=width)
        self.encoder = ENCODERS[config.type](self.config)
        if words is not None:
            with torch.no_grad():  # the vectors begin as spread as the words are, around their mean
                var, mean = torch.var_mean(words.float(), dim=0, correction=0)
                self.encoder.norm.weight.copy_(var.sqrt())
                self.encoder.norm.bias.copy_(mean)
        self.embedder = EMBEDDERS[embedder_config.type](embedder_config)
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.embedding_loss_weight = embedding_loss_weight
        self.frozen_backbone_steps = math.inf if always_freeze_backbone else frozen_backbone_steps
        self.frozen_steps_done = 0
        self._frozen: list[nn.Parameter] | None = None  # what freezing took from training; None: not frozen
        if self.frozen_backbone_steps > 0:
            self.freeze_backbone()

    @staticmethod
    def _words_of(model: nn.Module) -> torch.Tensor | None:
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"a {type(model).__name__} has no get_input_embeddings(): wrap it in one that has")
        embedding = model.get_input_embeddings()
        return None if embedding is None else embedding.weight

    # ---- freezing ----

    @property
    def frozen(self) -> bool:
        return self._frozen is not None

    def freeze_backbone(self) -> None:
        """Everything of the language model but its head stops learning. Raises ValueError where no head is found."""
        if self.frozen:
            return
        if not any(HEAD.search(name) for name, _ in self.model.named_parameters()):
            raise ValueError(f"this {type(self.model).__name__} has no head called score or classifier to be left unfrozen")
        self._frozen = [p for name, p in self.model.named_parameters() if p.requires_grad and not HEAD.search(name)]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser leaves out what has no gradient: no momentum, no weight decay
        self.train(self.training)

    def unfreeze_backbone(self) -> None:
        for parameter in self._frozen or ():
            parameter.requires_grad_(True)
        self._frozen = None
        self.train(self.training)

    def increment_frozen_backbone_steps(self) -> None:
        """A training pass is over: the last of frozen_backbone_steps unfreezes the backbone."""
        if self.training and self.frozen and self.frozen_backbone_steps < math.inf:
            self.frozen_steps_done += 1
            if self.frozen_steps_done >= self.frozen_backbone_steps:
                self.unfreeze_backbone()

    def train(self, mode: bool = True) -> "LLMVIT":
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.frozen_steps_done)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.frozen_steps_done = int(state)
        if self.frozen_steps_done < self.frozen_backbone_steps:
            self.freeze_backbone()
        else:
            self.unfreeze_backbone()

    # ---- use ----

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        """images [B, C, H, W], labels [B] or, as probabilities, [B, K] -> {"logits": [B, K]} and, with labels, "loss" (in
        training and evaluation), and "embedding_loss" where it counts. Raises ValueError for images of a wrong shape."""
        x, words = self.encoder(images), self._words_of(self.model)
        B, N, D = x.shape
        read = self.embedder(x.view(B * N, D), words).view(B, N, D)
        out = Output(logits=self.model(inputs_embeds=read if words is None else read.to(words.dtype))["logits"])
        if labels is not None:
            out["loss"] = self.criterion(out["logits"].float(), labels)
            if self.embedding_loss_weight and words is not None:
                out["embedding_loss"] = self.embedding_loss(x, words)
                out["loss"] = out["loss"] + self.embedding_loss_weight * out["embedding_loss"]
        self.increment_frozen_backbone_steps()
        return out

    @staticmethod
    def embedding_loss(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """How far the vectors [B, N, D], as one Gaussian, are from that of the words [V, D]; see gaussian_kl."""
        (var, mean), target = (torch.var_mean(t.float().flatten(0, -2), dim=0, correction=0) for t in (x, words.detach()))
        return gaussian_kl(mean, var, target[1], target[0])

    @torch.no_grad()
    def words(self, images: torch.Tensor, tokenizer=None, k: int = 1) -> dict:
        """What the patches say: {"ids": [B, rows, columns, k], the k nearest words of each patch, nearest first} and, given
        a tokenizer (anything with decode), "words": the same as nested lists of strings. Raises ValueError without words."""
        words = self._words_of(self.model)
        if words is None:
            raise ValueError("this model has no words that patches could become")
        x = self.encoder(images)
        ids = nearest_words(x.flatten(0, 1), words, k, self.embedder.metric).view(len(x), *self.config.grid, k)
        if tokenizer is None:
            return {"ids": ids}
        text = {i: tokenizer.decode([i]) for i in ids.unique().tolist()}

        def spelled(part):
            return [spelled(inner) for inner in part] if isinstance(part, list) else text[part]

        return {"ids": ids, "words": spelled(ids.tolist())}
