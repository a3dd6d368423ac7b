"""Small words for writing node trees in Python: what a node group computes reads as an expression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import bpy

# Values or sockets by an input's name or index: in three parts because a Mapping is invariant in its keys.
Inputs = Mapping[str, Any] | Mapping[int, Any] | Mapping[str | int, Any]


class Tree:
    """Adds nodes to a node tree; inputs are sockets to link or plain values."""

    def __init__(self, tree: bpy.types.NodeTree) -> None:
        self.tree = tree

    def node(self, kind: str, inputs: Inputs | None = None, **settings: Any) -> bpy.types.Node:
        """A node of a type; `inputs` by name or index, `settings` are the node's own properties."""
        node = self.tree.nodes.new(kind)
        for name, value in settings.items():
            setattr(node, name, value)
        for key, value in (inputs or {}).items():
            self.set(node.inputs[key] if isinstance(key, int) else _enabled(node.inputs, key), value)
        return node

    def set(self, socket: bpy.types.NodeSocket, value: Any) -> None:
        if isinstance(value, bpy.types.NodeSocket):
            self.tree.links.new(value, socket)
        else:
            socket.default_value = value

    def math(self, operation: str, *operands: Any) -> bpy.types.NodeSocket:
        """The Math node of shader and geometry trees."""
        return self.node("ShaderNodeMath", dict(enumerate(operands)), operation=operation).outputs[0]

    def vector(self, operation: str, *operands: Any) -> bpy.types.NodeSocket:
        """The Vector Math node; a scalar where the operation gives one. SCALE takes (vector, number)."""
        keys: Iterable[str | int] = (0, "Scale") if operation == "SCALE" else range(len(operands))
        node = self.node("ShaderNodeVectorMath", dict(zip(keys, operands, strict=True)), operation=operation)
        return next(output for output in node.outputs if output.enabled)

    def arrange(self, width: float = 190.0, height: float = 170.0) -> None:
        """Lay the nodes out in columns by their depth, so that a person can read the tree."""
        depth: dict[bpy.types.Node, int] = {}
        for node in self.tree.nodes:  # every node is made after those it reads, except the group's input
            sources = [link.from_node for link in self.tree.links if link.to_node == node]
            depth[node] = 1 + max((depth.get(source, 0) for source in sources), default=-1)
        rows: dict[int, int] = {}
        for node, column in depth.items():
            node.location = (column * width, -rows.get(column, 0) * height)
            rows[column] = rows.get(column, 0) + 1


def output(node: bpy.types.Node, name: str) -> bpy.types.NodeSocket:
    """The enabled output of a name: nodes of several types keep one socket a type."""
    return _enabled(node.outputs, name)


def _enabled(sockets: Any, name: str) -> bpy.types.NodeSocket:
    for socket in sockets:
        if socket.name == name and socket.enabled:
            return socket
    raise KeyError(f"no enabled socket {name!r} among {[socket.name for socket in sockets]}")
