"""What a folder says about generating, as transformers' generate takes it: where answers end, what else changes a greedy one.

    model.generation_config = read_generation_config(folder)     # lib.checkpoint.from_pretrained does it
    stop_tokens(model, tokenizer)                                # ids that end an answer
    rules = LogitRules.of(model, tokenizer)                      # or None: what changes the logits before a token is chosen
    say_unlike(model, tokenizer)                                 # prints what is not done here, in one line

generation_config.json decides where there is one, else config.json, there its text_config behind the rest; for a .gguf file its
header. What is not known to leave a greedy answer alone is named, whatever it is.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.chat_template import OURS
from lib.files import need, read_json, write_json
from lib.layouts.settings import GENERATION

APPLIED = ("eos_token_id", "max_length", "max_new_tokens", "min_length", "min_new_tokens")
RULES = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
# Of sampling, beams, memory and what is returned: nothing that changes one greedy answer of a decoder.
HARMLESS = """temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff bos_token_id pad_token_id
    decoder_start_token_id use_cache cache_implementation cache_config max_cache_len early_stopping length_penalty
    num_beam_groups diversity_penalty output_scores output_logits output_attentions output_hidden_states return_dict_in_generate
    num_return_sequences renormalize_logits remove_invalid_values
    low_memory prefill_chunk_size compile_config disable_compile is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size _from_model_config
    transformers_version""".split()
NEW_TOKENS = 100  # of an answer, unless its folder or the caller says otherwise

# ---- files -------------------------------------------------------------------------------------------------------------


def read_generation_config(path: Path, published: dict | None = None) -> dict:
    """What the files of a folder or a .gguf say, without what they leave open. published: its config.json, if that is read
    already. Raises ValueError for values that make no sense."""
    if path.suffix == ".gguf":
        from lib.gguf_file import read_header

        header = read_header(path, r"tokenizer\.ggml\.eo[st]_token_id")[0]
        ends = sorted(set(header.values()))
        found, where = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}, path
    elif (where := path / "generation_config.json").is_file():
        found = read_json(where)
    else:
        where = path / "config.json"
        published = read_json(where) if published is None else published
        both = {**(published.get("text_config") or {}), **{k: v for k, v in published.items() if v is not None}}
        found = {key: both[key] for key in (*APPLIED, *RULES, *sorted(GENERATION)) if key in both}
        if found.get("max_length") == 20:  # an old default, written out
            del found["max_length"]
    found = {key: value for key, value in found.items() if value is not None}
    check_generation_config(found, where)
    return found


def check_generation_config(found: dict, where) -> None:
    def number(value):
        return type(value) is int and value >= 0

    def ids(value):
        return isinstance(value, list) and all(map(number, value))

    kinds = {
        ("a number", number): ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"),
        ("a list of ids", ids): ("suppress_tokens", "begin_suppress_tokens"),
        ("an id or a list of ids", lambda value: number(value) or ids(value)): ("eos_token_id",),
        ("a list of lists of ids", lambda v: isinstance(v, list) and all(ids(word) and word for word in v)): ("bad_words_ids",),
        ("a number above 0", lambda value: isinstance(value, (int, float)) and value > 0): ("repetition_penalty",),
    }
    for (words, good), keys in kinds.items():
        for key in keys:
            need(key not in found or good(found[key]), where, f"{key} is {found.get(key)!r:.80}: it must be {words}")


def write_generation_config(folder: Path, settings: dict, **more) -> None:
    """generation_config.json. more: further entries, such as pad_token_id; those that are None are left out."""
    more = {key: value for key, value in more.items() if value is not None}
    write_json(Path(folder) / "generation_config.json", settings | more)


def unlike_generate(settings: dict, tokenizer) -> str:
    """In one line, what answers here do not share with transformers' generate from the same folder; "" where they are equal."""
    nothing = (None, False, 0, 1, [], {}, "")
    others = {key: value for key, value in settings.items() if key not in {*APPLIED, *RULES, *HARMLESS}}
    odd = {key: value for key, value in others.items() if value is True or value not in nothing}
    asked = ", ".join(f"{key} = {value!r:.40}" for key, value in odd.items())
    lines = [f"the folder asks for {asked} when it generates, which is not done here"] if asked else []
    if settings and "eos_token_id" not in settings and tokenizer.eos_token:
        lines.append(f"the folder names no eos_token_id: answers end at its tokenizer's {tokenizer.eos_token}")
    return "; ".join(lines)


def say_unlike(model, tokenizer) -> None:
    if unlike := unlike_generate(model.generation_config, tokenizer):
        print(f"[{unlike}]", file=sys.stderr)


# ---- where answers end -------------------------------------------------------------------------------------------------


def stop_tokens(model, tokenizer) -> set[int]:
    """Ids that end an answer: those that its folder names, else the tokenizer's; and the end of a turn in our own templates,
    which runs from before generation_config.json was written do not name."""
    named = getattr(model, "generation_config", {}).get("eos_token_id", tokenizer.eos_token_id)
    found = {*(named if isinstance(named, list) else [named])} - {None}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if tokenizer.chat_template in OURS.values() else None
    return found | ({end} - {None, tokenizer.unk_token_id})


def most_new_tokens(model, prompt_length: int, wanted: int | None = None) -> int:
    """How long an answer may be: as wanted, else as the folder says, else NEW_TOKENS. Raises ValueError where the prompt is as
    long as the folder lets it all be."""
    settings = getattr(model, "generation_config", {})
    if wanted or "max_new_tokens" in settings:
        return wanted or settings["max_new_tokens"]
    whole = settings.get("max_length")
    if whole is None:
        return NEW_TOKENS
    if whole <= prompt_length:
        raise ValueError(
            f"the prompt has {prompt_length} tokens, and the folder's max_length is {whole}: say how many new ones it may have"
        )
    return whole - prompt_length


# ---- which token is chosen ---------------------------------------------------------------------------------------------


@dataclass
class LogitRules:
    """Rules of a folder that change logits, in transformers' order. stop: the ids that end an answer."""

    settings: dict
    stop: list[int]

    @classmethod
    def of(cls, model, tokenizer) -> "LogitRules | None":
        """Those of the model's folder; None where it has none."""
        settings = getattr(model, "generation_config", {})
        found = {key: settings[key] for key in (*RULES, "min_length", "min_new_tokens") if settings.get(key)}
        if found.get("repetition_penalty") == 1:
            del found["repetition_penalty"]
        return cls(found, sorted(stop_tokens(model, tokenizer))) if found else None

    def __call__(self, logits: torch.Tensor, rows: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
        """logits [B, V] of the next token of each of B rows of ids, prompts included, as they are after the rules."""
        logits = logits.float().clone()
        for row, ids, length in zip(logits, rows, prompt_lengths, strict=True):
            if "repetition_penalty" in self.settings:
                penalty, known = self.settings["repetition_penalty"], [i for i in {*ids} if i < len(row)]
                row[known] = torch.where(row[known] < 0, row[known] * penalty, row[known] / penalty)
            row[[i for i in self.banned(ids, length) if i < len(row)]] = float("-inf")
        return logits

    def banned(self, ids: list[int], prompt_length: int) -> set[int]:
        """Ids that may not follow."""
        get, found, new = self.settings.get, set(), len(ids) - prompt_length
        if n := get("no_repeat_ngram_size"):
            last = ids[len(ids) - n + 1 :]
            found.update(ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last)
        for *before, word in get("bad_words_ids", ()):
            ends_so = len(before) <= len(ids) and ids[len(ids) - len(before) :] == before
            found.update([word] if ends_so and (before or word not in self.stop) else [])
        least = get("min_new_tokens", get("min_length", 0) - prompt_length)  # one overrules the other
        found.update(self.stop if new < least else ())
        return found.union(get("suppress_tokens", ()), get("begin_suppress_tokens", ()) if new == 0 else ())
