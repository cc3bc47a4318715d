# idunno/consensus/terms.py: what the core must know of its log: the term and the size of every entry.
#
# Rule 1: compact, because it covers the whole log: four bytes an entry, and one pair for each term.
# Rule 2: payloads are not here: they are the log's (log.py).
from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import repeat

from idunno.base.ids import Index, Term


class Terms:
    """Terms and payload sizes of the entries after `base` (0, or an index that a snapshot covers) up to `last`."""

    def __init__(self, base: int = 0, base_term: int = 0) -> None:
        self.base = self.last = Index(base)
        self._starts: list[int] = [base]  # first index of each run of equal terms; terms never fall
        self._terms: list[int] = [base_term]
        self._sizes = array("I")

    @property
    def base_term(self) -> Term:
        return Term(self._terms[0])

    @property
    def last_term(self) -> Term:
        return Term(self._terms[-1])

    def term(self, index: int) -> Term | None:
        """The term of the entry at `index`; of base itself its own (0 at the very start); None outside."""
        if not self.base <= index <= self.last:
            return None
        if index >= self._starts[-1]:  # nearly always
            return Term(self._terms[-1])
        return self._of(index)

    def each(self, first: int, last: int) -> Iterable[Term]:
        """The terms of `first` to `last`, which must exist."""
        if first >= self._starts[-1]:  # nearly always
            return repeat(Term(self._terms[-1]), last - first + 1)
        return (self._of(index) for index in range(first, last + 1))

    def _of(self, index: int) -> Term:
        return Term(self._terms[bisect_right(self._starts, index) - 1])

    def size(self, index: int) -> int:
        """Payload bytes of the entry at `index`, which must exist."""
        return self._sizes[index - self.base - 1]

    def append(self, term: Term, size: int) -> None:
        self.extend(term, (size,))

    def extend(self, term: Term, sizes: Sequence[int]) -> None:
        """Entries of these sizes, one or more, all of one term."""
        assert term >= self._terms[-1], f"term {term} after {self.last_term}"
        if term != self._terms[-1]:
            self._starts.append(self.last + 1)
            self._terms.append(term)
        self._sizes.extend(sizes)
        self.last = Index(self.last + len(sizes))

    def truncate(self, first: int) -> None:
        """Forget the entries from `first` on."""
        assert self.base < first <= self.last, f"cut at {first} of {self.base}..{self.last}"
        del self._sizes[first - self.base - 1 :]
        self.last = Index(first - 1)
        while self._starts[-1] >= first:
            self._starts.pop()
            self._terms.pop()

    def compact(self, index: int) -> None:
        """Forget the entries up to `index`, which becomes the base."""
        term = self.term(index)
        assert term is not None, f"{index} is outside of {self.base}..{self.last}"
        run = bisect_right(self._starts, index) - 1
        del self._sizes[: index - self.base]
        del self._starts[:run], self._terms[:run]
        self._starts[0], self.base = index, Index(index)

    def reset_base_term(self, term: int) -> None:
        """The base's term becomes known."""
        self._terms[0] = term

    def reset(self, base: int, base_term: int) -> None:
        """Nothing but the base, in place of what was there."""
        self.base = self.last = Index(base)
        self._starts, self._terms, self._sizes = [base], [base_term], array("I")

    def last_agreeing(self, index: int, term: int) -> tuple[Index, Term]:
        """The last entry at or before `index` whose term is at most `term`, with its term: where a log may still agree with
        one that has `term` at `index` (terms never fall along a log)."""
        at = max(min(index, self.last), self.base)
        run = bisect_right(self._starts, at) - 1
        while run > 0 and self._terms[run] > term:
            at = max(self._starts[run] - 1, self.base)
            run -= 1
        return Index(at), Term(self._terms[run])

    def batch_end(self, first: int, bytes_max: int, entries_max: int) -> tuple[Index, int]:
        """The last entry, and the payload bytes, of a batch from `first` within the bounds; one entry at least."""
        if first == self.last:
            return self.last, self._sizes[-1]
        end = min(self.last, first + entries_max - 1)
        whole = sum(self._sizes[first - self.base - 1 : end - self.base])
        if whole <= bytes_max:  # nearly always
            return Index(end), whole
        last, size = first, self.size(first)
        while last < end and size + self.size(last + 1) <= bytes_max:
            last += 1
            size += self.size(last)
        return Index(last), size
