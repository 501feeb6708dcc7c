"""The rows of a privacy ledger, field by field: what each may be, and which may follow which.

A hash chain says that nobody changed a row after it was written, not that an honest program wrote it: whoever can
write the file can write the hashes too. So every number has a range, and no row can lower what was charged.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.errors.ranges import MOST_ROWS, MOST_STEPS, AccountantName
from fedlr.privacy.chain import Row
from fedlr.privacy.grid import ReleaseNoise
from fedlr.privacy.units import PERSON, unit_of_text

VERSION = 1
RandomnessKind = Literal["seeded", "os"]

Count = Annotated[int, Field(ge=0, lt=2**53)]
RowsPerPerson = Annotated[int, Field(ge=1, le=MOST_ROWS)]
NumSteps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """No unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Chained(Section):
    """What every row has."""

    prev: Sha256
    hash: Sha256


class HeaderRow(Chained):
    """Row 0."""

    kind: Literal["header"]
    version: Literal[1]
    unit: str
    relation: str
    rows_per_person: RowsPerPerson | None = None
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    accountant: AccountantName
    dataset_id: Annotated[str, Field(min_length=1)]
    randomness: RandomnessKind

    @model_validator(mode="after")
    def _is_a_unit(self) -> Self:
        unit = unit_of_text(self.unit)
        if self.relation != unit.relation:
            raise ValueError(f"the relation {unit.relation!r} with this unit")
        if (self.rows_per_person is None) != (unit is not PERSON):
            raise ValueError(f"rows_per_person with the unit {PERSON.text!r} alone")
        return self


class MechanismRow(Section):
    """The constants of a mechanism; their ranges are `Mechanism`'s."""

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    divisor: float
    release_noise: ReleaseNoise = "float"
    separation: NumSteps = 1
    bands: NumSteps = 1
    clip_quantile: float = 0.0
    count_noise: float = 0.0


class ReserveRow(Chained):
    """A charge, before any private example is read."""

    kind: Literal["reserve"]
    round_index: Count
    client_id: Count
    num_steps: NumSteps
    mechanism: MechanismRow
    task: Sha256 | None = None
    announced_steps: NumSteps | None = None


class RepeatRow(Chained):
    """The same computation again, under the same noise."""

    kind: Literal["repeat"]
    round_index: Count
    client_id: Count


class SettleRow(Chained):
    """How much of a charge was used."""

    kind: Literal["settle"]
    round_index: Count
    client_id: Count
    steps_taken: Count


class CohortRow(Chained):
    """What a row says of several clients at once: the same as a row for each of them, in this order."""

    round_index: Count
    client_ids: Annotated[list[Count], Field(min_length=1)]


class ReserveCohortRow(CohortRow):
    """A charge of each client."""

    kind: Literal["reserve_cohort"]
    num_steps: NumSteps
    mechanism: MechanismRow
    task: Sha256 | None = None
    announced_steps: NumSteps | None = None


class RepeatCohortRow(CohortRow):
    """The same computations again."""

    kind: Literal["repeat_cohort"]


class SettleCohortRow(CohortRow):
    """How much of each client's charge was used."""

    kind: Literal["settle_cohort"]
    steps_taken: Count


class TornRow(Chained):
    """What a crash left of a last line."""

    kind: Literal["torn"]
    fragment: str


AnyRow = HeaderRow | ReserveRow | RepeatRow | SettleRow | TornRow | ReserveCohortRow | RepeatCohortRow | SettleCohortRow
_ADAPTER: TypeAdapter[AnyRow] = TypeAdapter(Annotated[AnyRow, Field(discriminator="kind")])
_ZERO = "0" * 64


COHORT = "_cohort"  # how the kind of a row about several clients ends


def of_clients(row: Row, client_ids: Sequence[int]) -> list[Row]:
    """Return the rows that say of each client what `row`, without a client, says: at most one.

    >>> of_clients({"kind": "settle", "round_index": 0, "steps_taken": 2}, [4, 7])
    [{'kind': 'settle_cohort', 'round_index': 0, 'steps_taken': 2, 'client_ids': [4, 7]}]
    """
    if len(client_ids) < 2:
        return [{**row, "client_id": client} for client in client_ids]
    # The clients last: of a line that was cut off, most can still be read.
    return [{**row, "kind": f"{row['kind']}{COHORT}", "client_ids": list(client_ids)}]


def by_client(row: Row) -> list[Row]:
    """Return the rows of single clients that a checked row stands for; one of no cohort stands for itself."""
    if not row["kind"].endswith(COHORT):
        return [row]
    shared = {key: value for key, value in row.items() if key != "client_ids"}
    shared["kind"] = row["kind"].removesuffix(COHORT)
    return [{**shared, "client_id": client} for client in row["client_ids"]]


def checked(row: Row) -> Any:
    """Return a row of the ledger, every field of which is in its range.

    Raises:
        InputError: which names the field and its value.
    """
    try:
        return _ADAPTER.validate_python({"prev": _ZERO, "hash": _ZERO, **row})
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        if found["type"].startswith("union_tag"):
            raise InputError(f"Expected a row of a known kind, got {shown(row.get('kind'))}") from None
        _, *where = found["loc"]  # the first is the kind
        key, wanted = ".".join(map(str, where)), found["msg"][0].lower() + found["msg"][1:]
        raise InputError(
            f"Expected {key} of a row of kind {row['kind']!r} as it is written ({wanted}), got {shown(found['input'])}"
        ) from None
