# idunno/coordinator/trash.py: versions that were deleted or have expired, kept until they are purged; and the rules that expire.
#
# Rule 1: an entry is what one command took out of a file. It goes by a restore or by a purge that names it; both are ordered.
# Rule 2: machine time never goes back, so entries lie in the order of their age.
# Rule 3: which versions expire is decided by the leader (`expired` below), and stands in its command: apply chooses nothing.
from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from idunno.base.errors import Exhausted, InvalidArgument
from idunno.coordinator.aged import Aged
from idunno.coordinator.records import Record, VersionRecord
from idunno.coordinator.results import Done

TRASH_VERSIONS_MAX: Final = 1_000_000
"""Versions in the trash. Beyond it the longest deleted are purged at once: a delete never fails for lack of room."""
RULES_MAX: Final = 1_000
RULES_OF_ONE_MAX: Final = 50
"""Of one user, for his own files: others want some too."""
PREFIX_BYTES_MAX: Final = 512
AGE_MS_MAX: Final = 100 * 365 * 86_400_000


class TrashEntry(Record, frozen=True):
    entry: int
    name: str
    versions: tuple[VersionRecord, ...]  # rising
    at_ms: int
    by: str
    expired: bool = False  # by a retention rule, not by a delete


class RetentionRule(Record, frozen=True):
    """How many versions of a file below the prefix are kept, and how long superseded ones; 0: without bound."""

    prefix: str
    owner: str  # whose files; "": everybody's
    versions: int = 0
    age_ms: int = 0


class Trash:
    def __init__(self, entries: tuple[TrashEntry, ...] = (), last: int = 0) -> None:
        self.last = last  # the highest entry number given so far
        self.entries = Aged((entry.entry, entry) for entry in entries)  # their numbers rise
        self.versions = sum(len(entry.versions) for entry in entries)
        self._of: dict[str, dict[int, None]] = {}
        for entry in entries:
            self._of.setdefault(entry.name, {})[entry.entry] = None

    def put(self, name: str, versions: tuple[VersionRecord, ...], at_ms: int, by: str, *, expired: bool) -> None:
        self.last += 1
        self.entries[self.last] = TrashEntry(self.last, name, versions, at_ms, by, expired)
        self._of.setdefault(name, {})[self.last] = None
        self.versions += len(versions)

    def take(self, number: int) -> TrashEntry | None:
        entry = self.entries.pop(number)
        if entry is not None:
            of_name = self._of[entry.name]
            del of_name[number]
            if not of_name:
                del self._of[entry.name]
            self.versions -= len(entry.versions)
        return entry

    def of(self, name: str) -> list[TrashEntry]:
        """Oldest first."""
        return [self.entries[number] for number in self._of.get(name, ())]

    def overflow(self) -> list[TrashEntry]:
        """Take out the oldest entries until the bound is kept."""
        gone: list[TrashEntry] = []
        while self.versions > TRASH_VERSIONS_MAX and len(self.entries) > 1:
            entry = self.take(self.entries.oldest())
            assert entry is not None
            gone.append(entry)
        return gone


class Retention:
    """The rules, by prefix and owner."""

    def __init__(self, rules: tuple[RetentionRule, ...] = ()) -> None:
        self._rules = {(rule.prefix, rule.owner): rule for rule in rules}
        self._lengths = self._lengths_now()

    def _lengths_now(self) -> list[int]:
        """Of prefixes that there are rules for, falling."""
        return sorted({len(prefix) for prefix, _ in self._rules}, reverse=True)

    def rules(self) -> tuple[RetentionRule, ...]:
        """As set."""
        return tuple(self._rules.values())

    def set(self, rule: RetentionRule, version: int) -> Done:
        """Set, replace, or (both limits 0) remove a rule, as machine version `version` does."""
        if len(rule.prefix.encode()) > PREFIX_BYTES_MAX:
            raise InvalidArgument(f"a prefix has at most {PREFIX_BYTES_MAX} bytes")
        if rule.versions < 0 or not 0 <= rule.age_ms <= AGE_MS_MAX:
            raise InvalidArgument(f"{rule.versions} versions for {rule.age_ms} ms cannot be kept: 0 means no bound")
        key = (rule.prefix, rule.owner)
        if self._rules.get(key) == rule:
            return Done(changed=False)
        if not rule.versions and not rule.age_ms:
            gone = self._rules.pop(key, None)
            self._lengths = self._lengths_now()
            return Done(changed=gone is not None)
        of_one = sum(owner == rule.owner for _, owner in self._rules)
        if version >= 2 and key not in self._rules and rule.owner and of_one >= RULES_OF_ONE_MAX:
            raise Exhausted(
                f"{rule.owner} has {RULES_OF_ONE_MAX} retention rules, the most of one user; `idunno retain PREFIX --none` "
                "removes one"
            )
        if key not in self._rules and len(self._rules) >= RULES_MAX:
            raise Exhausted(
                f"there are {RULES_MAX} retention rules, the bound; `idunno retain PREFIX --none` removes one"
            )
        self._rules[key] = rule
        self._lengths = self._lengths_now()
        return Done()

    def rule_for(self, name: str, owner: str) -> RetentionRule | None:
        """The rule with the longest prefix of that name; the owner's own before everybody's."""
        for length in self._lengths:
            if length <= len(name):
                prefix = name[:length]
                found = self._rules.get((prefix, owner)) or self._rules.get((prefix, ""))
                if found is not None:
                    return found
        return None

    def roots(self) -> list[str]:
        """The prefixes of rules that lie below no other, sorted: what is below these, once each, is what rules are about."""
        found: list[str] = []
        for prefix in sorted({prefix for prefix, _ in self._rules}):
            if not found or not prefix.startswith(found[-1]):
                found.append(prefix)
        return found


def expired(versions: Sequence[VersionRecord], rule: RetentionRule, now_ms: int, limit: int) -> tuple[int, ...]:
    """The numbers of the first `limit` versions (rising) that are beyond every limit of the rule; never the last one's.

    A version's age counts from when the next one replaced it, so "as it was a week ago" stays answerable for a week.
    """
    gone = []
    for at in range(min(limit, len(versions) - 1)):
        beyond_count = not rule.versions or at < len(versions) - rule.versions
        beyond_age = not rule.age_ms or versions[at + 1].created_ms < now_ms - rule.age_ms
        if not (beyond_count and beyond_age):
            break  # the later ones are younger
        gone.append(versions[at].version)
    return tuple(gone)
