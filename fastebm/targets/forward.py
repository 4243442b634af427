"""What a module's forward does, as a list of known operations: read from its types and code, never from its values.

An nn.Sequential is read layer by layer. The forward of any other class runs on symbols (symbols.py), after its code
was checked (checks.py), and each node of the graph must be a known operation (operations.py). It runs twice: a forward
that does something else the second time is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..energies.class_conditional import Projection
from ..energies.functions import FunctionModule, name_of_forward
from ..energies.images import ImageEnergy
from .checks import check_code, check_hooks, check_submodules, is_layer, plain
from .operations import Affine, NotAnMLP, Operation, is_batch_size, is_shape, recognised
from .symbols import graph_of

__all__ = ["operations"]


def operations(module: nn.Module) -> list[Operation]:
    """The operations of the forward pass in order, for x alone. The module must be in eval mode.

    Raises:
        NotAnMLP: an operation is not known, there is a branch on values, or the forward is otherwise not a plain chain
            of operations.
    """
    if not torch.compiler.is_compiling() and _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise NotAnMLP("a hook on all modules is registered, which may change what they compute")
    try:
        return list(_operations(module, ""))
    except NotAnMLP:
        raise
    # A user's objects may be anything: attributes that can't be copied, containers that contain themselves.
    except Exception as error:
        raise NotAnMLP(f"it can't be read: {type(error).__name__}: {error}") from error


def _operations(module: nn.Module, path: str) -> Iterator[Operation]:
    where = f"{path or 'the energy'} ({type(module).__name__})"
    if isinstance(module, FunctionModule):
        raise NotAnMLP(f"{path or 'the energy'} is the function {name_of_forward(module)}, and only modules are read")
    check_hooks(module, where)
    if plain(module, nn.Sequential):
        # not named_children(), which leaves out the second use of a layer that appears twice
        for name, child in module._modules.items():
            if child is not None:
                yield from _operations(child, _joined(path, name))
    elif is_layer(module) or isinstance(module, ImageEnergy):  # known, so that no graph is needed to refuse it
        yield Operation(where, module)
    elif torch.compiler.is_compiling():
        raise NotAnMLP(f"the forward of {where} can't be read in a compiled call")
    elif isinstance(module, Projection) and plain(module, Projection):
        check_submodules(module, where, f"{path}." if path else "")
        yield Operation(where, Affine(module.weight, module.classes.bias))
    else:
        yield from _traced(module, path, where)


def _traced(module: nn.Module, path: str, where: str) -> Iterator[Operation]:
    """The operations of a class with a forward of its own."""
    check_submodules(module, where, f"{path}." if path else "")
    check_code(module, where)
    graph = graph_of(module, where)
    if _listed(graph_of(module, where)) != _listed(graph):
        raise NotAnMLP(f"the forward of {where} does something else each time")
    names = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    chain: Any = None  # the last operation so far; each must take its result, and nothing else may
    shapes: set[fx.Node] = set()
    batch_sizes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            chain = node
        elif node.op == "output":
            if node.args != (chain,):
                raise NotAnMLP(f"the forward of {where} returns something other than its last operation")
        elif is_shape(node):
            shapes.add(node)
        elif is_batch_size(node, shapes):
            batch_sizes.add(node)
        elif node.op != "get_attr":
            first = [arg for arg in (*node.args, *node.kwargs.values()) if arg is chain]
            if len(first) != 1 or (node.op == "call_module" and (node.args != (chain,) or node.kwargs)):
                raise NotAnMLP(f"the forward of {where} is no chain of operations: {_text(node)}")
            if node.op == "call_module":
                yield from _operations(names[str(node.target)], _joined(path, str(node.target)))
            else:
                op = recognised(node, chain, batch_sizes, parameters)
                if op is None:
                    raise NotAnMLP(f"the forward of {where} does what no MLP does: {_text(node)}")
                yield Operation(f"{_text(node)} in {where}", op)
            chain = node
        if node is chain and sum(not (is_shape(user) or is_batch_size(user, shapes)) for user in node.users) > 1:
            raise NotAnMLP(f"the forward of {where} is no chain of operations: {_text(node)} is used twice")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _text(node: fx.Node) -> str:
    """A node as an error names it."""
    if node.op == "placeholder":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name}()"


def _listed(graph: fx.Graph) -> list[Any]:
    """The nodes of a graph, to be compared."""
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]
