"""Which example goes to which rank and micro-batch: the derived part of a step, without influence on its gradient.

Every rank gets the same number of micro-batches, the smallest that holds all examples within the budget. Sizes are
evened out by MULTIFIT (Coffman, Garey, Johnson 1978): first-fit decreasing, repeated with the smallest budget that
still needs no more bins. Micro-batches with the same index have similar sizes on all ranks, since ranks wait for each
other there. Deterministic; milliseconds for a thousand examples; every rank computes the whole plan by itself.
"""

from collections.abc import Sequence

from deltakd.base.errors import DataError

Plan = list[list[list[int]]]

# Each halves the interval of budgets; seven is MULTIFIT's usual number, within 1% of the limit of its search.
NUM_HALVINGS = 7


def plan_micro_batches(
    lengths: Sequence[int],
    num_ranks: int,
    tokens_per_micro_batch: int,
    examples_per_micro_batch: int | None,
    padded: bool,
) -> Plan:
    """Return [rank][micro-batch] -> indices into `lengths`; some are empty where there are fewer examples than bins.

    A bin costs the sum of its lengths, or with padding its number of examples times the longest.
    """
    longest = max(lengths)
    refuse_too_long(longest, tokens_per_micro_batch)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))

    def fit(budget: int) -> list[list[int]]:
        return _first_fit(order, lengths, budget, examples_per_micro_batch, padded)

    bins = fit(tokens_per_micro_batch)
    num_micro = -(-len(bins) // num_ranks)
    low, high = longest, tokens_per_micro_batch
    for _ in range(NUM_HALVINGS):
        middle = (low + high) // 2
        tighter = fit(middle)
        if len(tighter) <= num_ranks * num_micro:
            bins, high = tighter, middle
        else:
            low = middle + 1
        if low >= high:
            break
    bins.sort(key=lambda bin_: (-_cost(bin_, lengths, padded), bin_))
    bins += [[] for _ in range(num_ranks * num_micro - len(bins))]
    return [[bins[micro * num_ranks + rank] for micro in range(num_micro)] for rank in range(num_ranks)]


def refuse_too_long(longest: int, tokens_per_micro_batch: int) -> None:
    """Raise DataError if the longest example fits no micro-batch."""
    if longest > tokens_per_micro_batch:
        raise DataError(
            f"train.tokens_per_micro_batch: {tokens_per_micro_batch:,} tokens do not hold the longest example, "
            f"{longest:,} tokens. Write {longest:,} or more, or a smaller data.max_tokens."
        )


def _first_fit(
    order: Sequence[int], lengths: Sequence[int], budget: int, most: int | None, padded: bool
) -> list[list[int]]:
    """Put examples, longest first, into the first bin that holds them within the budget."""
    bins: list[list[int]] = []
    costs: list[int] = []
    for index in order:
        for at, bin_ in enumerate(bins):
            grown = costs[at] + (lengths[bin_[0]] if padded else lengths[index])
            if grown <= budget and (most is None or len(bin_) < most):
                bin_.append(index)
                costs[at] = grown
                break
        else:
            bins.append([index])
            costs.append(lengths[index])
    return bins


def _cost(bin_: Sequence[int], lengths: Sequence[int], padded: bool) -> int:
    return len(bin_) * lengths[bin_[0]] if padded else sum(lengths[index] for index in bin_)
