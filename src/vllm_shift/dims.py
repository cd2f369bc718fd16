"""Rank arithmetic: which ranks form which groups, and which weight shards a rank stores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """Place of one rank in an engine of ``world = sp * tp`` ranks.

    Ranks are laid out as ``rank = t * sp + s``: the ranks of an SP group are consecutive, those of a TP group are
    ``sp`` apart. With this order the shard that rank ``r`` uses in TP mode (TP over all ``world`` ranks) is
    shard ``r`` of vLLM's own numbering, so no head, logit or KV block ever moves when the mode changes.

    Attributes:
        sp: Ulysses sequence parallel degree, S.
        tp: tensor parallel degree inside an SP rank, T.
        rank: this rank, 0 <= rank < sp * tp.

    Raises:
        ValueError: a degree is below 1, or the rank is outside the engine.
    """

    sp: int
    tp: int
    rank: int

    def __post_init__(self) -> None:
        if self.sp < 1 or self.tp < 1:
            raise ValueError(f"parallel degrees must be at least 1, got SP={self.sp}, TP={self.tp}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is outside an engine of {self.world} ranks")

    @property
    def world(self) -> int:
        """Number of ranks of the engine, P; also the TP degree of TP mode."""
        return self.sp * self.tp

    @property
    def sp_rank(self) -> int:
        """Position in the SP group, s: which tokens this rank holds in SP mode, and which slot is its TP shard."""
        return self.rank % self.sp

    @property
    def tp_rank(self) -> int:
        """Position in the TP group, t."""
        return self.rank // self.sp

    @property
    def slots(self) -> range:
        """TP=P shard numbers of the S slots this rank stores; together they are its TP=T shard."""
        first = self.tp_rank * self.sp
        return range(first, first + self.sp)

    @property
    def sp_groups(self) -> list[list[int]]:
        """Ranks of every SP group of the engine."""
        return [list(range(t * self.sp, (t + 1) * self.sp)) for t in range(self.tp)]

    @property
    def tp_groups(self) -> list[list[int]]:
        """Ranks of every TP group of the engine (the groups of SP mode; in TP mode all ranks are one group)."""
        return [list(range(s, self.world, self.sp)) for s in range(self.sp)]

    def local_tokens(self, num_tokens: int) -> int:
        """Rows each rank holds in SP mode for a step of ``num_tokens`` tokens; the last ranks' may be padding."""
        return -(-num_tokens // self.sp)

    def padded_tokens(self, num_tokens: int) -> int:
        """Rows of all ranks of an SP group for such a step, which are those of the folded view: n*S."""
        return self.local_tokens(num_tokens) * self.sp

    def local_slice(self, num_tokens: int) -> slice:
        """Which tokens of such a step this rank holds in SP mode; it may begin or end beyond the last one."""
        rows = self.local_tokens(num_tokens)
        return slice(self.sp_rank * rows, (self.sp_rank + 1) * rows)
