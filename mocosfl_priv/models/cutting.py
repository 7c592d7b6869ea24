"""A user's whole network, cut after one of its modules into a client and a server.

The network is traced by torch.fx. The client gets all operations up to the return of the named module, the server gets
the rest, and both together are compared with the whole network. Where the network cannot be traced, for example since
its control flow depends on the images, the client runs the network itself and stops at the module's output; there is no
server then. What precedes the cut could decide by the images what follows it, and no test on some images proves that it
does not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from mocosfl_priv.errors import ConfigurationError, did_you_mean
from mocosfl_priv.models.client_check import (
    ImageShape,
    copy_in_eval_mode,
    first_run,
    probe_images,
    run,
    same_values,
    seeded,
)

ROOT = "model"  # the network's name in the module that is traced
BATCHES = (1, 2, 4)  # numbers of images with which the parts are compared with the whole network, with those below
SIZING_BATCHES = (2, 3)  # with which sizes are measured as functions of the number of images
LISTED = 24  # most names in a message
# torch's own modules are one operation each, save these, which run modules that a user may want to cut at
CONTAINERS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.DataParallel)
SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})
SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "is_nested"})
MOST_QUESTIONS = 200  # of a network about sizes; each costs one trace


def cut_model(model: nn.Module, name: str, image_shape: ImageShape) -> tuple[nn.Module, nn.Module | None]:
    """Cut `model` after its module `name`; `model` itself is neither changed nor shared.

    Args:
        model: From images (n, c, h, w) in [0, 1], float32, to anything. It is run in eval mode.
        name: Dotted name of a module of `model`, one of :func:`cut_names`.
        image_shape: Channels, height and width of one image.

    Returns:
        The client, from images to the output of the module, and the server, from that output to the model's output.
        Both keep the model's parameter names if the model can be traced. The server is None if it cannot; the client
        then holds the whole model, as ``model``, and runs it up to the cut.

    Raises:
        ConfigurationError: In one line, where there is no such module, it is called not once but never or several
            times, its output is not one tensor with the images along its first axis, or the server would need another
            value than that output.
    """
    copied = copy_in_eval_mode(model, "the model")
    if name not in dict(copied.named_modules(remove_duplicate=False)) or not name:
        raise _unknown(model, name, image_shape)
    images = probe_images(copied, image_shape, BATCHES[-1])
    first_run(copied, images.clone(), "the model")
    _require_one_output(_outputs(copied, name, images), name, len(images))
    trace = _trace(copied, image_shape, name)
    if trace is not None:
        refusal = trace.refusal(name)
        parts = None if refusal else _agreeing_parts(copied, trace, name, image_shape)
        if parts is not None:
            return parts
        if refusal and _trusted(copied, trace, image_shape):
            raise ConfigurationError(f"--cut {name}: {refusal}; {_listed(trace.names())}")
    _require_closed(copied, name, image_shape)
    return _UntilModule(copied, name), None


def cut_names(model: nn.Module, image_shape: ImageShape) -> tuple[str, ...]:
    """List the modules after which `model` can be cut, in the order in which they return.

    Args:
        model: See :func:`cut_model`; it is not changed.
        image_shape: Channels, height and width of one image.

    Returns:
        Dotted names of modules whose output is one tensor with the images along its first axis. Of a model that cannot
        be traced, they are those that are called once; :func:`cut_model` may refuse some of them.

    Raises:
        ConfigurationError: `model` cannot be copied, has weights that are not finite, or fails on this shape.
    """
    copied = copy_in_eval_mode(model, "the model")
    trace = _trace(copied, image_shape)
    images = probe_images(copied, image_shape, BATCHES[-1])
    first_run(copied, images.clone(), "the model")
    traced = trace.names() if trace is not None and _trusted(copied, trace, image_shape) else None
    outputs = _all_outputs(copied, images)
    able = [name for name, found in outputs.items() if _output_problem(found, len(images)) is None]
    return tuple(able) if traced is None else tuple(name for name in traced if name in able)


@dataclass(frozen=True)
class _Call:
    """A call of a module in a traced network: what it returned, and the number of operations until then."""

    result: object
    end: int


class _Whole(nn.Module):
    """A network with one argument, so that others keep their defaults while it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _SizeQuestion(BaseException):  # not an Exception, so that a model that catches those does not catch it
    """A traced network asks something about sizes; it is answered outside the trace, where modules can be run."""

    def __init__(self, graph: fx.Graph, node: fx.Node, what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.graph = graph
        self.node = node
        self.what = what

    def answer(self, whole: nn.Module, image_shape: ImageShape) -> Any:
        """What holds for all images that are tried; None if there is no such answer."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, copies)
        graph.output(copies[self.node])
        module = fx.GraphModule(whole, graph)
        try:
            found = {self.what(run(module, images)) for images in _probes(whole, image_shape)}
        except Exception:  # what has no length, for example
            return None
        return found.pop() if len(found) == 1 else None


class _Value(fx.Proxy):
    """A value in a traced network that is a number where Python needs one, if it is a size."""

    tracer: _Tracer

    def __len__(self) -> int:
        return self.tracer.ask(self.node, len)

    def __index__(self) -> int:
        return self.tracer.ask(self.node, operator.index)

    def __int__(self) -> int:
        return self.tracer.ask(self.node, int)

    def __float__(self) -> float:
        return self.tracer.ask(self.node, float)


class _Tracer(fx.Tracer):
    """Records what each module returned; `opened` modules are traced, `opaque` ones are one operation each."""

    proxy_buffer_attributes = True  # else what is computed of buffers would become a constant

    def __init__(self, opened: set[nn.Module], opaque: set[nn.Module], answers: list[Any]) -> None:
        super().__init__()
        self.opened = opened
        self.opaque = opaque
        self.answers = iter(answers)
        self.calls: dict[nn.Module, list[_Call]] = {}
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.opaque:
            return True
        return (
            m not in self.opened and not isinstance(m, CONTAINERS) and super().is_leaf_module(m, module_qualified_name)
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.ask(obj.node, bool))

    def ask(self, node: fx.Node, what: Callable[[Any], Any]) -> Any:
        """Answer a question about sizes, such as ``if x.dim() == 3``, or end the trace with it."""
        if node in _of_images(list(self.graph.nodes)):
            raise fx.proxy.TraceError("control flow depends on the images")
        for answer in self.answers:
            return answer
        raise _SizeQuestion(self.graph, node, what)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            result = super().call_module(m, forward, args, kwargs)
        except BaseException:  # questions, too
            self.failed = self.failed or m  # the innermost comes first
            raise
        self.calls.setdefault(m, []).append(_Call(result, len(self.graph.nodes)))
        return result


@dataclass(frozen=True)
class _Trace:
    """A traced network.

    model: a copy of the network, whose modules the parts will have. calls: by module name; a module with several
    names has its calls under each.
    """

    model: nn.Module
    graph: fx.Graph
    calls: dict[str, list[_Call]]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @cached_property
    def places(self) -> dict[fx.Node, int]:
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def data(self) -> set[fx.Node]:
        return _of_images(self.nodes)

    def names(self) -> tuple[str, ...]:
        """The modules after which the network can be cut, in the order in which they return."""
        able = [name for name in self.calls if self.refusal(name) is None]
        return tuple(sorted(able, key=lambda name: self.calls[name][0].end))

    def refusal(self, name: str) -> str | None:
        """Why the network cannot be cut after a module; None if it can."""
        calls = self.calls.get(name, [])
        if len(calls) != 1:
            return _count_problem(len(calls))
        if not isinstance(calls[0].result, fx.Proxy):
            return f"its output is a {type(calls[0].result).__name__}, not one tensor"
        cut, end = calls[0].result.node, calls[0].end
        for user in self.nodes[end:]:
            for used in user.all_input_nodes:
                if used in self.data and used is not cut and self.places[used] < end and not _is_size(user):
                    return (
                        f"the server would also need {_described(used)}, which {_described(user)} takes, and the "
                        "client does not send it"
                    )
        return None

    def split(self, name: str, image_shape: ImageShape) -> tuple[nn.Module, nn.Module]:
        """Build client and server; they share the modules that both use."""
        (call,) = self.calls[name]
        assert isinstance(call.result, fx.Proxy)
        cut = call.result.node
        before, after = self.nodes[: call.end], self.nodes[call.end :]
        of_client = self.data & {*before}
        sizes = self._measured(
            [n for n in self.nodes if _is_size(n) and n.all_input_nodes[0] in of_client], image_shape
        )

        client = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in before:
            copies[node] = _copied(client, node, copies.__getitem__)
        client.output(copies[cut])

        server = fx.Graph()
        smashed = server.placeholder("smashed")
        # a layer that works in place must not change what the client has sent
        values = {cut: server.call_method("clone", (smashed,))}

        def value(node: fx.Node) -> fx.Node:
            if node not in values:
                if node in sizes:
                    values[node] = server.call_function(_size_of, (smashed, sizes[node]))
                else:
                    values[node] = _copied(server, node, value)
            return values[node]

        for node in after[:-1]:
            value(node)
        server.output(fx.map_arg(after[-1].args[0], value))
        return fx.GraphModule(self.model, client), fx.GraphModule(self.model, server)

    def _measured(self, nodes: list[fx.Node], image_shape: ImageShape) -> dict[fx.Node, Any]:
        """Sizes of what only the client has, as functions of the number of images."""
        if not nodes:
            return {}
        whole = fx.GraphModule(_Whole(self.model), self.graph)
        few, more = (
            _Recorder(whole, {n.name for n in nodes}).of(probe_images(self.model, image_shape, number))
            for number in SIZING_BATCHES
        )
        return {node: _as_function(few[node.name], more[node.name]) for node in nodes}


class _Recorder(fx.Interpreter):
    """Runs a traced network, and records the values of some nodes by their names."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = value
        return value

    def of(self, images: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            self.run(images)
        return self.found


def _as_function(few: Any, more: Any) -> Any:
    """A size with `SIZING_BATCHES` images as (constant, per image); a list of them for a shape; else the value."""
    if isinstance(few, tuple):
        return [_as_function(a, b) for a, b in zip(few, more, strict=True)]
    if isinstance(few, int) and not isinstance(few, bool):
        per_image = (more - few) // (SIZING_BATCHES[1] - SIZING_BATCHES[0])
        return (few - per_image * SIZING_BATCHES[0], per_image)
    return few


def _size_of(smashed: Tensor, size: Any) -> Any:
    """Evaluate what `_as_function` has made, for the images of `smashed`."""
    if isinstance(size, list):
        return torch.Size([_size_of(smashed, one) for one in size])
    if isinstance(size, tuple):
        constant, per_image = size
        return constant + per_image * smashed.shape[0]
    return smashed.device if isinstance(size, torch.device) else size


def _copied(graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], fx.Node]) -> fx.Node:
    copied = graph.node_copy(node, value)
    if node.op in ("call_module", "get_attr"):
        copied.target = str(node.target).removeprefix(f"{ROOT}.")
    return copied


def _is_size(node: fx.Node) -> bool:
    """Whether a node reads the size, type or place of a tensor, and nothing of its values."""
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZE_ATTRIBUTES


def _of_images(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on the values of the images, not only on their sizes."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (not _is_size(node) and any(used in found for used in node.all_input_nodes)):
            found.add(node)
    return found


def _described(node: fx.Node) -> str:
    """A node of a traced network, as its author knows it."""
    if node.op == "placeholder":
        return "the images"
    if node.op == "output":
        return "the model's output"
    if node.op == "call_module":
        return str(node.target).removeprefix(f"{ROOT}.")
    stack = [name.removeprefix(ROOT).removeprefix(".") for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    operation = getattr(node.target, "__name__", str(node.target))
    return f"{operation}() in {stack[-1] if stack and stack[-1] else 'the model'}"


def _trace(model: nn.Module, image_shape: ImageShape, name: str = "") -> _Trace | None:
    """Trace `model`, opened at the modules that contain `name`; None where that fails.

    What the trace computed without the images, such as the tensors that a forward pass makes, becomes attributes of
    `model`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    opaque_types: set[type[nn.Module]] = set()
    answers: list[Any] = []
    while True:
        # a network may keep what it computes while it is traced, so its structure is copied, but not its weights
        traced = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        names: dict[nn.Module, list[str]] = {}
        for dotted, module in traced.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(dotted)
        parts = name.split(".")
        opened = {traced, *(traced.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))}
        opaque = {module for module in names if type(module) in opaque_types and module not in opened}
        tracer, whole = _Tracer(opened, opaque, answers), _Whole(traced)
        try:
            with seeded(0):  # what is drawn here becomes a constant, which the comparison with the network finds
                graph = tracer.trace(whole)
        except (_SizeQuestion, Exception) as problem:  # a user's module can fail in any way
            answer = problem.answer(whole, image_shape) if isinstance(problem, _SizeQuestion) else None
            if answer is not None and len(answers) < MOST_QUESTIONS:
                answers.append(answer)
                continue
            failed = tracer.failed
            if failed is None or failed in opened or type(failed) in opaque_types:
                return None
            opaque_types.add(type(failed))  # as one operation, it need not be traced
            answers.clear()
            continue
        for node in graph.nodes:
            if node.op == "get_attr" and not node.target.startswith(f"{ROOT}."):
                setattr(model, node.target, getattr(whole, node.target))
                node.target = f"{ROOT}.{node.target}"
        calls = {dotted: made for module, made in tracer.calls.items() for dotted in names.get(module, []) if dotted}
        return _Trace(model, graph, calls)


def _probes(model: nn.Module, image_shape: ImageShape) -> list[Tensor]:
    """Images on which parts and whole are compared: random ones in several numbers, and black and white ones.

    The latter are there since a size, too, can depend on the images: on how many pixels are bright, for example.
    """
    drawn = [probe_images(model, image_shape, number) for number in sorted({*BATCHES, *SIZING_BATCHES})]
    return [*drawn, torch.zeros_like(drawn[1]), torch.ones_like(drawn[1])]


def _agreeing_parts(
    model: nn.Module, trace: _Trace, name: str, image_shape: ImageShape
) -> tuple[nn.Module, nn.Module] | None:
    """Client and server if they compute to the last bit what the module and the model do; else None."""
    try:
        client, server = trace.split(name, image_shape)
        for seed, images in enumerate(_probes(model, image_shape)):
            outputs: list[Any] = []
            with _listening(model, name, outputs):
                expected = run(model, images, seed)
            joined = _Joined(client, server)
            if not same_values(run(joined, images, seed), expected) or not same_values(joined.sent, outputs):
                return None
    except Exception:  # a user's module can fail in any way
        return None
    return client, server


class _Joined(nn.Module):
    """A client and its server, run with one state of the generators; `sent` has copies of the smashed data."""

    def __init__(self, client: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.client = client
        self.server = server
        self.sent: list[Tensor] = []

    def forward(self, images: Tensor) -> Any:
        smashed = self.client(images)
        self.sent.append(smashed.clone())
        return self.server(smashed)


def _trusted(model: nn.Module, trace: _Trace, image_shape: ImageShape) -> bool:
    """Whether the traced network computes what the model does, so that what it says of the model is true."""
    try:
        whole = fx.GraphModule(_Whole(trace.model), trace.graph)
        return all(
            same_values(run(whole, images, seed), run(model, images, seed))
            for seed, images in enumerate(_probes(model, image_shape))
        )
    except Exception:  # a user's module can fail in any way
        return False


@contextmanager
def _listening(model: nn.Module, name: str, outputs: list[Any]) -> Iterator[None]:
    """Append copies of what the module `name` returns to `outputs`; later layers may work in place."""
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, _args, output: outputs.append(output.clone() if isinstance(output, Tensor) else output)
    )
    try:
        yield
    finally:
        handle.remove()


def _outputs(model: nn.Module, name: str, images: Tensor) -> list[Any]:
    outputs: list[Any] = []
    with _listening(model, name, outputs):
        run(model, images)
    return outputs


def _all_outputs(model: nn.Module, images: Tensor) -> dict[str, list[Any]]:
    """What each module returns, by its name, in the order in which they first return; tensors have no values here."""
    found: dict[str, list[Any]] = {}

    def listen(name: str) -> Callable[..., None]:
        def heard(_module: nn.Module, _args: Any, output: Any) -> None:
            found.setdefault(name, []).append(output.to("meta") if isinstance(output, Tensor) else output)

        return heard

    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    handles = [module.register_forward_hook(listen(name)) for name, module in modules]
    try:
        run(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _count_problem(calls: int) -> str:
    if calls:
        return f"it is called {calls} times in a forward pass, so there is no one place to cut"
    return "it is not called in a forward pass, at least not by itself"


def _output_problem(outputs: list[Any], number: int) -> str | None:
    """Why a module with these outputs in one forward pass of `number` images is no place to cut; None if it is one."""
    if len(outputs) != 1:
        return _count_problem(len(outputs))
    (output,) = outputs
    if not isinstance(output, Tensor):
        return f"its output is a {type(output).__name__}, not one tensor"
    if not output.is_floating_point():
        return f"its output holds {str(output.dtype).removeprefix('torch.')} numbers, not floating-point numbers"
    if output.dim() < 2 or output.shape[0] != number:
        return (
            f"it maps {number} images to shape {tuple(output.shape)}, which does not have the images along its "
            "first axis"
        )
    return None


def _require_one_output(outputs: list[Any], name: str, number: int) -> None:
    problem = _output_problem(outputs, number)
    if problem is not None:
        raise ConfigurationError(f"--cut {name}: {problem}")


def _require_closed(model: nn.Module, name: str, image_shape: ImageShape) -> None:
    """Raise ConfigurationError where the model's output depends on the images otherwise than through the module.

    The model is run on other images, with the module's output replaced by that of the first images. Nothing may change.
    """
    drawn = [probe_images(model, image_shape, 2, seed) for seed in (0, 1)]
    probes = [*drawn, torch.zeros_like(drawn[0]), torch.ones_like(drawn[0])]  # one size, so that they can be exchanged
    sent: list[Tensor] = []
    expected: list[Any] = []
    for images in probes:
        outputs: list[Any] = []
        with _listening(model, name, outputs):
            expected.append(run(model, images))
        _require_one_output(outputs, name, len(images))
        sent += outputs
        if not same_values(run(model, images), expected[-1]):
            raise ConfigurationError(
                f"--cut {name}: the model draws noise that no seed repeats, so the cut cannot be checked: draw it from "
                "torch's, NumPy's or Python's global generator"
            )
    for place, smashed in enumerate(sent):
        handle = model.get_submodule(name).register_forward_hook(lambda *_, replaced=smashed: replaced.clone())
        try:
            got = run(model, probes[place - 1])
        finally:
            handle.remove()
        if not same_values(got, expected[place]):
            raise ConfigurationError(
                f"--cut {name}: the server would also need another value that is computed of the images before the "
                "cut, such as a skip connection, and the client does not send it"
            )


class _Reached(BaseException):  # not an Exception, so that a model that catches those does not catch it
    """Carries the output of the module out of the model."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class _UntilModule(nn.Module):
    """Runs a model up to the return of one of its modules, and nothing after it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
            raise _Reached(output)

        handle = self.model.get_submodule(self.name).register_forward_hook(stop)
        try:
            self.model(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise ConfigurationError(f"the model does not call {self.name} for these images, so the client sends nothing")


def _unknown(model: nn.Module, name: str, image_shape: ImageShape) -> ConfigurationError:
    names = cut_names(model, image_shape)
    existing = [known for known, _ in model.named_modules(remove_duplicate=False) if known]
    close = did_you_mean(name, existing)
    hint = f"{close} " if close.startswith("did you mean") else ""
    return ConfigurationError(f"--cut {name}: the model has no module of that name; {hint}{_listed(names)}")


def _listed(names: tuple[str, ...]) -> str:
    """Where a model can be cut, with the outermost modules if there are too many."""
    if not names:
        return "there is no module after which it can be cut"
    depth = max(
        (d for d in range(1, 10) if sum(name.count(".") < d for name in names) <= LISTED),
        default=1,
    )
    shown = [name for name in names if name.count(".") < depth] or list(names)
    more = len(names) - len(shown[:LISTED])
    return f"it can be cut after {', '.join(shown[:LISTED])}" + (f", and {more} more" if more else "")
