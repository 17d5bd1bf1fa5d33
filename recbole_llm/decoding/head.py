"""The vocabulary head of a language model, read only as far as a search needs it.

Over 150,000 tokens the head is most of what a small language model costs. A search needs the logits of few tokens, and
of the rest only the logarithm of the sum of their exponentials, which is added up piece by piece here, so that logits
of the whole vocabulary lie in memory for a free search alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.encoder_decoder import encodes
from recbole_llm.errors import UserError

# Logits made at a time. On a CPU they fit into its second cache, where adding them up is nearly free.
CPU_PIECE = (256, 2048)
PIECE = (4096, 65_536)
# How far a head that is read rightly may be from the model's own logits, relative to the largest, by bytes a number.
TOLERANCE = {8: 1e-4, 4: 1e-4, 2: 3e-2}


@dataclass(frozen=True)
class TokenSet:
    """Some tokens of the vocabulary, made by :meth:`Head.tokens`.

    Attributes:
        ids: the language model's, int64 [n], no two alike.
        rows: of the head, float32 [n, hidden].
        bias: float32 [n], if the head has one.
        places: where they are in each piece of the vocabulary, int64 each; ``None`` where a piece has none.
    """

    ids: Tensor
    rows: Tensor
    bias: Tensor | None
    places: tuple[Tensor | None, ...]


class Head:
    """Logits of a language model's vocabulary: ``cap(scale * (states @ weight.T + bias))``.

    It prepares the weights when it is made and does not follow them afterwards.

    Args:
        weight: [V, hidden].
        bias: [V].
        scale: what Granite and Cohere multiply their logits with.
        softcap: Gemma 2's ``softcap * tanh(logits / softcap)``.
        dtype: in which sums over the vocabulary are computed; the weight's own if ``None``. Logits of single tokens are
            always in float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.weight, self.bias, self.scale, self.softcap = weight.detach(), bias, scale, softcap
        self.dtype = weight.dtype if dtype is None else dtype
        self._block, width = CPU_PIECE if weight.device.type == "cpu" else PIECE
        self._starts = range(0, len(weight), width)
        self._pieces = [piece.to(self.dtype) for piece in self.weight.split(width)]
        self._biases = [None] * len(self._pieces) if bias is None else [b.to(self.dtype) for b in bias.split(width)]
        # torch multiplies float32 by MKL, which takes AMD's processors for old ones, unless a matrix is oneDNN's.
        self._mkldnn = (
            weight.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        if self._mkldnn:
            self._pieces = [piece.contiguous().to_mkldnn() for piece in self._pieces]
            self._biases = [None if part is None else part.to_mkldnn() for part in self._biases]

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype | None = None) -> Head:
        """The head of a Hugging Face language model, tied or not.

        Args:
            model: with its vocabulary head.
            dtype: as for the class.

        Raises:
            UserError: the model does to its logits what we do not know.
        """
        output, config = model.get_output_embeddings(), model.config.get_text_config()
        if output is None:
            raise UserError(f"a {config.model_type} has no vocabulary head")
        weight, bias = _weights(output, config.hidden_size)
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        if getattr(config, "scale_decoder_outputs", False):
            # T5's, where input and output share a table.
            scale *= config.hidden_size**-0.5
        softcap = getattr(config, "final_logit_softcapping", None)
        made = cls(weight, bias, scale=scale, softcap=softcap, dtype=dtype)
        made._check(model)
        return made

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        count = min(8, len(self.weight))
        given = torch.arange(count, device=self.weight.device).unsqueeze(0)
        read: dict[str, Any] = {"input_ids": given}
        asked = dict(read)
        if encodes(model):
            own = model.get_encoder()(input_ids=given).last_hidden_state
            read, asked = read | {"encoder_hidden_states": own}, {"encoder_outputs": (own,), "decoder_input_ids": given}
        states = decoder_of(model)(**read).last_hidden_state[0]
        tokens = self.tokens(torch.linspace(0, len(self.weight) - 1, min(64, len(self.weight))).long())
        wanted = model(**asked).logits[0][:, tokens.ids].float()
        error = (self.logits(states, tokens) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        if not error <= TOLERANCE[self.weight.element_size()]:
            raise UserError(f"the logits of a {model.config.model_type} are not those of its head alone")

    def tokens(self, ids: Tensor) -> TokenSet:
        """Prepare some tokens of the vocabulary.

        Args:
            ids: int64 [n], no two alike.

        Raises:
            ValueError: two are alike, or one is not of the vocabulary.
        """
        ids = ids.to(self.weight.device)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self.weight)):
            raise ValueError(f"token ids {int(ids.min())} to {int(ids.max())} in a vocabulary of {len(self.weight)}")
        if len(ids.unique()) < len(ids):
            raise ValueError("two tokens are one of the language model's")
        width = self._starts.step
        places = [ids[(ids >= start) & (ids < start + width)] - start for start in self._starts]
        bias = None if self.bias is None else self.bias[ids].float()
        return TokenSet(ids, self.weight[ids].float(), bias, tuple(found if len(found) else None for found in places))

    def _capped(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, states: Tensor, tokens: TokenSet) -> Tensor:
        """Logits of some tokens.

        Args:
            states: the decoder's last, [..., hidden].
            tokens: from :meth:`tokens`.

        Returns:
            float32 [..., n].
        """
        with torch.autocast(states.device.type, enabled=False):
            return self._capped(functional.linear(states.float(), tokens.rows, tokens.bias))

    def everything(self, states: Tensor) -> Tensor:
        """Logits of the whole vocabulary, of few states.

        Args:
            states: the decoder's last, [..., hidden].

        Returns:
            float32 [..., V].
        """
        flat = states.reshape(-1, states.shape[-1]).to(self.dtype)
        made = torch.empty(len(flat), len(self.weight), device=flat.device)
        with torch.autocast(flat.device.type, enabled=False):
            for logits, piece, block in self._logits_by_piece(flat):
                start = self._starts[piece]
                made[block, start : start + logits.shape[1]] = logits
        return made.view(*states.shape[:-1], -1)

    def log_sum_of_rest(self, states: Tensor, tokens: TokenSet, about: Tensor) -> Tensor:
        """The logarithm of the sum of exp(logit) over all tokens but some.

        Args:
            states: the decoder's last, [..., hidden].
            tokens: those left out, from :meth:`tokens`.
            about: what is taken off logits before they are raised, float32 [...]: the largest logit of the tokens left
                out, so that a sum that comes to nothing is nothing beside theirs. On a CPU it saves looking for the
                largest of all; where it is too small by far, that is done after all.

        Returns:
            float32 [...]; -inf where nothing is left.
        """
        flat, about = states.reshape(-1, states.shape[-1]).to(self.dtype), about.reshape(-1, 1)
        with torch.autocast(flat.device.type, enabled=False):
            if flat.device.type != "cpu":
                found = self._safe_sums(flat, tokens)
            else:
                found = self._quick_sums(flat, tokens, about)
                if (found == torch.inf).any():
                    found = self._safe_sums(flat, tokens)
        return found.view(states.shape[:-1])

    def _quick_sums(self, states: Tensor, tokens: TokenSet, about: Tensor) -> Tensor:
        totals = torch.zeros(len(states))
        offsets = about.to(self.dtype)
        for logits, piece, block in self._logits_by_piece(states):
            raised = logits.sub_(offsets[block]).exp_()
            if (places := tokens.places[piece]) is not None:
                raised.index_fill_(1, places, 0.0)
            totals[block] += raised.sum(1, dtype=torch.float32)
        return totals.log_() + offsets[:, 0]

    def _safe_sums(self, states: Tensor, tokens: TokenSet) -> Tensor:
        totals = torch.full((len(states),), -torch.inf, device=states.device)
        for logits, piece, block in self._logits_by_piece(states):
            if (places := tokens.places[piece]) is not None:
                logits.index_fill_(1, places, -torch.inf)
            totals[block] = torch.logaddexp(totals[block], logits.float().logsumexp(1))
        return totals

    def _logits_by_piece(self, states: Tensor) -> Iterator[tuple[Tensor, int, slice]]:
        """Logits in the head's type, of which piece of the vocabulary they are, and whose rows."""
        blocks = [slice(start, start + self._block) for start in range(0, len(states), self._block)]
        rows = [states[block].to_mkldnn() if self._mkldnn else states[block] for block in blocks]
        for number, (piece, bias) in enumerate(zip(self._pieces, self._biases, strict=True)):
            for block, given in zip(blocks, rows, strict=True):
                made = functional.linear(given, piece, bias)
                yield self._capped(made.to_dense() if self._mkldnn else made), number, block


@torch.no_grad()
def _weights(output: Any, hidden: int) -> tuple[Tensor, Tensor | None]:
    """The weight [V, hidden] and bias [V] of a linear head, also of one that adapters are wrapped around."""
    if type(output) is nn.Linear:
        return output.weight, output.bias
    # Where an adapter keeps what it adds is its own affair; what it makes of unit vectors is the sum of all.
    some = next(output.parameters())
    bias = output(torch.zeros(1, hidden, device=some.device, dtype=some.dtype))[0]
    units = torch.eye(hidden, device=some.device, dtype=some.dtype)
    return (output(units) - bias).T.contiguous(), bias


def decoder_of(model: Any) -> nn.Module:
    """The decoder of a Hugging Face language model: what yields its last hidden states, without the head.

    Args:
        model: with its vocabulary head.
    """
    return model.get_decoder()
