"""Attention weights of Hugging Face's causal models other than GPT-2, by their own transformers."""
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from pretrained import OWN, model_type

LONGEST = 512  # tokens of context where none is asked for: all layers' weights are held at once


def is_foreign(folder):
    """Whether this is a folder whose config.json is neither of GPT-2 nor of hf_export.py."""
    return model_type(folder) not in ("gpt2", OWN)


def open_foreign(folder, text, tokenizer="", T=0):
    """
    (name of the architecture, function of x (B, T) that gives the attention weights of its layers,
    L of (B, H, T, T), the tokens of the file `text` without special ones, T) of a model's folder.

    tokenizer: another folder or tokenizer.json than the one beside the weights. T: 0 for as many
    tokens as the model takes, at most LONGEST. Raises ValueError, a sentence, if transformers is
    not there or fails, and, from the function, if a model gives no causal attention weights.
    """
    if not find_spec("transformers"):
        raise ValueError(f"{folder} is no GPT-2: reading it needs transformers, "
                         "pip install transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                     dtype=torch.float32)
        if tokenizer.endswith(".json"):
            encoding = PreTrainedTokenizerFast(tokenizer_file=os.path.expanduser(tokenizer))
        else:
            encoding = AutoTokenizer.from_pretrained(tokenizer or folder)
        content = Path(text).expanduser().read_bytes().decode()  # with its line ends as they are
        tokens = np.array(encoding(content, add_special_tokens=False)["input_ids"])
    except Exception as e:  # transformers raises whatever a model's files make it raise
        raise ValueError(f"{folder} with {text}: {type(e).__name__}: {e}") from e
    most = getattr(model.config, "max_position_embeddings", None) or LONGEST
    if T > most or len(tokens) and tokens.max() >= model.config.vocab_size:
        raise ValueError(f"{folder} takes {most} tokens below {model.config.vocab_size}, and not "
                         f"{T} up to {tokens.max()}: another --block_size or --tokenizer")

    def weights(x):
        attentions = model(x, output_attentions=True, use_cache=False).attentions
        if not attentions or any(A is None for A in attentions):
            raise ValueError(f"{folder} has layers that give no attention weights")
        for A in attentions:
            if A.triu(1).any() or (A.sum(-1) - 1).abs().max() > 1e-3:
                raise ValueError(f"{folder} has attention that looks ahead, or doesn't sum to one")
        return attentions

    return type(model).__name__, weights, tokens, T or min(most, LONGEST)
