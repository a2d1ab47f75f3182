"""Texts to the tokens of a CLIP text encoder, which conditions a model.

Needs the package transformers; only weights in safetensors are read.

Letters: B texts, L tokens of a text, D their width.
"""

from collections.abc import Sequence

import numpy as np
import torch


@torch.inference_mode()
def encode_texts(texts: Sequence[str], name: str) -> np.ndarray:
    """(B, L, D) float16, the encoder's last hidden state; longer texts are cut.

    Args:
        texts: B of them.
        name: of the text model with its tokenizer: a folder, or its name on the hub.

    Raises:
        ValueError: transformers is missing, or cannot load it.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError("texts need transformers: pip install speed-engine[prepare].") from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        model = CLIPTextModel.from_pretrained(name, use_safetensors=True).eval()
    except Exception as error:  # of many kinds, by library, network and content
        raise ValueError(f"text encoder {name!r} cannot be loaded: {error}") from error
    length = model.config.max_position_embeddings
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return model(tokens.input_ids).last_hidden_state.half().numpy()
