"""Texts to the tokens of a CLIP text encoder, which conditions a model.

Letters: B texts, L tokens of a text, D their width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from speed_engine.encoders.hub import load_model, load_pretrained, weights_hash
from speed_engine.runtime.checks import UserError


class TextEncoder:
    """A CLIP text model with its tokenizer.

    Args:
        name: folder of both, or their name on the hub.
        device: where it runs.

    Attributes:
        truncated: texts so far that were longer than L tokens and cut.
        metadata: facts about a data set of its tokens.
        identity: SHA-256 of the weights.

    Raises:
        UserError: transformers is missing, cannot load them, or they are not of each other.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._tokenizer = load_pretrained("transformers", "CLIPTokenizer", name)
        self._model = load_model("transformers", "CLIPTextModel", name, device)
        words, embedded = len(self._tokenizer), self._model.config.vocab_size
        if words != embedded:  # without its files, a tokenizer of no words is made
            raise UserError(
                f"text encoder {name!r} has {embedded} embeddings, its tokenizer {words} words; "
                f"the folder needs the tokenizer's files, too (vocab.json, merges.txt)."
            )
        self._device, self._length = device, self._model.config.max_position_embeddings
        self.truncated = 0
        self.metadata = {"text_encoder": name}
        self.identity = weights_hash(self._model)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(B, L, D) float16, the last hidden state."""
        uncut = self._tokenizer(list(texts)).input_ids
        self.truncated += sum(len(ids) > self._length for ids in uncut)
        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        )
        answer = self._model(tokens.input_ids.to(self._device)).last_hidden_state
        return answer.half().cpu().numpy()
