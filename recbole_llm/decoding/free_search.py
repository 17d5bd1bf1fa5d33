"""Beam search over the whole vocabulary: what a language model writes behind a prompt, whether or not it is an item.

Every prompt is read once and shared by its beams (``shared_cache.py``), and what all of them begin with once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.head import Head
from recbole_llm.decoding.opening import Opening
from recbole_llm.decoding.shared_cache import Reader, SharedPrompts, WholePrompts, shares


class _Beams(NamedTuple):
    """Texts under way.

    Attributes:
        scores: the sum of the log-probabilities of their tokens, float32 [B, K]; -inf where a row has fewer.
        tokens: int64 [B, K, T].
    """

    scores: Tensor
    tokens: Tensor


class _Ended(NamedTuple):
    """Texts that have ended, of each row.

    Attributes:
        scores: a token's mean log-probability of the best of them, float32 [B, K]; -inf where there are fewer.
        tokens: of the best alone, filled up with the end token, int64 [B, longest].
        done: rows that none can join any more, bool [B].
    """

    scores: Tensor
    tokens: Tensor
    done: Tensor


class FreeSearch:
    """Finds the likeliest text that a causal language model writes behind a prompt.

    It is transformers' beam search as it comes (``length_penalty=1``, ``early_stopping=False``): a text that ends among
    the ``beams`` best of a step competes with its mean log-probability, an end token's among them, and a row is done
    when so many have ended and the best one under way, were it to end now, is no better than the worst of them. With
    one beam the likeliest token is taken until it is the end. No text is empty.

    Weights of the head and places of tensors are those of the moment it is made: make a new one after training.

    Args:
        decoder: a Hugging Face base model, in evaluation mode.
        head: its vocabulary head.
        beams: texts under way, at least 1.
        longest: tokens that are written at most, at least 1.
        eos_id: the token that ends a text.
        opening: the tokens that prompts begin with, to be read once; a prompt need not begin with all of them.

    Attributes:
        behind: tokens of beams that are read behind a prompt at most, over all steps.
    """

    def __init__(
        self, decoder: nn.Module, head: Head, *, beams: int, longest: int, eos_id: int, opening: Sequence[int] = ()
    ) -> None:
        self._decoder, self._head, self._beams, self._longest, self._eos = decoder, head, beams, longest, eos_id
        self._shares = shares(decoder)
        self._opening = Opening(decoder, opening) if self._shares else None
        self.behind = beams * (longest - 1)

    @torch.no_grad()
    def __call__(self, prompts: Ragged) -> Ragged:
        """Write.

        Args:
            prompts: token ids, a row a prompt, none of them empty.

        Returns:
            Token ids without the end token, a row a prompt, 1 to ``longest`` each; on the CPU.
        """
        device, rows = self._head.weight.device, len(prompts)
        reader = self._read(prompts.padded(0).to(device), prompts.lengths.to(device))
        scores = torch.zeros(rows, 1, device=device)
        under_way = _Beams(scores, torch.empty(rows, 1, 0, dtype=torch.int64, device=device))
        ended = _Ended(
            torch.full((rows, self._beams), -torch.inf, device=device),
            torch.full((rows, self._longest), self._eos, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )
        for length in range(1, self._longest + 1):
            grown, parents = self._grow(under_way, reader.state)
            ends = grown.tokens[..., -1] == self._eos if length < self._longest else grown.scores > -torch.inf
            ended = self._end(ended, grown, ends)
            under_way, chosen = _best(grown._replace(scores=grown.scores.masked_fill(ends, -torch.inf)), self._beams)
            ended = ended._replace(done=ended.done | self._is_decided(ended, under_way))
            if length == self._longest or ended.done.all():
                break
            reader.step(under_way.tokens[..., -1], parents.gather(1, chosen))
        written = ended.tokens.cpu()
        return Ragged.from_padded(written, (written == self._eos).cumsum(1) == 0)

    def _read(self, ids: Tensor, lengths: Tensor) -> Reader:
        """Read the prompts, int64 [B, P] and [B], with room for the tokens of all their beams."""
        if self._shares:
            return SharedPrompts(self._decoder, ids, lengths, self.behind, self._opening)
        return WholePrompts(self._decoder, ids, lengths)

    def _grow(self, beams: _Beams, states: Tensor) -> tuple[_Beams, Tensor]:
        """The best texts of one token more, twice as many as beams, best first, and which beam each is of [B, 2K].

        Of these at least one beam's worth goes on, as each text under way ends with one token alone.
        """
        added = self._head.everything(states).log_softmax(-1)
        if not beams.tokens.shape[-1]:
            added[..., self._eos] = -torch.inf
        every = (beams.scores.unsqueeze(-1) + added).flatten(1)
        count = min(2 * self._beams, every.shape[1])
        scores, places = every.topk(count)
        # Of a vocabulary of few words.
        scores = functional.pad(scores, (0, 2 * self._beams - count), value=-torch.inf)
        places = functional.pad(places, (0, 2 * self._beams - count))
        parents, tokens = places // added.shape[-1], places % added.shape[-1]
        return _Beams(scores, torch.cat((_of(beams.tokens, parents), tokens.unsqueeze(-1)), dim=-1)), parents

    def _end(self, ended: _Ended, grown: _Beams, ends: Tensor) -> _Ended:
        """Let those join that end and are among the best of the step, bool [B, 2K]."""
        length = grown.tokens.shape[-1]
        joins = ends[:, : self._beams] & ~ended.done.unsqueeze(1)
        means = (grown.scores[:, : self._beams] / length).masked_fill(~joins, -torch.inf)
        mean, place = means.max(1)
        better = mean > ended.scores[:, 0]
        tokens = ended.tokens.clone()
        tokens[better, :length] = _of(grown.tokens, place.unsqueeze(1))[:, 0][better]
        tokens[better, length:] = self._eos
        scores = torch.cat((ended.scores, means), dim=1).topk(self._beams).values
        return ended._replace(scores=scores, tokens=tokens)

    def _is_decided(self, ended: _Ended, under_way: _Beams) -> Tensor:
        """Rows whose ended texts are taken for the best there will be, bool [B]."""
        worst = ended.scores[:, -1]
        if self._beams == 1:
            return worst > -torch.inf
        return (worst > -torch.inf) & (under_way.scores[:, 0] / under_way.tokens.shape[-1] <= worst)


def _of(tokens: Tensor, places: Tensor) -> Tensor:
    """Rows of tokens [B, K, T] by their places, int64 [B, N]: [B, N, T]."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _best(texts: _Beams, count: int) -> tuple[_Beams, Tensor]:
    """The best of texts, and their places [B, count]."""
    scores, places = texts.scores.topk(count)
    return _Beams(scores, _of(texts.tokens, places)), places
