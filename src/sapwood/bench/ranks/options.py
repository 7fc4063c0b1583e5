"""The options of `sapwood bench ranks`. No torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksOptions:
    """What ranks send each other."""

    num_ranks: int = option(2, "Processes that exchange numbers.", unit="ranks")
    rows: str = option("1,4,16,64", "Numbers of rows of each rank, with commas.")
    width: int = option(4096, "Numbers in a row.")
    dtype: str = option("bfloat16", "Of the rows.", choices=("bfloat16", "float32"))
    num_experts: int = option(64, "Experts, over all ranks.", unit="experts")
    num_chosen: int = option(8, "Of these, those that a row goes to.", unit="experts")
    turns: int = option(15, "How often both ways are timed, in turn.", unit="turns")
    calls: int = option(50, "Exchanges in a row that are timed together.", unit="exchanges")
    timeout: float = option(300.0, "How long the ranks may take.", unit="seconds")
    seed: int = option(0, "Seed of the rows.")

    @property
    def sizes(self) -> list[int]:
        return [int(part) for part in self.rows.split(",")]

    def __post_init__(self) -> None:
        check_options(self)
        if not all(part.strip().isdigit() and int(part) > 0 for part in self.rows.split(",")):
            raise ConfigError(f"--rows is {self.rows!r} but must look like 1,4,64")
        if not 2 <= self.num_ranks <= 64:
            raise ConfigError(f"--num-ranks is {self.num_ranks} but must be from 2 to 64")
        if min(self.width, self.turns, self.calls, self.num_experts) < 1 or self.timeout <= 0:
            raise ConfigError(
                "--width, --turns, --calls and --num-experts must be >= 1 and --timeout > 0"
            )
        if self.num_experts % self.num_ranks or not 1 <= self.num_chosen <= self.num_experts:
            raise ConfigError(
                f"{self.num_experts} experts, of which {self.num_chosen} get a row, cannot be "
                f"spread evenly over {self.num_ranks} ranks; change --num-experts, --num-chosen or "
                "--num-ranks"
            )
