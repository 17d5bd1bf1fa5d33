"""Language models with an encoder: it reads the prompt, and the decoder writes the answer (T5 and its like).

Which of the two kinds a language model is, the model itself says; readers and searches follow from that.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020,
arXiv 1910.10683.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Whose decoder's layers are known: what they are given for positions, and where the prompt's states go.
KNOWN = ("t5", "mt5")


def encodes(model: Any) -> bool:
    """Whether a Hugging Face model reads with an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def base_of(model: Any) -> Any:
    """A language model without its vocabulary head.

    Args:
        model: a Hugging Face language model with its head.

    Returns:
        Its base model; of T5, whose class has none inside, one made of the same encoder, decoder and embeddings.
    """
    if not encodes(model) or model.base_model is not model:
        return model.base_model
    # Collaborative models come by this file too, and start without this import, which takes as long as all the others.
    from transformers import AutoModel

    with torch.device("meta"):
        base = AutoModel.from_config(model.config, attn_implementation=model.config._attn_implementation)
    base.shared, base.encoder, base.decoder = model.shared, model.encoder, model.decoder
    return base


def text_states(model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """What a language model makes of texts: its last states, the encoder's where there is one.

    Args:
        model: a Hugging Face base model.
        ids: filled up on the right with any token, int64 ``[B, T]``.
        lengths: int64 ``[B]``.

    Returns:
        ``[B, T, H]``; behind a text's end of no meaning.
    """
    if not encodes(model):
        # Under a causal mask no token of a text sees the filling.
        states: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return states
    own = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device).unsqueeze(1)
    read: Tensor = model.get_encoder()(input_ids=ids, attention_mask=own).last_hidden_state
    return read


class AnswerReader:
    """Reads the states from which answers are told: prompts by the encoder, answers by the decoder.

    The counterpart of :class:`~recbole_llm.backbone.packed.PackedReader`. What a row learns is its answer, one run of
    labels at its end. Prompts that are alike in a batch are read once; rows are filled up to the longest prompt and to
    the longest answer of their batch, so batches should be of like lengths.

    Args:
        model: a Hugging Face base model with encoder and decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        config: Any = model.config
        self._start: int = config.decoder_start_token_id

    def states(self, ids: Tensor, rows: Tensor, places: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Last states of the decoder.

        Args:
            ids: prompts with their answers behind, int64 ``[B, T]``, filled up on the right with any token; on the CPU.
            rows: int64 ``[L]``, ascending; each row comes at least once.
            places: int64 ``[L]``, for each label the place before its own. The first of a row is the prompt's last.
            device: the model's, where it is not the CPU.

        Returns:
            ``[L, H]``, in the model's type.
        """
        device = ids.device if device is None else device
        counts = torch.bincount(rows, minlength=len(ids))
        firsts = places[counts.cumsum(0) - counts]
        columns = torch.arange(int(firsts.max()) + 1)
        # A token of no vocabulary behind the end, so that equal rows are equal prompts.
        prompts = ids[:, : len(columns)].masked_fill(columns > firsts.unsqueeze(1), -1)
        prompts, owners = prompts.unique(dim=0, return_inverse=True)
        own = (prompts >= 0).to(device)
        read = self._model.get_encoder()(input_ids=prompts.clamp(min=0).to(device), attention_mask=own)
        # The decoder begins with a token of its own, and the last label is read from nowhere.
        steps = torch.arange(int(counts.max()))
        behind = (firsts.unsqueeze(1) + steps).clamp(max=ids.shape[1] - 1)
        answers = ids.gather(1, behind)
        answers[:, 0] = self._start
        owners = owners.to(device)
        states = self._model.get_decoder()(
            input_ids=answers.to(device), encoder_hidden_states=read.last_hidden_state[owners],
            encoder_attention_mask=own[owners], use_cache=False,
        ).last_hidden_state  # fmt: skip
        found: Tensor = states[rows.to(device), (places - firsts[rows]).to(device)]
        return found
