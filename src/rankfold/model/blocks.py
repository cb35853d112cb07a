"""The blocks of a model: modules that are called one after the other, once in a pass each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial, wraps
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankfold.errors import InputError, visible

FEWEST = 2  # modules of one class that make a list of blocks


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The members of every outermost list of modules of one class, by name.

    Of a transformer its layers, of an encoder and a decoder those of both, of a conv net its stages
    or their blocks. A list of layers without parts of their own is none of blocks.
    """
    found: dict[str, nn.Module] = {}

    def look(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if _is_list(child) and _are_blocks(list(child.children())):
                found.update({f"{path}.{place}": one for place, one in child.named_children()})
            else:
                look(path, child)

    look("", model)
    return found


def named_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The blocks of these names: a list stands for its members; ``*`` is any text.

    Raises:
        InputError: There is no such module, it has no parts, or it stands in another one.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for pattern in names:
        matching = [name for name in modules if name and fnmatchcase(name, pattern)]
        if not matching:
            lists = dict.fromkeys(name.rpartition(".")[0] for name in find_blocks(model))
            usual = ", ".join(map(visible, lists))
            raise InputError(
                f"blocks: there is no module {visible(pattern)!r} in {type(model).__name__}; "
                f"expected names of its modules{f', such as {usual}' if usual else ''}."
            )
        for name in matching:
            if _is_list(modules[name]):
                members = modules[name].named_children()
                found.update({f"{name}.{place}": one for place, one in members})
            else:
                found[name] = modules[name]
    for name, module in found.items():
        if next(module.children(), None) is None:
            raise InputError(
                f"blocks: {visible(name)} is a {type(module).__name__} without parts; expected "
                "modules that hold the layers of a block, or a list of such modules."
            )
        outer = next((o for o in found if name.startswith(f"{o}.")), None)
        if outer is not None:
            raise InputError(
                f"blocks: {visible(name)} stands in {visible(outer)}; expected blocks beside each "
                "other. Name the one or the other."
            )
    return {name: module for name, module in modules.items() if name in found}


def block_of(name: str, blocks: Sequence[str]) -> str | None:
    """The block in which a module of this name stands, None where it stands in none."""
    return next((b for b in blocks if name == b or name.startswith(f"{b}.")), None)


@contextmanager
def checkpointed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """While passes run: no activation inside a block is held; going back, each one runs again."""
    with ExitStack() as stack:
        for name in blocks:
            block = model.get_submodule(name)
            given = block.forward
            again = partial(checkpoint, given, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(forward_of(block, again))
        yield


@contextmanager
def forward_of(block: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """While passes run: what runs in the place of a block's forward."""
    own = vars(block).get("forward")
    cast("Any", block).forward = wraps(block.forward)(run)
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            cast("Any", block).forward = own


def graph_leaves(roots: Sequence[Tensor]) -> dict[int, Tensor]:
    """The tensors that gradients of these flow to and no further, by ``id``."""
    nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
    found = {id(root): root for root in roots if root.requires_grad and root.is_leaf}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _are_blocks(members: Sequence[nn.Module]) -> bool:
    kinds = {type(one) for one in members}
    parts = all(next(one.children(), None) is not None for one in members)
    return len(members) >= FEWEST and len(kinds) == 1 and parts
