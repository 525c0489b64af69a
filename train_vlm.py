"""Train a vision-language model (model.py): a vision tower, a projector and a language model that answers about pictures.

    python train_vlm.py                                  scenes of handwritten digits, from nothing, in eight minutes on a CPU
    python train_vlm.py --blind                          its twin that never sees a picture: what can be guessed
    python train_vlm.py --dataset llava --data train.json --images DIR --test-data test.json          your own pictures
    python train_vlm.py --dataset llava --data train.json --lm model.gguf --lora 8          a published language model
    python train_vlm.py --dataset llava --data train.json --model runs/vlm-llava --lora 8   a whole model learns more
    python train_vlm.py --dataset llava --data 'OUT/shard-*.tar' --test-data test.json      more than fits (see shards.py)
    torchrun --nproc-per-node 8 train_vlm.py ...         on 8 GPUs; with --fsdp a model that does not fit on one
    python train_vlm.py --out runs/vlm-scenes --resume   go on after Ctrl-C, exactly

Up to three stages, each said before it starts and why: (1) the vision tower learns digit, colour and place of each square of
a scene (labels that the generator knows; skipped with --vision and on your own data); (2) the projector alone, both towers
frozen; (3) the language model with the projector. Questions about a picture are packed in one row but never see each other.

Writes runs/vlm-DATASET/: the model as a folder that transformers opens (Idefics3's; LLaVA's with --projector mlp),
metrics.jsonl, curves.png, samples.png, attention.png, result.json. The last line printed is JSON.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.augment import GEOMETRY, warp
from data.common import CommonAnswers, common_questions
from data.features import FrozenFeatures
from data.image_cache import ImageCache
from data.llava import LlavaRows
from data.llava_batches import LlavaBatches, ShardBatches
from data.scene_batches import PatchLabels, SceneBatches
from data.scenes import COLOURS, HELD_OUT, IGNORE, PLACES, corpus, make_scenes
from data.shards import ShardImages, Shards
from extras.attention_maps import group_into_words, where_it_looks
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib import figures
from lib.adapters import save_lora
from lib.answers import (
    MOST_NEW_TOKENS,
    Item,
    answer,
    image_key,
    load_vlm,
    mean_answer_loss,
    prompt_ids,
    row_items,
    scene_items,
)
from lib.chat import stop_tokens
from lib.checkpoint import from_pretrained, save_pretrained
from lib.files import find_source, read_json, write_json
from lib.image_settings import read_image_settings
from lib.old_trainer import (
    Run,
    Trainer,
    argument_parser,
    everyones,
    not_negative_float,
    not_negative_int,
    parameter_groups,
    positive_float,
    positive_int,
    run_cli,
)
from lib.quant import Linear4bit, quantize_
from lib.scores import score
from lib.tokenizer import BPETokenizer
from lib.vocabulary import resize_token_embeddings
from model import (
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
)
from processing_mllama import (
    IDEFICS3_AROUND,
    IMAGE_TOKEN,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    MllamaImageProcessor,
    rescale,
    to_image,
)
from siglip import SiglipModel, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import sincos_positions

# ---- settings --------------------------------------------------------------------------------------------------------

# The one dial: (vision tower, language model, vocabulary of a tokenizer that is trained here).
SIZES = {
    "tiny": (
        {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
        {"hidden_size": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384, "rope_base": 10000.0,
         "max_position_embeddings": 512, "tie_word_embeddings": True},
        450,
    ),
    "smol": (SiglipVisionConfig.PRESETS["base-p16-224"], LLAMA32Config.PRESETS["smollm2-135m"], 8192),
}  # fmt: skip
SHARES = {"vision": 0.4, "projector": 0.02, "language": 0.58}  # of --max-seconds
READ = 11, len(COLOURS) + 1, len(PLACES[3])  # digits and colours, each with "nothing", and places
VISION_BATCH = 64  # scenes a step of stage 1
# With 0.02 the language model of one run in four never learned to find a digit by its name, with 0.05 it learned all late: too
# few of a step's questions tell each digit, and Muon's step is of the same length whether the gradient is sure or not.
MUON_LR = {"vision": 0.02, "projector": 0.02, "language": 0.01}
READ_WEIGHTS = 1.0, 0.5, 0.2  # digits are hardest; where places weigh more, digits show less in the features
FIRST_ROWS = 5000  # of shards: what a tokenizer is trained on
QUICK = 600  # questions of each split, the first of its test questions, asked every --eval-every steps
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT_IN_BITS = rf"(?!.*cross_layers).*({'|'.join(LORA_TARGETS)})"  # what --qlora packs: not layers that start untrained


def parse_args(argv=None):
    parser = argument_parser(__doc__, batch_size=16, lr=None, eval_every=400)
    add = parser.add_argument
    add("--dataset", choices=["scenes", "llava"], default="scenes")
    add("--images", metavar="DIR", help="where the pictures of --data FILE.json are; default: beside it")
    add("--test-data", metavar="FILE.json", help="held-out rows; default: --test-part of --data, split by picture")
    add("--test-part", type=positive_float, default=0.1)
    add("--size", choices=list(SIZES), default="tiny", help="of what is not taken from --vision or --lm")
    add("--model", metavar="SOURCE", help="go on from a whole vision-language model, its projector too: a run, a LLaVA or "
        "Idefics3 folder or hub name")  # fmt: skip
    add("--vision", metavar="SOURCE", help="take the vision tower of a run, a SigLIP, LLaVA or Idefics3 folder or hub name")
    add("--lm", metavar="SOURCE", help="take language model and tokenizer of a run, a LLaMA folder or hub name, a .gguf file")
    add("--image-size", type=positive_int, help="pixels; default: the tower's")
    add("--patch-size", type=positive_int, help="pixels; default --size's")
    add("--projector", choices=["linear", "mlp"], default="linear", help="linear: Idefics3's; mlp: LLaVA's two layers, which "
        "read the tower before its last norm (on scenes they learn far more slowly)")  # fmt: skip
    add("--pixel-shuffle", type=positive_int, default=1, help="r x r patches become one token, for --projector linear")
    add("--fusion", choices=["early", "cross"], default="early", help="pictures among the words, or in layers between")
    add("--blind", action="store_true", help="train the same model without seeing: the baseline")
    add("--freeze", default=None, metavar="vision,lm", help="what never trains; default: a tower that comes trained, and with "
        "--lora the rest of the language model; none: nothing")  # fmt: skip
    add("--lora", type=positive_int, metavar="RANK", help="train low-rank corrections of the language model's matrices")
    add("--qlora", type=positive_int, metavar="RANK", help="the same over matrices of four bits a weight (quant.py)")
    add("--lora-alpha", type=positive_float, help="default: twice the rank")
    add("--lr-pretrained", type=positive_float, default=1e-4, help="peak learning rate of what comes trained, LoRA apart")
    add("--muon-lr", type=not_negative_float, help="Muon's, for matrices that start untrained; 0: AdamW for all; default: "
        "0.02, for stage 3 0.01")  # fmt: skip
    add("--vision-steps", type=not_negative_int, help="of stage 1; default: 1000, with your own data 400")
    add("--projector-steps", type=not_negative_int, help="of stage 2; default: 20, or a tenth of stage 3")
    add("--steps", type=positive_int, help="of stage 3, in place of --epochs; default for scenes 1000")
    add("--per-scene", type=positive_int, default=12, help="questions about each scene")
    add("--shift", type=not_negative_float, default=0.0, help="move training pictures by up to this part of their side, for "
        "--dataset llava with a tower that trains")  # fmt: skip
    add("--isolated", action="store_true", help="each question of a row is asked alone, without those before it")
    add("--max-length", type=positive_int, default=1024, help="tokens of a packed row, for --dataset llava")
    add("--cache-features", nargs="?", const="", metavar="FILE", help="keep a frozen tower's features; default in --out")
    add("--eval-count", type=positive_int, default=300, help="test scenes of each kind, or test rows, asked at the end")
    args = parser.parse_args(argv)
    if args.dataset == "llava" and not args.data:
        parser.error("--dataset llava needs --data FILE.json, or shards: 'DIR/shard-*.tar'")
    if is_sharded_data(args) and (not args.test_data or args.cache_features is not None):
        parser.error(f"--data {args.data}: shards need --test-data FILE.json, and are too many for --cache-features")
    args.out = args.out or f"runs/vlm-{args.dataset}{'-blind' if args.blind else ''}"
    args.freeze = None if args.freeze is None else sorted(set(args.freeze.split(",")) - {"none", ""})
    if set(args.freeze or ()) - {"vision", "lm"}:
        parser.error(f"--freeze {','.join(args.freeze)}: it takes vision, lm, both with a comma, or none")
    if args.lora and args.qlora:
        parser.error("--lora and --qlora: choose one")
    args.lora = args.lora or args.qlora
    if args.model:
        settled = ("projector", "pixel_shuffle", "fusion", "vision", "lm", "image_size", "patch_size")
        chosen = [f"--{name.replace('_', '-')}" for name in settled if getattr(args, name) != parser.get_default(name)]
        if chosen:
            parser.error(f"--model {args.model} brings its own: leave out {', '.join(chosen)}")
        args.vision = args.lm = args.model
    if args.projector == "mlp" and args.pixel_shuffle > 1:
        parser.error("--pixel-shuffle goes with --projector linear: no published layout has it with an mlp")
    if args.dataset == "scenes" and args.cache_features is not None:
        parser.error("--cache-features: scenes are new at every step, there is nothing to keep; it is for --dataset llava")
    if args.fsdp and args.cache_features is not None:
        parser.error("--cache-features needs a whole vision tower in each process: leave out --fsdp")
    if args.shift and (args.dataset == "scenes" or args.cache_features is not None):
        parser.error("--shift is for --dataset llava, without --cache-features: scenes wander by themselves")
    return args


# ---- model -----------------------------------------------------------------------------------------------------------


def find_part(source: str, part: str) -> nn.Module:
    """The vision tower or the language model of any checkpoint that has one. Raises ValueError for others."""
    model = from_pretrained(source)
    if isinstance(model, MllamaForConditionalGeneration):
        return model.vision_tower if part == "vision" else model.language_model
    if part == "vision" and isinstance(model, SiglipTwoTower):
        tower = SiglipModel(model.config.vision_config)
        tower.vision_model = model.vision_model
        return tower
    if not isinstance(model, SiglipModel if part == "vision" else Llama3ForCausalLM):
        wanted = f"a {'SigLIP tower' if part == 'vision' else 'LLaMA'}, or a model that has one"
        raise ValueError(f"--{part} {source} is a {type(model).__name__}: it must be {wanted}")
    return model


def train_tokenizer(texts: list[str], vocab_size: int) -> BPETokenizer:
    """As large as the texts allow, up to vocab_size."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    roles = ["user\n", "assistant\n", "system\n"] * 100  # what the chat template writes, in few tokens
    return BPETokenizer.train([*texts, *roles], vocab_size, special, at_most=True)


def teach_to_converse(tokenizer: BPETokenizer) -> None:
    """A base model's tokenizer, or one that is trained here, has no chat template."""
    if tokenizer.chat_template is None:
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = "chatml_spaced"


def whole_model(args) -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor]:
    """--model, ready to learn more."""
    model, processor = load_vlm(args.model)
    teach_to_converse(processor.tokenizer)
    resize_token_embeddings(model, max(len(processor.tokenizer), model.config.text_config.vocab_size))
    model.config = replace(model.config, image_token_id=processor.image_token_id)
    torch.manual_seed(args.seed)
    return model, processor


def build(args, texts: list[str], mean, std) -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor]:
    """The model, with what --vision and --lm bring, and its processor. texts: to train a tokenizer on; mean, std: of pixels,
    unless the tower comes with its own."""
    if args.model:
        return whole_model(args)
    vision_settings, text_settings, vocabulary = SIZES[args.size]
    tower = find_part(args.vision, "vision") if args.vision else None
    lm = find_part(args.lm, "lm") if args.lm else None
    tokenizer = BPETokenizer.from_pretrained(args.lm) if lm else train_tokenizer(texts, vocabulary)
    if lm and len(tokenizer) > lm.config.vocab_size:
        raise ValueError(
            f"--lm {args.lm}: its tokenizer has {len(tokenizer)} tokens, its model {lm.config.vocab_size}: "
            "they do not belong together"
        )
    teach_to_converse(tokenizer)
    changes = {key: getattr(args, key) for key in ("image_size", "patch_size") if getattr(args, key)}
    if tower and changes:
        raise ValueError(f"--{next(iter(changes)).replace('_', '-')} cannot be chosen with --vision: the tower has its own")
    vision = replace(tower.config, vision_use_head=False) if tower else SiglipVisionConfig(
        **{**vision_settings, **changes, "vision_use_head": False})  # fmt: skip
    linear = args.projector == "linear"
    join = {"pixel_shuffle": args.pixel_shuffle, "projector_type": args.projector,
            "vision_feature_layer": None if linear else -1}  # fmt: skip
    config_class, model_class = MLLAMAConfig, MllamaForConditionalGeneration
    if args.fusion == "cross":
        config_class, model_class = CrossAttentionConfig, CrossAttentionVLM
    count = config_class(vision, LLAMA32Config(**text_settings), **join).text_config.num_image_tokens
    seeing = read_image_settings(find_source(args.vision)) if tower else {"image_mean": mean, "image_std": std}
    seeing.pop("image_size", None)
    seeing |= {"around_image": IDEFICS3_AROUND} if linear and args.fusion == "early" else {}
    processor = MllamaImageProcessor(tokenizer, count, vision.image_size, add_location_tokens=False, **seeing)
    text = lm.config if lm else LLAMA32Config(**{**text_settings, "vocab_size": len(tokenizer)})
    config = config_class(vision, replace(text, vocab_size=max(len(tokenizer), text.vocab_size)),
                          image_token_id=processor.image_token_id, **join)  # fmt: skip
    torch.manual_seed(args.seed)
    model = model_class(config)
    with torch.no_grad():
        if tower:
            state = {k: v for k, v in tower.state_dict().items() if not k.startswith("vision_model.head.")}
            model.vision_tower.load_state_dict(state)
        else:  # positions that say from the first step what is near what
            positions = model.vision_tower.vision_model.embeddings.position_embedding.weight
            positions.copy_(sincos_positions(vision.grid, vision.hidden_size))
    if lm:
        resize_token_embeddings(lm, config.text_config.vocab_size)
        new = model.language_model.state_dict()  # the layers between, under cross-attention, are not in it
        known = {k: v for k, v in lm.state_dict().items() if k in new or "cross_layers" not in k}
        model.language_model.load_state_dict({**new, **known})
    return model, processor


class Learner(nn.Module):
    """What is trained, in whichever stage: the model and, for stage 1, a linear reader of what the tower sees. sizes: of how
    many answers to each question it chooses one."""

    def __init__(self, model: MllamaForConditionalGeneration, sizes: tuple[int, ...] = READ):
        super().__init__()
        self.model, self.sizes = model, sizes
        self.reader = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))

    def count(self, patch_labels=None, answers=None, **batch) -> torch.Tensor:
        """How many answers a part of a batch has to each of the questions whose loss is a mean of its own."""
        if patch_labels is not None:
            return (patch_labels != IGNORE).sum(dim=(0, 2))
        return ((batch["labels"] if answers is None else answers) != IGNORE).sum()[None]

    def forward(self, patch_labels=None, answers=None, share=(1.0, 1.0, 1.0), **batch) -> torch.Tensor:
        """The loss of a part of a batch, each mean weighted by `share`: see shares."""
        if patch_labels is None and answers is None:
            loss = self.model(**batch)["loss"] * share[0]
            if "pixel_values" in batch or "vision_features" in batch:
                return loss
            return loss + sum(p.sum() for p in self.parameters() if p.requires_grad) * 0  # what sees has a gradient: none
        features = self.model.vision_features(batch["pixel_values"])
        if patch_labels is not None:
            return scene_loss(self.reader(features), patch_labels, share)
        read = self.reader(features.mean(dim=1)).float().split(self.sizes, dim=1)
        return common_loss(read, answers) * share[0]


def shares(run: Run, counts: list[torch.Tensor]) -> torch.Tensor:
    """What to multiply the means of each part of a batch with, [parts, questions], so that the average over all parts of all
    processes is the mean over the whole batch: parts have unequal numbers of answers. counts: see Learner.count."""
    counts = torch.stack(counts)
    return counts * (len(counts) * run.world_size) / run.sum(counts.sum(dim=0)).clamp(min=1)


def common_loss(logits: tuple[torch.Tensor, ...], seen: torch.Tensor) -> torch.Tensor:
    """Of each question [N, answers] against `seen` (see CommonAnswers): the mean over all that was asked."""
    each = zip(logits, seen.unbind(dim=1), strict=True)
    losses = [F.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum") for x, y in each]
    return sum(losses) / (seen != IGNORE).sum()


def scene_loss(logits: torch.Tensor, labels: torch.Tensor, share=(1.0, 1.0, 1.0)) -> torch.Tensor:
    """logits [N, patches, sum(READ)] against digit, colour and place of each patch, or "nothing": labels int64 [N, 3, patches],
    see Scenes.dense_labels; share: see shares.

    What colour a digit has tells in training which digit it is not: that of the pair which is held out. A tower that learns
    this is blind to the pair, so its digit is left out of the softmax over that colour (the prior-adjusted loss of Menon et
    al. 2021, with a prior of 0).
    """
    labels = [label.flatten() for label in labels.unbind(dim=1)]
    never = torch.zeros(READ[1], READ[0], dtype=torch.bool, device=logits.device)
    for digit, colour in HELD_OUT:
        never[COLOURS.index(colour), digit] = True
    digits, *others = logits.flatten(0, 1).float().split(READ, dim=1)
    digits = digits.masked_fill(never[labels[1].clamp(min=0)], -1e4)
    read = zip(READ_WEIGHTS, share, (digits, *others), labels, strict=True)
    return sum(weight * part * F.cross_entropy(x, y, ignore_index=IGNORE) for weight, part, x, y in read)


# ---- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    name: str
    why: str
    steps: int
    parts: tuple[str, ...]  # of the learner, that train


def looks_first(args, common) -> bool:
    """Whether the tower is trained by itself: if it starts untrained and there is what to name."""
    untrained = not (args.vision or args.blind or "vision" in (args.freeze or ()))
    return untrained and args.vision_steps != 0 and (args.dataset == "scenes" or bool(common))


def frozen_towers(args, common=()) -> set[str]:
    """What never trains in the last stage. A tower that can see already is about as good frozen, and cheaper."""
    if args.freeze is not None:
        return set(args.freeze)
    return {"vision"} if args.vision or args.blind or looks_first(args, common) else set()


def stages(args, epoch: int | None, common=()) -> list[Stage]:
    """What this run goes through. epoch: steps of one pass over the rows; None for scenes, of which there is no end. common:
    see common_questions."""
    steps = args.steps or (1000 if epoch is None else max(1, round((args.epochs or 3) * epoch)))
    frozen, found, first = frozen_towers(args, common), [], args.projector_steps
    if looks_first(args, common):
        why = "digit, colour and place of each patch, from the generator's labels: there must be something to talk about"
        if common:
            why = f"the answers to {len(common)} common questions, by a linear reader: there must be something to talk about"
        found.append(Stage("vision", why, args.vision_steps or (400 if common else 1000), ("model.vision_tower", "reader")))
    if first is None:  # where both towers come trained, or nearly so, and what is between them does not
        first = 0 if args.model else 20 if found or epoch is None else steps // 10 if args.vision and args.lm else 0
    if args.fusion == "cross":  # its gates are closed at first, and let no gradient through to the projector
        if "lm" in frozen and not args.lora:
            raise ValueError("--fusion cross --freeze lm: the language model holds the layers that look: add --lora")
        first = 0
    if first:
        why = "both towers frozen: a projector that is still random would only disturb them"
        found.append(Stage("projector", why, first, ("model.multi_modal_projector",)))
    parts = ["model.multi_modal_projector"]
    parts += [] if "vision" in frozen else ["model.vision_tower"]
    parts += [] if "lm" in frozen and not args.lora else ["model.language_model"]
    what = {"model.language_model": "the language model", "model.vision_tower": "the vision tower"}
    why = "the projector" + "".join(f" and {what[part]}" for part in parts[1:])
    why += f", by LoRA of rank {args.lora}" if args.lora else ""
    return [*found, Stage("language", f"{why} learn to answer", steps, tuple(parts))]


def choose_parameters(learner: Learner, stage: Stage, args) -> list[dict]:
    """Let the stage's parts train and nothing else; their groups for the optimiser, each with its learning rate."""
    learner.requires_grad_(False)
    groups = []
    for part in stage.parts:
        module, lora = learner.get_submodule(part), args.lora and part == "model.language_model"
        module.requires_grad_(True)
        if part == "model.vision_tower" and learner.model.config.vision_feature_layer is not None:
            module.vision_model.post_layernorm.requires_grad_(False)  # comes after the features that are used
        if lora:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.endswith(("lora_a", "lora_b")) or "cross_layers" in name)
        pretrained = {"model.vision_tower": args.vision, "model.multi_modal_projector": args.model,
                      "model.language_model": args.lm and not lora}.get(part)  # fmt: skip
        lr, muon = args.lr or (1e-3 if lora else 2e-3), MUON_LR[stage.name] if args.muon_lr is None else args.muon_lr
        muon = None if lora else muon
        if pretrained and part == "model.language_model" and not args.model:  # the layers between start untrained
            between = getattr(module.model, "cross_layers", nn.ModuleDict())
            groups += parameter_groups(between, args.weight_decay, lr, muon)
            between.requires_grad_(False)
            groups += parameter_groups(module, args.weight_decay, args.lr_pretrained)
            between.requires_grad_(True)
            continue
        lr, muon = (args.lr_pretrained, None) if pretrained else (lr, muon)
        groups += parameter_groups(module, args.weight_decay, lr, muon)
    if not groups:
        raise ValueError(f"stage {stage.name}: nothing is left to train: freeze less")
    return groups


# ---- data ------------------------------------------------------------------------------------------------------------


def is_sharded_data(args) -> bool:
    return args.dataset == "llava" and args.data.endswith(".tar")


def load_rows(args, run: Run) -> tuple[LlavaRows | Shards, LlavaRows]:
    """(training, held-out) rows, after saying what is wrong with the others."""
    if is_sharded_data(args):
        with run.main_first():
            rows = Shards.open(args.data, None if args.dry_run else run.folder / "shards.npz", run.is_main)
    else:
        rows = LlavaRows.read(args.data, args.images, run.is_main)
    run.print(rows.report())
    if args.test_data:
        test = LlavaRows.read(args.test_data, args.images, run.is_main)
        run.print(test.report())
        return rows, test
    return rows.split(args.test_part, args.seed)


def shifted(pixel_values: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """[I, 3, S, S], each moved by up to `most` of its side, either way; its border is repeated."""
    geometry = torch.zeros(len(pixel_values), len(GEOMETRY))
    geometry[:, 1:3] = (torch.rand(len(pixel_values), 2, generator=generator, device=generator.device).cpu() * 2 - 1) * most
    return warp(pixel_values, geometry.to(pixel_values), "border")


def some(rows: LlavaRows, count: int) -> LlavaRows:
    """Up to `count` of the rows, in random order, the same each time: the first few of them stand for all."""
    return rows.subset(random.Random(0).sample(range(len(rows)), min(count, len(rows))))


# ---- what the run leaves -----------------------------------------------------------------------------------------------


def ask(model, processor, items: list[Item], args) -> dict:
    """Answers by greedy decoding, scored, with the perplexity of the true ones."""
    said = answer(model, processor, items, blind=args.blind)
    loss, _ = mean_answer_loss(model, processor, items, blind=args.blind)
    return {"said": said, "answer_loss": round(loss, 4) if items else None, **score(items, said)}


def noted(found: dict[str, dict]) -> dict[str, float]:
    """For metrics.jsonl, from what `ask` found of each split."""
    keys = "exact_match", "answer_loss"
    return {f"{split}_{key}": facts[key] for split, facts in found.items() for key in keys if facts["n"]}


def draw(folder: Path, model, processor, items: list[Item], found: dict, rows: list[dict], blind: bool) -> None:
    """curves.png; samples.png: one question of each of 24 pictures; attention.png: where it looks for its longest answer."""
    figures.curves(rows, folder / "curves.png")
    first = {}
    for number, item in enumerate(items):  # of each picture another kind of question, where there is one
        if item.images:
            first.setdefault(image_key(item.images[0]), []).append(number)
    chosen = [numbers[i % len(numbers)] for i, numbers in enumerate(list(first.values())[:24])]
    if not chosen:
        return
    pictures = [picture_tensor(items[i].images[0]) for i in chosen]
    words = [items[i].messages[-1]["content"].replace("<image>", "").strip() for i in chosen]
    said, truths = [found["said"][i] for i in chosen], [items[i].answer for i in chosen]
    figures.answer_sheet(pictures, words, said, truths, folder / "samples.png", "what it saw, what it was asked, what it said")
    if blind:
        return
    longest = max(range(len(chosen)), key=lambda i: len(said[i].split()) * (said[i] == truths[i]))
    draw_attention(folder / "attention.png", model, processor, items[chosen[longest]])


def picture_tensor(image) -> torch.Tensor:
    """uint8 [3, h, w], for drawing."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(to_image(image))).permute(2, 0, 1)


def draw_attention(path: Path, model, processor, item: Item) -> None:
    """Where the model looks for each word that it says to this item."""
    batch = processor(None, [item.images], [item.messages], add_generation_prompt=True)
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    (ids,) = model.generate(**batch, max_new_tokens=MOST_NEW_TOKENS, stop_tokens=stop_tokens(processor.tokenizer))
    if not ids:
        return
    words, maps = group_into_words(ids, where_it_looks(model, ids, batch["input_ids"], batch["pixel_values"]), processor.decode)
    question = item.messages[-1]["content"].replace(IMAGE_TOKEN, "").strip()
    figures.attention_overlay([picture_tensor(image) for image in item.images], words, maps, path, title=question)


def save_run(run: Run, model, processor, args) -> None:
    """The model as a published checkpoint folder with its processor; the LoRA corrections by themselves as well."""
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    kind = save_pretrained(model, run.folder, **ends)
    processor.save_pretrained(run.folder, kind if kind in ("llava", "idefics3") else None)
    if args.lora:
        save_lora(model, run.folder / "lora")
    write_json(run.folder / "settings.json", vars(args))
    from_pretrained(run.folder)  # what was written can be read


# ---- the recipe --------------------------------------------------------------------------------------------------------


class Data:
    """Where a run's batches and its test questions come from, and what a tokenizer and the pixels' scale are made from."""

    def __init__(self, args, run: Run):
        self.args, self.run, self.rows, self.sharded = args, run, None, is_sharded_data(args)
        if args.dataset == "scenes":
            pixels = rescale(make_scenes("train", 500, seed=args.seed).images)
            self.mean, self.std = (f(pixels, dim=(0, 2, 3)).tolist() for f in (torch.mean, torch.std))
            self.texts, self.common = corpus(), {}
        else:
            self.rows, self.test_rows = load_rows(args, run)
            self.mean, self.std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
            first = self.rows.head(FIRST_ROWS) if self.sharded else self.rows
            self.texts = [message["content"] for row in first for message in row.messages]
            self.common = {} if self.sharded else common_questions(self.rows)

    def batches(self, model, processor):
        args, run = self.args, self.run
        self.grid = model.config.vision_config.grid[0]
        ranks = {"rank": run.rank, "world_size": run.world_size, "grad_accum": args.grad_accum, "blind": args.blind}
        size = args.batch_size // run.world_size
        if self.rows is None:
            return SceneBatches(processor, size, args.seed, args.per_scene, **ranks)
        pixels = processor.image_size, processor.image_mean, processor.image_std, processor.resample, processor.do_pad_square
        pictures, features = (ShardImages if self.sharded else ImageCache)(*pixels), None
        frozen = "vision" in frozen_towers(args, self.common)
        if args.cache_features is not None and not frozen:
            raise ValueError("--cache-features: the vision tower is trained, so its features change: add --freeze vision")
        if frozen and not (args.fsdp or self.sharded) and (run.device.type == "cpu" or args.cache_features is not None):
            features = FrozenFeatures(model, pictures, args.blind)
        if args.shift and features and not args.blind and not looks_first(args, self.common):
            raise ValueError("--shift: the vision tower is frozen and looks at each picture once: add --freeze none")
        ranks |= {"workers": args.workers, "features": features, "isolated": args.isolated}
        ranks |= {"all_ranks": run.all, "always_image": args.fsdp}
        ranks["context"] = model.config.text_config.context_length
        kind = ShardBatches if self.sharded else LlavaBatches
        return kind(self.rows, processor, pictures, size, args.seed, args.max_length, **ranks)

    def keep_features(self, batches) -> None:
        """Of a tower that will not train any more, if that was asked for."""
        if self.args.cache_features is not None and not self.args.dry_run:
            paths = [path for row in self.rows for path in row.images]
            file = Path(self.args.cache_features or self.run.folder / "features.npy")
            with self.run.main_first():
                batches.features.keep(file, paths, self.args.workers, self.run.is_main)

    def to_look_at(self, processor, pictures: ImageCache, batch_size: int):
        """Batches for stage 1."""
        args, run = self.args, self.run
        ranks = {"grad_accum": args.grad_accum, "rank": run.rank, "world_size": run.world_size}
        if self.rows is None:
            return PatchLabels(processor, batch_size, args.seed, self.grid, **ranks)
        ranks |= {"workers": args.workers, "all_ranks": run.all}
        return CommonAnswers(self.rows, self.common, pictures, batch_size, args.seed, **ranks)

    def tests(self, count: int, model, processor) -> dict[str, list[Item]]:
        """Questions about so many test pictures, by split; without those that could not be asked."""
        if self.rows is None:
            return {split: scene_items(split, count, seed=0) for split in ("test", "compositional")}
        items = row_items(some(self.test_rows, count), self.args.isolated)
        pictures, limit = ImageCache(processor.image_size, most_bytes=0), model.config.text_config.context_length
        bad = {path for item in items for path in item.images if not self.args.blind and pictures[path] is None}
        fit = [item for item in items if not bad & {*item.images} and len(prompt_ids(processor, item, True)[0]) < limit]
        if len(fit) < len(items):
            why = f"{len(bad)} pictures cannot be read" if bad else f"they have over {limit} tokens"
            self.run.print(f"{len(items) - len(fit)} of {len(items)} test questions are left out: {why}")
        return {"test": fit}


def train_stage(run: Run, learner: Learner, stage: Stage, data: Data, batches, before, tests, processor, share) -> Trainer:
    """One stage from its beginning, or from where it stopped, to its end."""
    args = run.args
    seconds = args.max_seconds * share if args.max_seconds else None
    groups = choose_parameters(learner, stage, args)
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    size = args.batch_size
    if stage.name == "vision":
        unit = run.world_size * args.grad_accum
        size = max(1, round(VISION_BATCH / unit)) * unit
        batches = data.to_look_at(processor, getattr(batches, "images", None), size // run.world_size)
    else:
        data.keep_features(batches)
    run.print(f"stage {stage.name}: {stage.why}\n  {trained:,} parameters, {stage.steps:,} steps of {size}")
    trainer = Trainer(run, learner, stage.steps, groups, batches, "samples", stage.name, before, seconds, size)

    def losses(step: int):
        generator = run.seed_step(step)
        parts = next(batches)
        several = len(parts) * run.world_size > 1
        weights = shares(run, [learner.count(**part) for part in parts]) if several else [torch.ones(len(READ))]
        for batch, share in zip(parts, weights, strict=True):
            batch |= {"share": share}
            batch = {key: value.to(run.device) if hasattr(value, "to") else value for key, value in batch.items()}
            if args.shift and "pixel_values" in batch:
                batch["pixel_values"] = shifted(batch["pixel_values"], args.shift, generator)
            with run.autocast():
                yield trainer.model(**batch)

    learner.train()
    while not trainer.done():
        trainer.step(losses(trainer.steps_done))
        if stage.name == "language" and trainer.evaluates():
            with trainer.evaluation() as whole:
                trainer.log(**noted({split: ask(whole.model, processor, items, args) for split, items in tests.items()}))
    trainer.close()
    return trainer


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    data = Data(args, run)
    model, processor = build(args, data.texts, data.mean, data.std)
    if args.qlora:
        quantize_(model.language_model, KEPT_IN_BITS)
    if args.lora:
        classes = (nn.Linear, Linear4bit)
        convert_linears_to_lora(model.language_model, args.lora, args.lora_alpha or 2 * args.lora, 0.0, classes, LORA_TARGETS)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    learner = run.place(Learner(model, tuple(map(len, data.common.values())) or READ))
    batches = data.batches(model, processor)
    tests = data.tests(args.eval_count, model, processor)
    quick = {split: items[:QUICK] for split, items in tests.items()}
    plan = stages(args, None if data.rows is None else len(batches), data.common)
    run.print(f"{args.dataset} {run}; "
              + ", ".join(f"{name} {count:,}" for name, count in parts.items()) + " parameters")  # fmt: skip

    trainer, names = None, [stage.name for stage in plan]
    first = names.index(run.state["stage"]) if run.state else 0
    for stage in plan[first:]:
        share = SHARES[stage.name] / sum(SHARES[name] for name in names)
        trainer = train_stage(run, learner, stage, data, batches, trainer, quick, processor, share)

    lost = left_out(run, batches)
    if run.is_main and not args.dry_run:
        finish(run, trainer, processor, tests, lost)
    run.barrier()


def left_out(run: Run, batches) -> dict[str, int]:
    """How much training met, in all processes, that it could not use."""
    if not isinstance(batches, LlavaBatches):
        return {}
    found = {"unreadable_pictures": map(str, batches.images.unreadable), "rows_too_long": batches.too_long}
    found |= {"damaged_rows": batches.indices.lost} if isinstance(batches, ShardBatches) else {}
    return {name: len(set(everyones(run, list(each)))) for name, each in found.items()}


def finish(run: Run, trainer: Trainer, processor, tests: dict[str, list[Item]], lost: dict[str, int]) -> None:
    """Save the model, ask it all test questions, draw, and print the result."""
    args = run.args
    with trainer.evaluation() as whole:
        model = whole.model
        save_run(run, model, processor, args)
        found = {split: ask(model, processor, items, args) for split, items in tests.items()}
        trainer.log(**noted(found))
        draw(run.folder, model, processor, tests["test"], found["test"], trainer.metrics.read(), args.blind)
    result = {"blind": args.blind}
    for split, facts in found.items():
        before = "" if split == "test" else f"{split}_"
        result |= {f"{before}{key}": facts[key] for key in ("exact_match", "low", "high", "n", "answer_loss")}
        result[f"{before}by_kind"] = {kind: each["exact_match"] for kind, each in facts["by_kind"].items()}
    twin = Path(f"{run.folder}-blind") / "result.json"
    if not args.blind and twin.exists():
        blind = read_json(twin)
        shared = {"exact_match", "compositional_exact_match", "answer_loss"} & blind.keys()
        result |= {f"blind_{key}": blind[key] for key in sorted(shared)}
    result |= lost
    result |= {"seconds": round(trainer.seconds, 1), "steps": trainer.steps_done, "seed": args.seed, "run": str(run.folder)}
    write_json(run.folder / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_cli(main)
