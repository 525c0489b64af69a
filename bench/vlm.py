"""Training a vision-language model against transformers' Idefics3: whole or in part, and many questions about an image."""

import copy
import gc
import tempfile
from functools import partial

import torch
import torch.nn as nn

from bench.measure import compare, dtype_suffix, precisions, training_step, transformers_class
from data import scenes
from data.scene_batches import SceneBatches, scene_pixels
from lib.checkpoint import save_pretrained
from lib.loss import chunked_cross_entropy, spare_logits
from lib.memory import peak_bytes
from lib.vlm_parts import SIZES, assemble, train_tokenizer
from lib.vocabulary import resize_token_embeddings
from model import LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration, convert_linears_to_lora
from siglip import SiglipVisionConfig
from vit_scratch import pair

VLM_SIZES = {"222m": ("base-p16-224", "smollm2-135m"), "tiny": ("tiny", "tiny")}  # presets of the tower and of the decoder
VLM_MODES = ("full", "frozen tower", "frozen tower, LoRA", "frozen tower, features given")
TEXT_TOKENS, LORA_RANK = 64, 8


def equal_vlms(size: str) -> tuple[nn.Module, nn.Module]:
    """Ours with random weights, 2 x 2 patches to a token, and transformers' Idefics3 with the same; both on the CPU.
    Raises ValueError for an unknown size."""
    peer = transformers_class("Idefics3ForConditionalGeneration")
    tower, decoder = VLM_SIZES[size]
    text = LLAMA32Config.preset(decoder)
    config = MLLAMAConfig(
        SiglipVisionConfig.preset(tower, vision_use_head=False), text, projector_type="linear", pixel_shuffle=2,
        image_token_id=text.vocab_size - 1,
    )  # fmt: skip
    ours = MllamaForConditionalGeneration(config)
    spare_logits(ours.language_model)  # as finetune_vlm.py does
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder, layout="idefics3")
        return ours, peer.from_pretrained(folder, attn_implementation="sdpa")


def vlm_batch(config: MLLAMAConfig, batch: int) -> dict[str, torch.Tensor]:
    """Random images, each followed by TEXT_TOKENS random tokens; the second half of them is to be learned."""
    image_token, per_image = config.image_token_id, config.text_config.num_image_tokens
    text = torch.randint(0, image_token, (batch, TEXT_TOKENS))
    ids = torch.cat([torch.full((batch, per_image), image_token), text], dim=1)
    labels = ids.clone()
    labels[:, : -(TEXT_TOKENS // 2)] = -100
    return {"pixel_values": torch.randn(batch, 3, *pair(config.vision_config.image_size)), "input_ids": ids, "labels": labels}


def idefics3(model, input_ids, labels, pixel_values=None, vision_features=None):
    """Transformers' forward for the inputs of ours. It takes no features of a tower, so these go through its connector here."""
    if vision_features is None:
        return model(input_ids, pixel_values=pixel_values[:, None], labels=labels, use_cache=False)
    words, images = model.get_input_embeddings()(input_ids), model.model.connector(vision_features)
    embeds = model.model.inputs_merger(input_ids, words, images)
    return model(inputs_embeds=embeds, labels=labels, use_cache=False)


def freeze(model: nn.Module, mode: str) -> nn.Module:
    """Leave to training what the mode trains, in our model or theirs. LoRA comes with the projector."""
    own = isinstance(model, MllamaForConditionalGeneration)
    if mode != "full":
        (model.vision_tower if own else model.model.vision_model).requires_grad_(False)
    if "LoRA" in mode:
        model.requires_grad_(False)
        if own:
            convert_linears_to_lora(model.language_model, LORA_RANK, alpha=2 * LORA_RANK)
        elif has_peft():
            from peft import LoraConfig, inject_adapter_in_model

            targets = r".*text_model\..*_proj"
            inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets), model)
        (model.multi_modal_projector if own else model.model.connector).requires_grad_(True)
    return model


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def vlm_peer(mode: str) -> str:
    if "LoRA" not in mode:
        return "transformers"
    return "transformers with peft" if has_peft() else "transformers, projector only (no peft)"


def vlm_row(mode: str, sides: dict[str, tuple], inputs: dict, dtypes: dict, rounds: int, device, **facts) -> dict:
    """sides: {name: (model on the CPU, its loss from itself and the inputs)}. Beside compare's figures the peak in all: with
    weights, optimiser state and batch, from a copy of the model to the end of its second step."""
    gc.collect()
    inputs = {name: x.to(device) for name, x in inputs.items()}
    steps, total, models, first = {}, {}, {}, {}

    def begin(name, model, loss):
        models[name] = freeze(copy.deepcopy(model).to(device), mode).train()
        steps[name] = training_step(models[name], lambda m: loss(m, **inputs), dtypes.get(name, dtypes["peer"]))
        first[name] = float(steps[name]())  # AdamW makes its state at the end of it; the second step is like all others
        steps[name]()

    batch_bytes = sum(x.nbytes for x in inputs.values())
    for name, side in sides.items():
        total[name] = batch_bytes + peak_bytes(partial(begin, name, *side), device)
    peer = next(name for name in sides if name != "ours")
    if abs(first["ours"] - first[peer]) > (5e-2 if dtype_suffix(dtypes) else 1e-3):
        raise ValueError(f"{mode}: the losses are {first['ours']:g} and {first[peer]:g}: there is nothing to compare")
    parameters = list(models["ours"].parameters())
    row = compare(f"VLM training step, {mode}{dtype_suffix(dtypes)}", steps, len(inputs["labels"]), rounds, device, **facts)
    return {
        **row,
        "dtype": str(dtypes["ours"]).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "peak_total_mib": round(total["ours"] / 2**20, 1),
        "peer_peak_total_mib": round(total[peer] / 2**20, 1),
    }


def bench_vlm(args, device: torch.device) -> list[dict]:
    """Our VLM against transformers' Idefics3: the same weights and optimiser. With features given, as --cache-features trains,
    the idle tower's weights are still counted on both sides."""
    dtypes = precisions(args, device)
    torch.manual_seed(args.seed)
    ours, theirs = equal_vlms(args.size)
    rows = []
    for batch in args.batch:
        inputs = vlm_batch(ours.config, batch)
        with torch.no_grad():
            one = {name: x[:1] for name, x in inputs.items()}
            difference = (ours(**one)["logits"] - idefics3(theirs, **one).logits).abs().max().item()
            if difference > 1e-3:
                raise ValueError(f"the two models differ by {difference:g}: there is nothing to compare")
            features = ours.vision_features(inputs["pixel_values"])
        for mode in VLM_MODES:
            given = dict(inputs)
            if "features" in mode:
                given["vision_features"] = features
                del given["pixel_values"]
            sides = {
                "ours": (ours, lambda model, **inputs: model(**inputs)["loss"]),
                vlm_peer(mode): (theirs, lambda model, **inputs: idefics3(model, **inputs).loss),
            }
            rows.append(vlm_row(mode, sides, given, dtypes, args.rounds, device, size=args.size, batch=batch))
    return rows


# ---- many questions about an image -----------------------------------------------------------------------------------


def bench_questions(args, device: torch.device) -> list[dict]:
    """A step of train_vlm.py's language stage, scenes with twelve questions each: packed rows, in which the questions share the
    image, against transformers' Idefics3 with a padded row and the image for each. Same weights, answers and loss. --size
    smol: 2x2 pixel shuffle, as in bench_vlm, and as many words as SmolLM2 has."""
    vision, text, vocabulary = SIZES[args.size]
    vision, text, tokenizer = SiglipVisionConfig(**vision), LLAMA32Config(**text), train_tokenizer(scenes.corpus(), vocabulary)
    join = {"projector_type": "linear", "pixel_shuffle": 2 if args.size == "smol" else 1}
    model, processor = assemble(vision, text, tokenizer, {}, args.seed, **join)
    if args.size == "smol":
        resize_token_embeddings(model, LLAMA32Config.PRESETS["smollm2-135m"]["vocab_size"])
        model.language_model.token_loss = chunked_cross_entropy
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, layout="idefics3")
        theirs = transformers_class("Idefics3ForConditionalGeneration").from_pretrained(folder, attn_implementation="sdpa")
    models = {"ours": model.to(device), "transformers": theirs.to(device)}
    for each in models.values():
        freeze(each, "frozen tower").train()
    for batch in args.batch:
        batches = SceneBatches(processor, batch, args.seed)
        images = scenes.make_scenes("train", batch, args.seed)
        inputs = {"ours": batches.batch(images), "transformers": padded_rows(batches, images)}
        inputs = {name: {key: value.to(device) for key, value in given.items()} for name, given in inputs.items()}
        losses = {"ours": lambda m, given: m(**given)["loss"],
                  "transformers": lambda m, given: m(**given, use_cache=False).loss}  # fmt: skip
        with torch.no_grad():
            ours, others = (losses[name](models[name], inputs[name]).item() for name in models)
        if abs(ours - others) > 1e-3:
            raise ValueError(f"the two losses are {ours:g} and {others:g}: there is nothing to compare")
        steps = {name: training_step(m, partial(losses[name], given=inputs[name])) for name, m in models.items()}
        for step in steps.values():
            step()
        count = len(inputs["transformers"]["input_ids"])
        rows.append(compare("questions, training step", steps, count, args.rounds, device, size=args.size, batch=count))
    return rows


def padded_rows(batches: SceneBatches, images: scenes.Scenes) -> dict[str, torch.Tensor]:
    """The batch of these images, each question in a row of its own, as transformers takes them."""
    asked = scenes.questions(images, batches.seed, batches.per_scene, batches.mix)
    found = [batches.encoded(turn) for turns in asked for turn in turns]
    longest, pad = max(len(ids) for ids, _ in found), batches.processor.tokenizer.pad_token_id or 0
    columns = zip(*((ids + [pad] * (n := longest - len(ids)), labels + [-100] * n, [1] * len(ids) + [0] * n)
                    for ids, labels in found), strict=True)  # fmt: skip
    rows = dict(zip(("input_ids", "labels", "attention_mask"), map(torch.tensor, columns), strict=True))
    pixels = scene_pixels(batches.processor, images).repeat_interleave(torch.tensor([*map(len, asked)]), dim=0)
    return {**rows, "pixel_values": pixels[:, None]}
