"""Whether an engine can take the place of another: what it takes and gives must lie in the same planes.

The arena is planned for the first engine of a model.  Another may run on it if its tensors are the same, in the same
order, since messages name shapes in that order, and if it takes the batches that the pool makes.  Its file, its
weights and what it does best may differ.
"""

from __future__ import annotations

from .layout import ModelLayout
from .tensors import ModelSpec, TensorSpec


def differences(layout: ModelLayout, spec: ModelSpec) -> list[str]:
    """How `spec` does not fit the planes and batches of a model, a phrase each; empty: it fits."""
    served = layout.spec
    found = [] if spec.name == served.name else [f"it is called {spec.name!r}, not {served.name!r}"]
    found += _of_tensors("input", served.inputs, spec.inputs)
    found += _of_tensors("output", served.outputs, spec.outputs)
    if spec.batched != served.batched:
        found.append("its tensors have no batch axis" if served.batched else "its tensors have a batch axis")
    elif spec.whole_slots != served.whole_slots or (spec.whole_slots and spec.batch_limit != layout.items_per_slot):
        found.append(f"it takes {_batches(spec)}, and the pool serves one that takes {_batches(served)}")
    elif spec.batch_limit and spec.batch_limit < layout.max_batch:
        found.append(f"it takes {_batches(spec)}, and the pool makes batches of up to {layout.max_batch}")
    if not found and spec.profiles and spec.profiles != served.profiles:
        taken = served.describe_profiles() or "all shapes between its smallest and its largest"
        found.append(f"it takes items of {spec.describe_profiles()}, and the pool serves one that takes {taken}")
    return found


def _of_tensors(role: str, served: tuple[TensorSpec, ...], offered: tuple[TensorSpec, ...]) -> list[str]:
    if served == offered:
        return []
    new = {one.name: one for one in offered}
    old = {one.name: one for one in served}
    found = [f"{role} {one} is missing" for one in served if one.name not in new]
    found += [f"{role} {one} is new" for one in offered if one.name not in old]
    for one in served:
        other = new.get(one.name, one)
        if other != one:
            found.append(f"{role} {other} in place of {one}")
    return found or [f"its {role}s are in another order: {', '.join(new)} instead of {', '.join(old)}"]


def _batches(spec: ModelSpec) -> str:
    if spec.whole_slots:
        return f"whole batches of {spec.batch_limit} only"
    return f"batches of up to {spec.batch_limit}" if spec.batch_limit else "batches of any size"
