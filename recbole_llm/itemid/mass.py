"""How much of a distribution over items stands below a node, as a logarithm: for next-token distributions of scores.

:meth:`Trie.mass` is a difference of prefix sums and as good as the total; below about 1e-10 of it the logarithm is
coarse. :func:`log_masses` is exact wherever the node stands, and costs a pass over all nodes.
"""

from __future__ import annotations

import torch

from recbole_llm.itemid.trie import Trie


def log_mass(trie: Trie, sums: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """The logarithm of what stands below each node.

    Args:
        trie: whose nodes.
        sums: of values that are not negative, from :meth:`Trie.sums`, [I + 1] for all nodes or [B, I + 1].
        nodes: int64 [...], or [B, ...].

    Returns:
        Of the nodes' shape; -inf where it is 0, and for -1.
    """
    return trie.mass(sums, nodes).clamp(min=0).log()


def log_masses(trie: Trie, scores: torch.Tensor) -> torch.Tensor:
    """The logarithm of the sum of exp(score) over the items below every node, each relative to its own largest.

    A child's less its parent's is the log-probability of the child's token given the prefix, under the softmax over
    items; these add up along an item's tokens to the item's log-softmax (the chain rule), whatever the scores' range.

    Args:
        trie: whose nodes.
        scores: of every item by internal id, float [B, n_items].

    Returns:
        float [B, N], of the scores' type; -inf below nothing but -inf.
    """
    if not len(trie.order):
        return scores.new_full((len(scores), len(trie)), -torch.inf)
    ordered = scores[:, trie.order].T.contiguous()  # [I, B]
    found = ordered.new_full((len(trie), len(scores)), -torch.inf)
    leaves = trie.leaf_nodes
    starts, ends = trie.ranges(leaves)
    found[leaves] = _log_sums(ordered, ends - starts)
    bounds = trie.level_bounds
    for low, high, end in zip(bounds[-3::-1], bounds[-2:0:-1], bounds[:1:-1]):
        # The children of one depth's nodes are the nodes of the next; leaves have none and keep what they have.
        combined = _log_sums(found[high:end], trie.child_offsets[low : high + 1].diff())
        torch.maximum(found[low:high], combined, out=found[low:high])
    return found.T


def _log_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of runs of rows: values [rows, B] and lengths [runs] to [runs, B]; -inf for an empty run."""
    most = torch.segment_reduce(values, "max", lengths=lengths, axis=0, initial=-torch.inf)
    base = torch.where(most > -torch.inf, most, 0)
    shares = (values - base.repeat_interleave(lengths, dim=0, output_size=len(values))).exp()
    return torch.segment_reduce(shares, "sum", lengths=lengths, axis=0).log() + base
