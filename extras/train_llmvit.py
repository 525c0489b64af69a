"""Train a language model to classify images (llmvit.py): an encoder learns to say what it sees in the model's own words.

    python -m extras.train_llmvit                               digits, a small language model from scratch, 2 minutes
    python -m extras.train_llmvit --dataset mnist --data DIR --lm DISTILBERT --lm-layers 2 --lora 8 --max-seconds 540
    python -m extras.train_llmvit ... --qlora                   the same with the language model in 4 bits
    python -m extras.train_llmvit ... --random-lm               the same shape with random weights: what did it know?
    python -m extras.train_llmvit ... --no-lm                   the same encoder and no language model at all
    python -m extras.train_llmvit ... --embedder knn|max|direct   k words mixed, one word, or vectors that are no words
    python -m extras.train_llmvit --out runs/llmvit-digits --resume         go on after Ctrl-C, exactly

--lm is a LLaMA-like, a GPT-2, a BERT or a DistilBERT, in any form that lib/checkpoint.py reads (llmvit_backbones.py). On a CPU
the search for the nearest of SmolLM2's 49,152 words takes longer than all else: --words keeps the first so many whole words.

Writes runs/llmvit-DATASET/: the model (config.json, model.safetensors; generate.py classifies with it), metrics.jsonl,
curves.png, confusion.png, samples.png and words.png: which word each patch became. The last line printed is JSON.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn

from data.augment import PRESETS as AUGMENTATIONS
from data.augment import Augment, normalize_images
from data.batches import Batches, fit_batch_size
from data.datasets import DATASETS, ImageDataset, evenly
from extras.llmvit import EMBEDDERS, ENCODERS, LLMVIT, METRICS, EmbedderConfig, EncoderConfig
from extras.llmvit_backbones import KINDS, MODEL_TYPE, WordList, load_language_model, make_backbone, save_run, word_matrix
from lib import figures
from lib.classification import accuracy, default_patch, draw_answers, load_data, predict
from lib.cli import argument_parser, fraction, not_negative_float, not_negative_int, positive_float, positive_int, run_cli
from lib.files import write_json
from lib.optim import cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.run import Run
from model import Llama3ForCausalLM, LLAMA32Config
from vit_scratch import pair

# ---- settings --------------------------------------------------------------------------------------------------------

# What the images of a data set ask for. Every value has a flag that replaces it.
RECIPES = {
    "digits": {"image_size": 16, "patch_size": 4, "batch_size": 64, "epochs": 40},  # 8x8 pixels, enlarged once
    "mnist": {"image_size": 28, "patch_size": 7, "epochs": 2, "augment": "none"},  # in so few passes none is needed
    "fashion-mnist": {"image_size": 28, "patch_size": 7, "epochs": 4},
    "cifar10": {"image_size": 32, "patch_size": 4, "epochs": 30},
    "folder": {"image_size": None, "patch_size": None, "epochs": 30},
}
# The one dial: the encoder, and the language model where none is given, whose "words" mean what training makes them mean.
SIZES = {
    "tiny": (  # for tests: it learns next to nothing
        {"hidden_dim": 16, "num_encoder_layers": 1, "nhead": 2},
        {"vocab_size": 64, "hidden_size": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 48},
    ),
    "small": (
        {"hidden_dim": 128, "num_encoder_layers": 2, "nhead": 4},
        {"vocab_size": 256, "hidden_size": 128, "n_heads": 4, "n_layers": 2, "hidden_dim": 384},
    ),
    "medium": (
        {"hidden_dim": 192, "num_encoder_layers": 4, "nhead": 6},
        {"vocab_size": 512, "hidden_size": 256, "n_heads": 4, "n_layers": 4, "hidden_dim": 768},
    ),
}
SCRATCH = {"max_position_embeddings": 4096, "rope_base": 10000.0, "tie_word_embeddings": True}


def parse_args(argv=None):
    parser = argument_parser(__doc__, lr=1e-3, batch_size=None)
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="digits")
    add("--size", choices=list(SIZES), default="small", help="of the encoder, and of a new language model; tiny: for tests")
    add("--image-size", type=positive_int, help="pixels; default the data set's own")
    add("--patch-size", type=positive_int, help="pixels; images that it does not divide are padded; default as the data set")
    add("--split-seed", type=not_negative_int, default=0, help="another test part, where the data come without one")
    add("--augment", choices=list(AUGMENTATIONS), help="default: made for the data set")
    add("--encoder", choices=list(ENCODERS), default="vit", help="vit: patches see each other; patch_embed: a linear layer")
    add("--dropout", type=fraction, default=0.0, help="in the encoder")
    add("--embedder", choices=list(EMBEDDERS), default="knn", help="k nearest words mixed, the nearest one, or no words")
    add("--k", type=positive_int, default=4, help="words that knn mixes")
    add("--temperature", type=positive_float, default=0.1, help="of knn, in units of the words' standard deviation "
        "over all dimensions: the lower, the more the nearest word counts")  # fmt: skip
    add("--metric", choices=METRICS, default="cosine_similarity", help="by which max finds its word")
    add("--embedding-loss", type=not_negative_float, default=0.0, help="weight of the distance between the distributions of "
        "vectors and words")  # fmt: skip
    add("--lm", metavar="SOURCE", help="a LLaMA-like, GPT-2, BERT or DistilBERT: run, folder, .gguf file or hub name; "
        "default: a small one, untrained")
    add("--lm-layers", type=positive_int, metavar="N", help="keep its first N layers; default: all")
    add("--words", type=not_negative_int, default=4000, metavar="N", help="keep the first N whole words of its vocabulary, or "
        "what there is of them, as the dictionary; 0: all of its tokens (slow on a CPU)")  # fmt: skip
    add("--pooling", choices=["last", "mean"], default="mean", help="what the classification head reads of it")
    add("--random-lm", action="store_true", help="the shape of --lm with random weights")
    add("--no-lm", action="store_true", help="no language model: the mean of the encoder's patches is classified")
    add("--lora", type=positive_int, metavar="RANK", help="train low-rank corrections of the language model, not itself")
    add("--lora-alpha", type=positive_float, help="default: twice the rank")
    add("--qlora", action="store_true", help="the language model's matrices in 4 bits under LoRA (of rank 8 unless given)")
    add("--frozen-steps", type=not_negative_int, default=0, help="steps before the language model learns, too")
    add("--freeze-lm", action="store_true", help="the language model never learns")
    add("--lr-lm", type=positive_float, default=1e-4, help="peak learning rate of a pretrained language model; LoRA: --lr")
    add("--muon-lr", type=not_negative_float, default=0.02, help="Muon's, for matrices that start untrained; 0: AdamW for all")
    add("--eval-count", type=positive_int, default=1000, help="test images of an evaluation on the way")
    args = parser.parse_args(argv)
    for key, value in {"augment": args.dataset, "batch_size": 32, **RECIPES[args.dataset]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.lora = args.lora or (8 if args.qlora else None)
    if args.random_lm and not args.lm:
        parser.error("--random-lm needs --lm, whose shape it takes (without --lm the language model is random anyway)")
    if args.no_lm and (args.lora or args.freeze_lm or args.frozen_steps):
        parser.error("--no-lm leaves no language model for --lora, --qlora, --freeze-lm or --frozen-steps")
    if args.lora_alpha and not args.lora:
        parser.error(f"--lora-alpha {args.lora_alpha:g} is of LoRA: add --lora or --qlora")
    if args.no_lm and args.embedding_loss:
        parser.error("--no-lm leaves no words for --embedding-loss")
    if args.freeze_lm and args.lora:
        parser.error("--freeze-lm and --lora or --qlora: what these correct would never learn; choose one")
    if args.freeze_lm and args.frozen_steps:
        parser.error("--freeze-lm is for ever, --frozen-steps for a while: choose one")
    args.embedder = "direct" if args.no_lm else args.embedder
    args.out = args.out or f"runs/llmvit-{args.dataset}{'-no-lm' if args.no_lm else '-random' if args.random_lm else ''}"
    return args


# ---- model -----------------------------------------------------------------------------------------------------------


def language_model(args) -> tuple[nn.Module, list[str] | None]:
    """--lm, or a small one from scratch, and how its words are spelled."""
    if not args.lm:
        settings = {**SIZES[args.size][1], **SCRATCH}
        settings["n_layers"] = args.lm_layers or settings["n_layers"]
        return Llama3ForCausalLM(LLAMA32Config(**settings)), [f"#{i}" for i in range(settings["vocab_size"])]
    lm, words = load_language_model(args.lm, args.lm_layers, None if args.no_lm else args.words)
    return (type(lm)(lm.config) if args.random_lm else lm), words


def build(args, channels: int, size: tuple[int, int], K: int) -> tuple[LLMVIT, dict]:
    """The model, and what config.json says of it. The encoder starts the same with every language model and without one."""
    torch.manual_seed(args.seed)
    lm, words = language_model(args)
    settings = {"kind": "none", "num_labels": K}
    encoder = EncoderConfig(
        args.encoder, size[0] if size[0] == size[1] else size, args.patch_size or default_patch(size), channels,
        embed_dim=lm.config.hidden_size, dropout=args.dropout, **SIZES[args.size][0],
    )  # fmt: skip
    embedder = EmbedderConfig(args.embedder, args.k, similarity_metric=args.metric)
    if not args.no_lm:
        kind = next(kind for kind, (model, _) in KINDS.items() if isinstance(lm, model))
        lora = {"rank": args.lora, "alpha": args.lora_alpha or 2.0 * args.lora} if args.lora else None
        settings |= {"kind": kind, "config": asdict(lm.config), "pooling": args.pooling, "lora": lora, "qlora": args.qlora}
        embedder.temperature = args.temperature * word_matrix(lm).var(dim=0).sum().sqrt().item()
        # Words of a trained model keep their meaning; those that nothing reads have no gradient.
        word_matrix(lm).requires_grad_(not args.lm and args.embedder != "direct")
    options = {
        "frozen_backbone_steps": args.frozen_steps * args.grad_accum,  # it counts passes
        "always_freeze_backbone": args.freeze_lm,
        "embedding_loss_weight": args.embedding_loss,
    }
    backbone = make_backbone(settings, lm)
    torch.manual_seed(args.seed)
    model = LLMVIT(backbone, encoder, embedder, **options)
    config = {"model_type": MODEL_TYPE, "backbone": settings, "embedder": asdict(embedder), "options": options}
    return model, {**config, "words": None if args.no_lm else words}


def describe(model: LLMVIT, args, config: dict) -> list[str]:
    """The lines that are printed before the first step."""
    encoder, (rows, columns) = model.config, model.config.padding
    padded = f", {rows} rows and {columns} columns added as zeros" if rows or columns else ""
    grid = f"{encoder.grid[0]}x{encoder.grid[1]} patches of {pair(encoder.patch_size)[0]} pixels{padded}"
    lines = [f"encoder: {args.encoder}, {count(model.encoder):,} parameters, {grid}"]
    if args.no_lm:
        return [*lines, "no language model: the mean of the patches is classified"]
    origin = "from scratch" if not args.lm else f"{'as' if args.random_lm else 'from'} {args.lm}"
    how = f"LoRA of rank {args.lora}" if args.lora else "frozen" if args.freeze_lm else "trained"
    how += " over 4-bit matrices" if args.qlora else f" after {args.frozen_steps} steps" if args.frozen_steps else ""
    words = len(config["words"])
    return [
        *lines,
        f"embedder: {args.embedder}" + ("" if args.embedder == "direct" else f" among {words:,} words"),
        f"language model {origin}{' with random weights' if args.random_lm else ''}: {count(model.model):,} parameters, {how}",
    ]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def groups(model: LLMVIT, args) -> list[dict]:
    """What is trained, and how fast; see parameter_groups. What --frozen-steps holds back for now is among it."""
    frozen = model.frozen and not args.freeze_lm
    if frozen:
        model.unfreeze_backbone()
    found = parameter_groups(model.encoder, args.weight_decay, args.lr, args.muon_lr or None)
    found += parameter_groups(model.model.score, args.weight_decay, args.lr)
    if not args.no_lm:
        trained = args.lm and not args.random_lm
        lr, muon = (args.lr, None) if args.lora else (args.lr_lm, None) if trained else (args.lr, args.muon_lr or None)
        found += parameter_groups(model.model.decoder, args.weight_decay, lr, muon)
    if frozen:
        model.freeze_backbone()
    return found


# ---- evaluation --------------------------------------------------------------------------------------------------------


def part_of(dataset: ImageDataset, count: int) -> ImageDataset:
    """So many images, evenly spread."""
    chosen = evenly(len(dataset), count)
    return replace(dataset, images=dataset.images[chosen], labels=dataset.labels[chosen])


def answers(model: LLMVIT, dataset: ImageDataset, mean, std, run: Run) -> torch.Tensor:
    """Probabilities [N, K]."""
    return predict(lambda images: model(images)["logits"], dataset, mean, std, run)


def draw_words(folder: Path, model: LLMVIT, test: ImageDataset, spelled: list[str], mean, std) -> dict:
    """words.png: which word each patch of some images is nearest to. Returned: how many words are used over some test images,
    and which most often."""
    order = (test.labels.cpu() * len(test) + torch.arange(len(test))).argsort()  # some of each class
    shown = order[evenly(len(test), 12)]
    device = next(model.parameters()).device
    some = normalize_images(part_of(test, 200).images.to(device), mean, std)
    uses = model.words(some)["ids"].flatten().bincount(minlength=len(spelled))
    pixels = normalize_images(test.images[shown].to(device), mean, std)
    grids = [[[words[0].strip() for words in row] for row in grid] for grid in model.words(pixels, WordList(spelled))["words"]]
    said = model(pixels)["logits"].argmax(dim=1).tolist()
    good = [i == j for i, j in zip(said, test.labels[shown].tolist(), strict=True)]
    captions = [f"{test.classes[i]}" if ok else f"{test.classes[i]}, is {test.classes[j]}"
                for i, j, ok in zip(said, test.labels[shown].tolist(), good, strict=True)]  # fmt: skip
    figures.word_grid(
        test.images[shown].cpu(), grids, pair(model.config.patch_size), captions, folder / "words.png",
        "the word that each patch is nearest to", good=good,
    )  # fmt: skip
    most = [spelled[i].strip() for i in uses.argsort(descending=True)[:10].tolist() if uses[i]]
    return {"words_used": int((uses > 0).sum()), "most_used_words": most}


# ---- the recipe --------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    if args.frozen_steps and run.world_size > 1:
        raise ValueError("--frozen-steps needs a single process: what is not trained at first is not shared between several")

    # ---- data ----
    train, test = load_data(args, run)
    fit_batch_size(run, len(train), "images")
    mean, std = train.mean_std()
    augment = Augment(AUGMENTATIONS[args.augment], mean, std)
    K, size = len(train.classes), tuple(train.images.shape[-2:])
    batches = Batches(len(train), args.batch_size // run.world_size, args.seed, rank=run.rank, world_size=run.world_size)
    quick = part_of(test, args.eval_count)

    # ---- model and optimiser ----
    model, config = build(args, train.images.shape[1], size, K)
    model = run.place(model)
    trained = groups(model, args)
    optimizers = make_optimizers(trained)
    total_steps = max(1, round(args.epochs * len(batches)))
    run.print(
        f"{args.dataset}: {len(train):,} training and {len(test):,} test images of {size[0]}x{size[1]}, {K} classes\n"
        + "".join(f"{line}\n" for line in describe(model, args, config))
        + f"{total_steps:,} steps of {args.batch_size} images {run}"
    )

    # ---- loop ----
    for step in run.steps("", total_steps, batches, optimizers):
        if run.evaluates(step):
            with run.evaluation():
                run.log(test_accuracy=accuracy(answers(model, quick, mean, std, run), quick.labels))
        set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
        generator = run.seed_step(step)
        for images, targets in run.parts(augment.parts(train, next(batches), args.grad_accum, generator)):
            with run.autocast():
                loss = run.model(images, targets)["loss"] / args.grad_accum
            run.scaler.scale(loss).backward()
            run.loss += loss.detach()
        run.clip_and_step(optimizers, args.clip)

    # ---- evaluation, and what the run leaves ----
    if run.is_main and not args.dry_run:
        with run.evaluation():
            probabilities = answers(model, test, mean, std, run)
            test_accuracy = accuracy(probabilities, test.labels)
            run.log(test_accuracy=test_accuracy)
            save_run(run.folder, model, config, train.classes, mean, std, vars(args))
            draw_answers(run.folder, test, probabilities, run.metrics.read())
            words = {} if args.no_lm else draw_words(run.folder, model, test, config["words"], mean, std)
        result = {
            "test_accuracy": round(test_accuracy, 4),
            "seconds": round(run.seconds, 1),
            "seconds_per_step": round(run.seconds / run.steps_done, 4),
            "parameters": count(model),
            "trained_parameters": sum(p.numel() for group in trained for p in group["params"]),
            "steps": run.steps_done,
            "seed": args.seed,
            **words,
            "run": str(run.folder),
        }
        write_json(run.folder / "result.json", result)
        print(json.dumps(result))
    run.finish()


if __name__ == "__main__":
    run_cli(main)
