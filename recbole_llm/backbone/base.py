"""A frozen language model as the rest of the package sees it: a decoder, its embeddings, and plain-text encoding.

A language model with an encoder is its base model here, encoder and decoder (:mod:`.encoder_decoder`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from recbole_llm.backbone.encoder_decoder import encodes
from recbole_llm.errors import UserError


class PlainEncoder:
    """Turns text into pieces among which no special or added token can be, whatever the text spells.

    It works on its own copy of a tokenizer. There every added token counts as special, also those that are not marked
    so (an item's own code, a chat marker), and special ones are not looked for in text (``encode_special_tokens``).
    Added runs of white space stay: they are how some tokenizers write plain text. A tokenizer whose model has a
    special token among its ordinary pieces (T5's ``</s>``) would still yield it; such text is cut inside the spelling.

    Args:
        tokenizer: a ``transformers`` tokenizer backed by ``tokenizers`` (a "fast" one).

    Raises:
        UserError: it is not.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer: the model needs a tokenizer.json")
        state = json.loads(backend.to_str())
        markers = [token for token in state["added_tokens"] if token["content"].replace("\u2581", " ").strip()]
        for token in markers:
            token["special"] = True
        state.update(truncation=None, padding=None)
        self.text = json.dumps(state, sort_keys=True)
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.encode_special_tokens = True
        self.forbidden = frozenset(token["id"] for token in markers) | frozenset(tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The pieces' ids of each text, without BOS or EOS; what the vocabulary cannot spell is left out."""
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [
            ids if self.forbidden.isdisjoint(ids) else self._encode_apart(text)
            for ids, text in zip(found, texts, strict=True)
        ]

    def _encode_apart(self, text: str) -> list[int]:
        """Encode text that comes out with a forbidden id, cut in the middle of each such piece so that it cannot form.

        A piece of one character is one that the vocabulary does not have (``<unk>``): it is dropped.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        cuts = {
            (start + end) // 2
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self.forbidden and end - start > 1
        }
        if not cuts:
            return [token for token in encoding.ids if token not in self.forbidden]
        return [
            token
            for start, end in pairwise([0, *sorted(cuts), len(text)])
            for token in self._encode_apart(text[start:end])
        ]


class Backbone:
    """A frozen language model.

    Attributes:
        name: the hub id or folder it came from.
        decoder: the Hugging Face base model, in evaluation mode; no weight of it takes a gradient.
        tokenizer: its ``transformers`` tokenizer, for decoding and special tokens; text is encoded by :meth:`encode`.
        embed_tokens: the decoder's input embeddings, [vocabulary, hidden_size].
        hidden_size: width of the embeddings and of the last hidden states.
        bos_id: id of the token that begins a text; ``None`` for models that have none.
        eos_id: id of the token that ends a text.
        pad_id: id to fill up batches with; the one of EOS for models that have none of their own.
        causal: the whole model around the decoder, with its vocabulary head, where that was asked for.
        encodes: whether an encoder reads prompts and the decoder writes answers.
        tokens_read: positions, padding included, that the model was given so far: what a stage's cost goes by.

    Args:
        decoder: a Hugging Face base model.
        tokenizer: its fast tokenizer.
        name: what to call it in messages.
        causal: the model that the decoder is of, where its head is wanted.

    Raises:
        UserError: the tokenizer is not a fast one, knows no end of text, or has more tokens than the model.
    """

    def __init__(self, decoder: nn.Module, tokenizer: Any, name: str, causal: Any = None) -> None:
        self.name, self.causal = name, causal
        self.decoder = decoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        # nn.Module declares what it does not know as Tensor | Module.
        model: Any = decoder
        self.embed_tokens: nn.Embedding = model.get_input_embeddings()
        self.hidden_size: int = self.embed_tokens.embedding_dim
        if len(tokenizer) > self.embed_tokens.num_embeddings:
            raise UserError(
                f"{name}: its tokenizer has {len(tokenizer)} tokens and the model {self.embed_tokens.num_embeddings}; "
                "they do not belong together"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        eos_id = _first(tokenizer.eos_token_id, model.config.eos_token_id)
        if eos_id is None:
            raise UserError(f"{name}: neither its tokenizer nor its config.json names an eos_token")
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._encoder = PlainEncoder(tokenizer)
        self.tokens_read = 0
        self.encodes = encodes(decoder)
        # What reads: of two halves each is asked by itself.
        for part in (model.get_encoder(), model.get_decoder()) if self.encodes else (decoder,):
            part.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if given is not None:
            self.tokens_read += given.shape[0] * given.shape[1]

    def encode(self, text: str) -> list[int]:
        """The ids of a text's pieces: never a special or added token, no BOS, no EOS.

        Data and prompts alike are plain text here: a title that spells ``</s>`` yields the pieces of those characters.
        Characters that the vocabulary cannot spell at all are left out.
        """
        return self._encoder.encode([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """:meth:`encode` of many texts, in parallel."""
        return self._encoder.encode(list(texts))

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of what :meth:`encode` does."""
        return hashlib.sha256(self._encoder.text.encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of what reads: its configuration, its tokenizer, and a sample of every weight but a head's own.

        A folder may be overwritten and a hub id moved, so a name says too little; hashing every byte of 7 B weights
        would take longer than loading them. Up to 1,024 values spread over each tensor tell two checkpoints apart.
        """
        model: Any = self.decoder
        config = json.loads(model.config.to_json_string(use_diff=False))
        # Where it lies and who read it say nothing of it: a folder that was moved is the same model.
        config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
        told = json.dumps(config, sort_keys=True) + self._encoder.text
        return _sampled(self.decoder.state_dict(), told)

    def head_fingerprint(self) -> str | None:
        """SHA-256 of a sample of the vocabulary head; ``None`` where it is not kept, or is the table of embeddings."""
        head = None if self.causal is None else self.causal.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is self.embed_tokens.weight:
            return None
        return _sampled(head.state_dict(), "head")

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether the first position's state is blind to the second: false for encoders such as BERT."""
        tokens = torch.tensor([[1, 2], [1, 3]], device=self.embed_tokens.weight.device)
        states = self.decoder(input_ids=tokens).last_hidden_state[:, 0].float()
        return torch.allclose(states[0], states[1], rtol=1e-3, atol=1e-4, equal_nan=True)


def _sampled(weights: Mapping[str, Tensor], told: str) -> str:
    """SHA-256 of a text and of up to 1,024 values of each weight."""
    digest = hashlib.sha256(told.encode())
    for name, weight in sorted(weights.items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _first(*ids: int | list[int] | None) -> int | None:
    """The first id given; configs list several where a model has several ends of text."""
    for found in ids:
        if isinstance(found, list):
            found = found[0] if found else None
        if found is not None:
            return found
    return None
