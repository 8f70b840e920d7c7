"""Pairs of linked documents, and as many of unlinked ones with the same documents on each side.

A document that is cited often is so in the negative pairs too: what one side alone tells is the
same for both classes.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable

import numpy as np

from lra.tasks.base import SPLITS

_NEVER = 1 << 30


def split_documents(count: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the documents of each split, 60, 20 and 20 % of them, chosen at random.

    Args:
        count: Number of documents.
        seed: Seed of the choice.

    Returns:
        By split, bool of shape (count,): whether a document is in it. Each is in one.
    """
    order = np.random.default_rng((seed, 0)).permutation(count)
    parts = np.split(order, [count * 6 // 10, count * 8 // 10])
    return {name: np.isin(np.arange(count), part) for name, part in zip(SPLITS, parts, strict=True)}


def make_pairs(
    links: np.ndarray, known: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the links that are positive pairs, and as many negative pairs.

    The cited side of the links is permuted so that no pair is a link in either direction, a
    document with itself, or there twice: at random, then mended by exchanges of two cited
    documents, then along shortest paths, which always ends. Where no permutation has only such
    pairs, as few links as possible stay as they are, and these are no positives.

    Args:
        links: Rows (citing, cited) of document indices, int64 of shape (links, 2), at least one;
            each once, none of a document to itself. Their order matters to what is drawn.
        known: All links there are, those and others, of the same form: none becomes a negative.
        rng: Draws the permutation.

    Returns:
        Positives and negatives, int64 of one shape (pairs, 2), sorted. Each document is as often in
        the first column of one as in that of the other, and likewise in the second.
    """
    citing, cited = links[:, 0], rng.permutation(links[:, 1])
    unfit = _unfit(citing, cited, known)
    _exchange(citing, cited, unfit, known, rng)
    chosen = {*zip(citing[~unfit].tolist(), cited[~unfit].tolist(), strict=True)}
    if unfit.any():
        completion = _Completion(links, known, chosen, cited[unfit].tolist())
        for document in citing[unfit].tolist():
            completion.add(document)
        chosen = completion.pairs()
    linked = {*map(tuple, links.tolist())}
    return _table(linked - chosen), _table(chosen - linked)


def _table(pairs: set[tuple[int, int]]) -> np.ndarray:
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _unfit(citing: np.ndarray, cited: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns which pairs are links, of a document with itself, or repeat one before them."""
    size = known.max() + 1
    codes = citing * size + cited
    both = np.concatenate([known @ [size, 1], known @ [1, size]])
    repeated = np.ones(len(codes), dtype=bool)
    repeated[np.unique(codes, return_index=True)[1]] = False
    return repeated | (citing == cited) | np.isin(codes, both)


def _unlinked(document: int, known: np.ndarray) -> np.ndarray:
    """Returns which documents have no link with one and are not it, bool by index."""
    free = np.ones(known.max() + 1, dtype=bool)
    free[known[known[:, 0] == document, 1]] = False
    free[known[known[:, 1] == document, 0]] = False
    free[document] = False
    return free


def _exchange(
    citing: np.ndarray,
    cited: np.ndarray,
    unfit: np.ndarray,
    known: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Exchanges cited documents, in place, of unfit pairs with any others so that both fit."""
    before = len(unfit) + 1
    while 0 < unfit.sum() < before:  # an exchange may make room for one that was not possible
        before = unfit.sum()
        for i in rng.permutation(np.flatnonzero(unfit)):
            if not unfit[i]:
                continue  # exchanged with one before it
            free_cited = _unlinked(citing[i], known)
            free_cited[cited[~unfit & (citing == citing[i])]] = False
            free_citing = _unlinked(cited[i], known)
            free_citing[citing[~unfit & (cited == cited[i])]] = False
            others = np.flatnonzero(free_cited[cited] & free_citing[citing])
            if free_cited[cited[i]]:
                unfit[i] = False  # the pair that it repeated has been exchanged
            elif len(others):
                j = rng.choice(others)
                cited[i], cited[j] = cited[j], cited[i]
                unfit[i] = unfit[j] = False


class _Completion:
    """Pairs to which others are added, until each document has its number, with fewest links.

    Adding is a shortest path of a minimum-cost flow from citing to cited documents, where a link
    costs 1 (successive shortest paths: Ahuja, Magnanti & Orlin 1993, Network Flows, 9.7).

    Args:
        links: As in ``make_pairs``.
        known: As in ``make_pairs``.
        chosen: The pairs at first, distinct, none a link.
        missing: How many pairs each cited document lacks.
    """

    def __init__(
        self,
        links: np.ndarray,
        known: np.ndarray,
        chosen: Iterable[tuple[int, int]],
        missing: Iterable[int],
    ) -> None:
        self._missing = Counter(missing)
        self._cites, self._linked = defaultdict(set), defaultdict(set)
        for u, v in links.tolist():
            self._cites[u].add(v)
        for u, v in known.tolist():
            self._linked[u].add(v)
            self._linked[v].add(u)
        self._prices = np.full(known.max() + 1, _NEVER)
        self._prices[links[:, 1]] = 0
        self._cited, self._citing = defaultdict(set), defaultdict(set)  # in the chosen pairs
        for u, v in chosen:
            self._cited[u].add(v)
            self._citing[v].add(u)

    def pairs(self) -> set[tuple[int, int]]:
        """Returns the pairs, of which some may be links."""
        return {(u, v) for u, cited in self._cited.items() for v in cited}

    def add(self, source: int) -> None:
        """Gives one more pair to a citing document; others may exchange theirs for that."""
        end, via, left = self._search(source)
        self._missing[end] -= 1
        u, v = via[end], end
        while True:
            self._cited[u].add(v)
            self._citing[v].add(u)
            if u == source:
                return
            v = left[u]
            self._cited[u].remove(v)
            self._citing[v].remove(u)
            u = via[v]

    def _search(self, source: int) -> tuple[int, dict[int, int], dict[int, int]]:
        """Finds a shortest path to a cited document that lacks a pair.

        Returns:
            That document; by cited document, which citing one takes it on the way; by citing
            document, which it gives up for that.
        """
        via, left = {}, {}
        to_citing = {source: 0}
        to_cited = np.full(len(self._prices), _NEVER)
        queue = deque([source])
        while queue:
            u = queue.popleft()
            reached = to_citing[u] + self._prices_for(u)
            for v in np.flatnonzero(reached < to_cited).tolist():
                to_cited[v], via[v] = reached[v], u
                if reached[v] == 0 and self._missing[v]:
                    return v, via, left  # no path costs less: with a pair less, so would the rest
                for other in self._citing[v]:
                    cost = int(reached[v]) - (v in self._cites[other])
                    if cost < to_citing.get(other, _NEVER):
                        to_citing[other], left[other] = cost, v
                        queue.append(other)
        end = min(+self._missing, key=lambda v: (to_cited[v], v))
        return end, via, left

    def _prices_for(self, citing: int) -> np.ndarray:
        """Returns what it costs to pair a document with each that it is not paired with."""
        prices = self._prices.copy()
        prices[[citing, *self._linked[citing]]] = _NEVER
        prices[[*self._cites[citing]]] = 1
        prices[[*self._cited[citing]]] = _NEVER
        return prices
