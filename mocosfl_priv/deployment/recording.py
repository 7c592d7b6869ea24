"""Record a function of tensors as an ONNX graph, by running it once and translating every operation that it executes.

Operations are recorded below autograd (`TorchDispatchMode`), so that a backward pass is recorded like any other
computation. PyTorch's own exporter has no rules for most operations of backward passes, and takes half a minute for a
graph that is recorded here in less than a second. Shapes are fixed to those of the run. Operations without a rule
(`onnx_rules`) are decomposed by PyTorch's table of decompositions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocosfl_priv.device.program import RandomInput
from mocosfl_priv.device.runtime import RANDOM

OPSET = 18
IR_VERSION = 9  # that of ONNX 1.14, so that devices do not need a newer runtime than the rules require
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
Rule = Callable[..., "str | Sequence[str]"]
DRAWS: dict[Any, Literal["normal", "uniform"]] = {  # drawn from an explicit generator, as defenses do
    torch.ops.aten.randn.generator: "normal",
    torch.ops.aten.rand.generator: "uniform",
}


class NotTranslatableError(Exception):
    """The function does something that cannot be expressed as a graph; the message says what."""


class Graph:
    """An ONNX graph under construction: its nodes in order of computation, and the names of tensors."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}
        self._computed: set[str] = set()
        self._alive: list[Tensor] = []  # keeps tensors alive, since Python may reuse the id of a deleted object
        self._count = 0

    def knows(self, tensor: Tensor) -> bool:
        """Whether `tensor` depends on the function's arguments; tensors that do not are constants."""
        return self._names.get(id(tensor)) in self._computed

    def assign(self, tensor: Tensor, name: str) -> None:
        """Set the name of `tensor`, which depends on the function's arguments."""
        self._alive.append(tensor)
        self._names[id(tensor)] = name
        self._computed.add(name)

    def name(self, tensor: Tensor) -> str:
        """Return the name of `tensor`; a tensor without a name is added as a constant."""
        if id(tensor) not in self._names:
            self._alive.append(tensor)
            self._names[id(tensor)] = self._constant(tensor.detach().contiguous().numpy().copy())
        return self._names[id(tensor)]

    def operand(self, value: Tensor | float, dtype: torch.dtype) -> str:
        """Return the name of a tensor or number, converted to `dtype` if needed."""
        if not isinstance(value, Tensor):
            return self._constant(torch.tensor(value, dtype=dtype).numpy())
        name = self.name(value)
        return name if value.dtype == dtype else self.node("Cast", name, to=TYPES[dtype])

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a constant int64 vector, the form in which many operators take sizes."""
        return self._constant(np.array(values, np.int64))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one result, and return the result's name."""
        return self.nodes(operator, 1, *inputs, **attributes)[0]

    def nodes(self, operator: str, results: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add an operator with several results, and return their names."""
        names = [self._fresh() for _ in range(results)]
        self._nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def model(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bytes:
        """Return the serialised model that computes `outputs` from `inputs`, both by name, without unneeded nodes."""
        finals = [helper.make_node("Identity", [self.name(value)], [name]) for name, value in outputs.items()]
        needed = {name for node in finals for name in node.input}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        graph = helper.make_graph(
            [*reversed(kept), *finals],
            "client",
            [_described(name, value) for name, value in inputs.items()],
            [_described(name, value) for name, value in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in self._constants.items() if name in needed],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        return model.SerializeToString()

    def _constant(self, value: np.ndarray) -> str:
        name = self._fresh()
        self._constants[name] = value
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"


class Recorder(TorchDispatchMode):
    """A context in which every operation on tensors of `graph` is executed and added to it.

    Random numbers drawn from a generator become inputs of the graph, named ``random.0``, ``random.1``, ... in order.

    random_inputs: distributions and shapes of these inputs.
    drawn: their values in this run, by name.
    """

    def __init__(self, graph: Graph, rules: Mapping[Any, Rule], own_decompositions: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random_inputs: list[RandomInput] = []
        self.drawn: dict[str, Tensor] = {}
        self._graph = graph
        self._rules = rules
        self._decompositions = own_decompositions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute and record one operation; raises NotTranslatableError if it has no rule and no decomposition."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not any(self._graph.knows(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is None:
            return self._taken_apart(func, args, kwargs)
        result = func(*args, **kwargs)
        names = rule(self._graph, result, *args, **kwargs)
        if isinstance(names, str):
            self._graph.assign(result, names)
        else:
            for tensor, name in zip(result, names, strict=False):  # further results, without a name, are not used
                self._graph.assign(tensor, name)
        return result

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if func not in DRAWS:
            raise NotTranslatableError(
                f"it draws random numbers ({func}); only a defense may, with torch.rand or torch.randn and the "
                "generator that it is given"
            )
        drawn: Tensor = func(*args, **kwargs)
        if drawn.dtype != torch.float32:
            raise NotTranslatableError(f"it draws {drawn.dtype} numbers, but a device computes in float32")
        name = f"{RANDOM}{len(self.random_inputs)}"
        self.random_inputs.append(RandomInput(DRAWS[func], tuple(drawn.shape)))
        self.drawn[name] = drawn
        self._graph.assign(drawn, name)
        return drawn

    def _taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` as simpler operations: by our decompositions, its own definition, or PyTorch's table."""
        for decomposition in (self._decompositions.get(func), func.decompose, decomposition_table.get(func)):
            if decomposition is None:
                continue
            with self:
                result = decomposition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise NotTranslatableError(f"there is no rule for the operation {func}")


class Redrawn(TorchDispatchMode):
    """A context in which draws from generators return `values`, in order."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = list(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute one operation, or return the next value; raises NotTranslatableError if its shape does not fit."""
        if func not in DRAWS:
            return func(*args, **(kwargs or {}))
        if not self._values or tuple(args[0]) != tuple(self._values[0].shape):
            raise NotTranslatableError(
                "the random numbers that it draws for a batch do not correspond to those for single images"
            )
        return self._values.pop(0)


def _described(name: str, value: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[value.dtype], list(value.shape))
