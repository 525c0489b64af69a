"""Which settings of a published config.json are accepted: those that a layout reads, those that change no logits, and those
that are implemented for one value only. Of any other value there is an error; of a setting that is not known, one line.

transformers takes some settings that no config class of its own declares, so a list of the declared ones would not be enough.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import cache

GENERATION = frozenset(  # how to generate, as transformers 4 wrote it here: for who generates (lib/generation.py)
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size"
    " exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length"
    " no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty"
    " suppress_tokens temperature top_k top_p typical_p".split()
)
# Names, token ids, precisions, forms of the output, training: nothing that a logit depends on.
HARMLESS = GENERATION | frozenset(
    "model_type architectures dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash"
    " attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal"
    " _flash_attn_2_enabled transformers.js_config unsloth_fixed unsloth_version quantization_config note"
    " bos_token_id eos_token_id pad_token_id _pad_token_id sep_token_id mask_token_id decoder_start_token_id"
    " image_token_id image_token_index ignore_index tokenizer_class prefix task_specific_params"
    " return_dict use_return_dict return_dict_in_generate output_attentions output_hidden_states output_scores use_cache"
    " chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder is_decoder"
    " cross_attention_hidden_size id2label label2id num_labels _num_labels problem_type finetuning_task"
    " initializer_range initializer_factor attention_dropout dropout hidden_dropout hidden_dropout_prob drop_path_rate"
    " attention_probs_dropout_prob embd_pdrop attn_pdrop resid_pdrop gradient_checkpointing use_reentrant_checkpointing"
    " neftune_noise_alpha pretraining_tp logit_scale_init_value layerscale_value".split()
)
NEUTRAL = {"is_encoder_decoder": (False,), "pruned_heads": ({}, None), "add_cross_attention": (False,)}  # of every model


def check_settings(
    published: Mapping, kind: str, read: Iterable[str], neutral: Mapping[str, tuple], harmless: str = ""
) -> None:
    """Go through the settings of a model (or of a part of one) of this kind. read: those that are implemented; neutral: the
    values for which a setting changes nothing; harmless: more that never do. Raises ValueError for any other value."""
    allowed = {**NEUTRAL, **neutral}
    known = {*HARMLESS, *harmless.split(), *read}
    for key, value in published.items():
        if key in allowed and value not in allowed[key]:
            values = " or ".join(map(repr, allowed[key]))
            raise ValueError(f"{key} is {value!r:.80}: only {values} is implemented for a {kind}")
    if unknown := sorted(str(key) for key in published.keys() - allowed.keys() - known):
        say_once(f"config.json of a {kind} has {', '.join(unknown):.300}, which is not known here and has no effect")


@cache
def say_once(line: str) -> None:
    """A line to stderr, once in a process."""
    print(line, file=sys.stderr)
