"""What a run is trained on: token files or a small text, and how rows are made of them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token files, or a small text, and how samples are made of them.

    Args:
        prefix: pairs made by `megatree data preprocess`, without .bin and .idx: one, several, or
            weights and prefixes in turn (0.7 web 0.3 books).
        valid_prefix: pairs to evaluate on, in the same forms; these and prefix are then used whole.
        epochs: how often each of several prefixes is passed over, in place of weights.
        text: instead of files, a text small enough to be encoded at every start: "demo" for the
            novels inside the package, "mock" for numbers that count upwards, or a file: .jsonl (a
            document per line, in "text") or .txt (one document); either may end in .xz.
        kind: gpt lays documents end to end and cuts them into rows; packed puts whole documents
            side by side; chat reads what `megatree data chat` wrote, and only what the assistant
            says is learned.
        split: shares of the documents, in their order, for training, validation and test.
        seed: of the order of samples.
        samples: training samples that the order is made for; 0 for as many as the run takes when
            it begins. A run that goes on for longer deals the same samples again, in other orders.
        cache: folder for the indices, which all ranks must see; by default index/ in
            checkpoint.dir, and without that each rank builds its own in memory.
        deadline_s: seconds that ranks wait for the one that builds an index or encodes a text.
        tokenizer: what made the ids: "demo" for the 512 entries inside the package, a
            tokenizer.json, a folder with a vocabulary, or KIND:PATH; by default the one that is
            noted beside the files.
        eod: spelling of the entry that ends a document, where the tokenizer's files do not say.
        reset_positions: count positions from 0 after each end of a document (gpt).
        reset_attention: let no token see what is before the last end of a document (gpt).
        eod_mask_loss: do not learn the token after an end of a document (gpt).
        fim_rate: share of the documents rearranged for fill-in-the-middle (gpt).
        fim_marks: spellings of the marks before prefix, middle and suffix.
        packing: packed, chat: several documents in a row where they fit, or one.
        too_long: packed, chat: stop at, drop or cut a document that does not fit a row.
    """

    prefix: tuple[str, ...] = ()
    valid_prefix: tuple[str, ...] = ()
    epochs: tuple[float, ...] = ()
    text: str = ""
    kind: Literal["gpt", "packed", "chat"] = "gpt"
    split: str = "969,30,1"
    seed: int = 1234
    samples: int = 0
    cache: str = ""
    deadline_s: float = 3600.0
    tokenizer: str = ""
    eod: str = ""
    reset_positions: bool = False
    reset_attention: bool = False
    eod_mask_loss: bool = False
    fim_rate: float = 0.0
    fim_marks: tuple[str, str, str] = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    packing: Literal["packed", "single"] = "packed"
    too_long: Literal["stop", "drop", "cut"] = "stop"

    def __post_init__(self) -> None:
        if self.prefix and self.text:
            raise ValueError(
                f"data.text: {self.text!r} beside {len(self.prefix)} words of data.prefix. "
                'Set data.text to "" to train on files, or leave data.prefix out.'
            )
        for name, given, needs in (
            ("valid_prefix", self.valid_prefix, self.prefix),
            ("epochs", self.epochs, self.prefix),
            ("kind", self.kind == "chat", self.prefix or not self.text),
        ):
            if given and not needs:
                raise ValueError(f"data.{name}: needs files. Name them in data.prefix.")
        for name in ("reset_positions", "reset_attention", "eod_mask_loss", "fim_rate"):
            if getattr(self, name) and self.kind != "gpt":
                raise ValueError(
                    f"data.{name}: rows of kind {self.kind!r} do not know it. "
                    f"Leave it out, or set data.kind to gpt."
                )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"data.seed: {self.seed} is out of range. Use one in [0, 2**32).")
        if self.samples < 0 or self.deadline_s <= 0:
            raise ValueError(
                f"data: samples {self.samples} and deadline_s {self.deadline_s:g} count things. "
                "Give at least 0 samples, and a second or more."
            )
        if not 0.0 <= self.fim_rate <= 1.0:
            raise ValueError(f"data.fim_rate: {self.fim_rate} is no share. Use one in [0, 1].")

    @property
    def entries(self) -> tuple[str, ...]:
        """What rows hold beside tokens, labels and weights; the model must read it."""
        if self.kind != "gpt":
            return ("positions", "segments") if self.packing == "packed" else ()
        asked = {"positions": self.reset_positions, "segments": self.reset_attention}
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def holds_out(self) -> bool:
        """Whether something is left for validation."""
        shares = self.split.replace("/", ",").split(",")
        return bool(self.valid_prefix) or (len(shares) > 1 and shares[1].strip(" 0.") != "")
