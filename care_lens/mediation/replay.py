"""The former place of ``care_lens.lvlm.replay``, where forward passes are run on from their middle."""

from care_lens.core.renames import moved

__getattr__ = moved(
    __name__,
    {"BLOCK_INPUT": "care_lens.lvlm.replay.BLOCK_INPUT"}
    | {name: f"care_lens.lvlm.{name}" for name in ("Edit", "Replay")},
)
