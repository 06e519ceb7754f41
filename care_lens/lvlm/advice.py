"""What messages tell the user to do, in the words of what the user has: a HookedLVLM, or a plain model with a repair attached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """The ways out of what is refused, as parts of a sentence.

    Attributes:
        threads: How another thread may run the model.
        plainly: How the model is run without what acts on it.
        calls: The calls that a repair can follow.
        afresh: How tokens come to be read under the repair.
        again: How a closed model is used again.
    """

    threads: str
    plainly: str
    calls: str
    afresh: str
    again: str


HOOKED = Advice(
    threads="Open the block in this thread (`with repair.on(lvlm): ...` inside its function), start it with "
    "target=lvlm.carry_hooks(function) to have the starting thread's, or run it under `with lvlm.hooks():` for the model as it is",
    plainly="call it outside of the `with repair.on(lvlm)` block for what they do",
    calls="lvlm(inputs), lvlm.generate(inputs), lvlm.hf_model(**processor_outputs) or lvlm.hf_model.generate(...)",
    afresh="read the whole prompt inside the block first, or call lvlm.generate",
    again="HookedLVLM.from_bridge(bridge, processor), or after unwrap() with HookedLVLM.from_hf(model, processor)",
)
ATTACHED = Advice(
    threads="Attach the repair for all threads (repair.attach(model, processor, every_thread=True)), attach it in this thread, or start "
    "the thread with target=handle.carry(function), handle being what attach returned, to have the starting thread's; for the model as it "
    "is, run it under `with handle.lvlm.hooks():`",
    plainly="take the repair off first (handle.remove(), or leave the `with` block) for what they do",
    calls="model(**processor_outputs) or model.generate(**processor_outputs)",
    afresh="read the whole prompt with the repair on first, or call model.generate",
    again="repair.attach(model, processor)",
)
