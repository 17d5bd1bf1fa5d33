"""FMLP-Rec: learnable filters over the positions of a history in the place of self-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from recbole.model.layers import FeedForward
from recbole.utils import InputType
from torch import nn

from recbole_llm import compat
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.model.transformer import accelerate, embed, encode_by_length

with compat.anomaly_mode_kept():
    from recbole.model.abstract_recommender import SequentialRecommender

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

FILTERS = ("original", "causal")
LOSSES = ("BCE", "CE")

# Of the filters' initial weights: a number in the authors' code, whatever initializer_range is.
FILTER_STD = 0.02


class FilterLayer(nn.Module):
    """A learnable filter over positions, one for each feature, with dropout, residual and normalisation.

    A product of spectra is a circular convolution, here with the kernel ``k = irfft(W)`` of as many steps as there are
    positions: ``y[t] = sum_s k[(t - s) mod L] x[s]``, so every position sees every other one, later ones too. The
    causal filter is the same kernel without its way around, ``y[t] = sum_{s <= t} k[t - s] x[s]``.

    Args:
        length: positions, L.
        width: features, H.
        dropout: share of the filtered features that is zeroed.
        eps: of the layer normalisation.
        causal: whether no position sees a later one.
    """

    def __init__(self, length: int, width: int, dropout: float, eps: float, causal: bool) -> None:
        super().__init__()
        self.length, self.causal = length, causal
        # Real and imaginary parts, so that optimizers and checkpoints meet real numbers only.
        self.complex_weight = nn.Parameter(torch.randn(1, length // 2 + 1, width, 2) * FILTER_STD)
        self.out_dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def kernel(self) -> torch.Tensor:
        """The filter in the time domain, ``[L, H]``: the weight of an item by how many positions ago it was."""
        return torch.fft.irfft(torch.view_as_complex(self.complex_weight[0]), n=self.length, dim=0)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The filter alone.

        Args:
            x: ``[B, L, H]``; the causal filter takes fewer than L positions too.

        Returns:
            Of the shape of ``x``.
        """
        if not self.causal:
            weight = torch.view_as_complex(self.complex_weight)
            spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * weight
            return torch.fft.irfft(spectrum, n=self.length, dim=1, norm="ortho")
        steps = x.size(1)
        # As many zeros as positions behind both: what would come around at the front lands in them.
        room = 2 * steps
        spectrum = torch.fft.rfft(x, n=room, dim=1) * torch.fft.rfft(self.kernel()[:steps], n=room, dim=0)
        return torch.fft.irfft(spectrum, n=room, dim=1)[:, :steps]

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Filter, dropout, residual and normalisation.

        Args:
            x: as for :meth:`mix`.
            positions: int64 ``[B, P]``, those whose output is wanted; ``None``: all.

        Returns:
            ``[B, P, H]``, or of the shape of ``x``.
        """
        mixed = self.mix(x)
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, x.size(-1))
            mixed, x = mixed.gather(1, index), x.gather(1, index)
        return self.LayerNorm(self.out_dropout(mixed) + x)


class FilterBlock(nn.Module):
    """A filter layer and a feed-forward layer.

    Args:
        config: RecBole's ``Config``, see :class:`FMLP`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, dropout, eps = config["hidden_size"], config["hidden_dropout_prob"], config["layer_norm_eps"]
        length, causal = config["MAX_ITEM_LIST_LENGTH"], config["filter"] == "causal"
        self.filter_layer = FilterLayer(length, width, dropout, eps, causal)
        self.feed_forward = FeedForward(width, config["inner_size"], dropout, config["hidden_act"], eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, L, H]`` to the same, or to ``[B, P, H]`` at positions int64 ``[B, P]``."""
        return self.feed_forward(self.filter_layer(x, positions))


class FMLP(SequentialRecommender):
    """FMLP-Rec (Zhou et al., "Filter-enhanced MLP is All You Need for Sequential Recommendation", WWW 2022).

    ``filter: original`` is the authors' filter. It is not causal, and so only a row's last position may be trained: one
    row a prefix, whose next item is held against one negative. The kernel goes around all MAX_ITEM_LIST_LENGTH
    places, so it matters where the empty ones are: as in the authors' code the items stand at the end, whichever way
    the rows come, and the empty places before them take part with the embedding of item 0, which training never moves,
    and with those of their positions. A user's scores depend on his own items and on MAX_ITEM_LIST_LENGTH alone.

    ``filter: causal`` has the same parameters (see :class:`FilterLayer`). Its items stand at the start and the empty
    places behind them, which no item sees, so each position has the output that its prefix has alone.

    Deviations: feed-forward, initial values and position embeddings are RecBole's, which are the authors' too; the last
    block computes only the position that is looked at; ``loss_type: CE`` is not the authors'.

    Args:
        config: RecBole's ``Config``; ``filter`` and ``loss_type``, beside the sizes that SASRec has too.
        dataset: the train data set.

    Raises:
        UserError: an unknown ``filter`` or ``loss_type``.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        for key, choices in (("filter", FILTERS), ("loss_type", LOSSES)):
            if config[key] not in choices:
                hint = did_you_mean(str(config[key]), choices)
                raise UserError(f"{key} should be {' or '.join(choices)}, but is {config[key]!r}{hint}")
        self.causal, self.loss_type = config["filter"] == "causal", config["loss_type"]
        width, std = config["hidden_size"], config["initializer_range"]
        self.item_embedding = nn.Embedding(self.n_items, width, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.blocks = nn.ModuleList(FilterBlock(config) for _ in range(config["n_layers"]))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        accelerate(self)

    def embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The first block's input, ``[B, L, H]`` for item ids ``[B, L]``."""
        return embed(self, item_seq)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """The output at each sequence's last item.

        Args:
            item_seq: int64 ``[B, L]``, oldest item first, padded with 0 on the right.
            item_seq_len: int64 ``[B]``, at least 1.

        Returns:
            ``[B, H]``.
        """
        if self.causal:
            last = (item_seq_len - 1).unsqueeze(1)
            return encode_by_length(self._encode, item_seq, item_seq_len, last).squeeze(1)
        aligned = self.at_the_end(item_seq, item_seq_len)
        return self._encode(aligned, torch.full_like(item_seq_len, self.max_seq_length - 1).unsqueeze(1)).squeeze(1)

    def at_the_end(self, item_seq: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Rows padded on the right as rows padded on the left.

        Args:
            item_seq: int64 ``[B, W]``.
            lengths: int64 ``[B]``, at most MAX_ITEM_LIST_LENGTH.

        Returns:
            int64 ``[B, MAX_ITEM_LIST_LENGTH]``, the last item of each row in the last place.
        """
        places = torch.arange(self.max_seq_length, device=lengths.device) - self.max_seq_length
        source = places + lengths.unsqueeze(1)
        return torch.where(source >= 0, item_seq.gather(1, source.clamp(min=0)), 0)

    def _encode(self, item_seq: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(item_seq)
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        return self.blocks[-1](hidden, positions)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Mean loss of the rows' next items.

        BCE is the authors' ``-log s(x+) - log(1 - s(x-))``, CE a softmax over all items.

        Args:
            interaction: item ids ``[B, L]``, their lengths ``[B]``, the next items ``[B]`` and, for BCE, negatives
                ``[B]``.

        Returns:
            The loss, a scalar.
        """
        output, wanted = self._last(interaction), interaction[self.POS_ITEM_ID]
        if self.loss_type == "CE":
            return F.cross_entropy(F.linear(output, self.item_embedding.weight), wanted)
        refused = self._score(output, interaction[self.NEG_ITEM_ID])
        return (F.softplus(-self._score(output, wanted)) + F.softplus(refused)).mean()

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of the given items as the next ones, ``[B]``."""
        return self._score(self._last(interaction), interaction[self.ITEM_ID])

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of all items as the next one, ``[B, n_items]``."""
        return F.linear(self._last(interaction), self.item_embedding.weight)

    def _last(self, interaction: Interaction) -> torch.Tensor:
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    def _score(self, output: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return (output * self.item_embedding(items)).sum(dim=-1)
